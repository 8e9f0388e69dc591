"""This machine as a process sees it: local files, scratch folders, threads, and which process is which.

Anything may import it; it knows no store and no image.
"""
