"""The order of samples: which of them make up a batch, and what that costs: pure functions of integers, without I/O."""
