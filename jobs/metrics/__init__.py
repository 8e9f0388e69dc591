"""A run in numbers: what Prometheus scrapes, figures of ranks, where the time goes. Imports no PyTorch."""
