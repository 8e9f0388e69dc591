"""Checkpoints: written by ranks, committed, checked, kept or deleted, and read at any world size.

Knows ranks as numbers and DeepSpeed's files as bytes; no Ray.
"""
