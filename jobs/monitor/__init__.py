"""The monitor of a live run: what ranks and controller report, what is written of it, and what ranks are to do.

Knows no driver: that is `jobs.control`.
"""
