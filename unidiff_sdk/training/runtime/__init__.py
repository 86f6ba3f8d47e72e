"""Processes, memory, random streams, interrupts and callbacks of a run."""
