"""A run in numbers: Prometheus metrics, figures of ranks, goodput and recovery. Imports no PyTorch."""
