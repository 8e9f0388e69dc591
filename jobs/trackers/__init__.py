"""A run in TensorBoard, MLflow and Weights & Biases: one interface, written by the monitor alone.

Knows no rank and no Ray. Each library is imported by its own file, when a run uses it.
"""
