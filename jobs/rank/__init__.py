"""What one rank does: engine, step, restore and save, its watch and its line to the monitor.

Knows no driver: that is `jobs.control`.
"""
