"""Commands typed on a machine that is not a node of the cluster: run there as jobs, their output shown here."""
