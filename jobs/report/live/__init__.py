"""A run as it happens: its report's parts, kept up to date in browsers, for the monitor and `convmae ui`."""
