"""The way from images and tars as they were found to shards: sources, plan, and the work on one shard.

Knows no Ray: `jobs.data` spreads it over a cluster. Not for `pipeline.load`, which reads what was made.
"""
