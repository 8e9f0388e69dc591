"""Data sets, made, indexed, verified and measured by tasks of the cluster, with the output of those commands."""
