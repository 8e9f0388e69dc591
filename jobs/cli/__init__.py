"""The `convmae` command: its input is checked, one function is called, and its result printed. Nothing imports it."""
