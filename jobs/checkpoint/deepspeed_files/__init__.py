"""Checkpoints in DeepSpeed's own files: those of formats 1 to 3, and those that other programs made.

Nothing here writes one, and nothing outside knows how they are laid out.
"""
