"""Weights: consolidated from a checkpoint, read, exported to other formats, and imported."""
