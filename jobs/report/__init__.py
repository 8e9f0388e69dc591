"""A run as people look at it: status, report, charts and pictures, from its directory alone."""
