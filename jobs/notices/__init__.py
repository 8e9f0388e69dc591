"""Notices to people, by a webhook: which events are worth one, and their delivery. Knows no rank and no Ray."""
