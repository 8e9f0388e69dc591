"""Data sets by tasks of the cluster: making, indexing and verifying them, as a person follows it."""
