"""The formats of a dataset: tars, their indexes, the manifest; reading and verifying them.

Covers what already lies in a store; making it is `pipeline.ingest`.
"""
