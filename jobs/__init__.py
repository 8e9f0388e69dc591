"""Recipes, Ray, DeepSpeed, checkpoints, metrics and the `convmae` command: what composes pipeline and model."""
