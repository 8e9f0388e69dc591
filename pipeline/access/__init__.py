"""How a store is reached: places and their URLs, settings, keys and proxies, and what can fail on the way.

The settings are one value that travels. Reads and writes are `pipeline.store`; nothing here opens an object.
"""
