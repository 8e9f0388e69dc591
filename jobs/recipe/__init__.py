"""The recipe, and what follows from it before anything is started: schedule, size, time, requests.

Knows no existing run, no Ray and no DeepSpeed.
"""
