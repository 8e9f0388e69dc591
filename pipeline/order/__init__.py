"""Which samples make up a batch, and what that order costs: pure functions of integers, without I/O."""
