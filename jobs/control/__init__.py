"""What keeps a run alive: driver, monitor, worker group, supervisor, lease, and what is done at its end.

Of `jobs` all may be imported but `jobs.cli`.
"""
