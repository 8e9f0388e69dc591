"""Access to stores: places and their URLs, settings, keys and proxies, faults and retries.

The settings are one value that travels. Reads and writes are `pipeline.store`; nothing here opens an object.
"""
