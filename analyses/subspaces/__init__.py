"""Safety subspaces: in the weights that alignment changed, and in activations."""
