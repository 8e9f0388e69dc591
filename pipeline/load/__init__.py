"""Batches of one rank: a dataset opened, read ahead, cached, decoded and handed over.

For what trains. Not for `pipeline.ingest`.
"""
