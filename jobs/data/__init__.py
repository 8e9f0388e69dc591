"""Data sets, made, indexed and verified by tasks of the cluster, with the output of those commands."""
