"""The Ray cluster: where it is, whose store is used there, jobs, tasks, nodes, and what ails them."""
