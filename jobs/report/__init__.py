"""Views of a run for people: status, report, charts and pictures, from its directory alone."""
