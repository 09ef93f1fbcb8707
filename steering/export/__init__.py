"""Steering written for the programs that serve it, read back, and proven where it runs."""
