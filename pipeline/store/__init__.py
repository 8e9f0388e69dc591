"""Files and objects by URL: reading, writing and listing, conditional and parted writes, and leases.

Knows bytes, and no format of them but JSON.
"""
