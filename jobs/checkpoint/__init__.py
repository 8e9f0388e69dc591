"""Checkpoints: written by ranks, committed, checked, retained, and read again at any world size.

Knows ranks as numbers and DeepSpeed's files as bytes; no Ray.
"""
