"""Batches of one rank: a data set opened, read ahead, cached, decoded and handed over.

For what trains. Not for `pipeline.ingest`.
"""
