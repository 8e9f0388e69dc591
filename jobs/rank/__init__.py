"""What one rank does around its steps: restore, train and save, its watch and its line to the monitor.

Knows no driver: that is `jobs.control`.
"""
