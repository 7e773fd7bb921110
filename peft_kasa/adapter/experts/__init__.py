"""Stacked experts: parameters of three dimensions, a matrix an expert, that no linear layer holds."""
