"""Token-distribution shift: what alignment changed in the choice of words."""
