"""Accuracy while a run trains: what is probed and when, and the process that probes. Knows no driver and no rank."""
