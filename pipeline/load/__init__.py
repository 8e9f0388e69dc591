"""Batches of one rank: a dataset opened, read ahead, cached, decoded and copied to the device.

For training. Not for `pipeline.ingest`.
"""
