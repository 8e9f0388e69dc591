"""Weights: read, checked, named by users, imported, and given to a run that begins."""
