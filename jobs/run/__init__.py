"""What a run leaves behind for all others to read: its directory, records, trace, and the code that it ran.

Knows no cluster, and not what is in a checkpoint.
"""
