"""The `convmae` command: what is typed is checked, one function called, its result printed. Nothing imports it."""
