"""Ablations: the runs that a spec asks for, submitted, followed and evaluated, and the table that they make.

What it submits are ordinary runs; it knows no rank and no checkpoint.
"""
