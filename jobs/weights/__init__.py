"""Weights: consolidated from a checkpoint, read, exported to the formats of others, and brought in."""
