"""What keeps a run going: driver, monitor, worker group, supervisor, lease, and what is done at its end.

Of `jobs` all may be imported but `jobs.cli`.
"""
