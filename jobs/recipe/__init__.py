"""What a run is, and what follows from that before anything is started: schedule, size, time, requests.

Knows no run that exists, no Ray and no DeepSpeed.
"""
