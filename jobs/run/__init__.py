"""What a run leaves behind and everybody reads: its directory, records, trace, and the code that it ran.

Knows no cluster and no checkpoint's inside.
"""
