"""Runs a model over data for the methods that start from it."""
