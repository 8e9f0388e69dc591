"""The Ray cluster: its address, the store that is used there, jobs, tasks, nodes, and what is wrong with them."""
