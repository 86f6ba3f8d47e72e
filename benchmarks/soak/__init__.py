"""The soak test: kills, mutated inputs, threads, full disks and misbehaving servers, for about an hour.

`make soak` runs it. `command` has the options, and `results` the files that it writes.
"""
