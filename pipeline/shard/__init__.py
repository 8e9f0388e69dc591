"""The formats of a dataset: tars, their indexes, the manifest; reading and verifying them.

What lies in a store already; how it came there is `pipeline.ingest`.
"""
