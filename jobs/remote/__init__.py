"""A command typed where its cluster is not: run there as a job, its output shown here."""
