"""Activations of one run put into another: within a model, or between two checkpoints."""
