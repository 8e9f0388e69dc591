"""Memory checkpoints: the newest state of every rank, held in the memory of its node and of another one.

They live outside of the ranks' processes and no longer than the run's driver; the store knows nothing of them.
"""
