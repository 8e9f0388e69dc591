"""Processes that read and decode beside a rank, which share a ring of batches with it.

Only the rank's side may know torch and devices; what a process runs is found from its first message.
"""
