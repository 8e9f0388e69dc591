"""The local stack: an S3 server, a Ray head and Prometheus on one machine, and their keeper.

Knows no run.
"""
