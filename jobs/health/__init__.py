"""What ranks and nodes say of their health, and what follows from it: stragglers, and checks before ranks start.

Knows neither Ray nor a run: figures and results come in, decisions come out.
"""
