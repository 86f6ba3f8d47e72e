"""Run-time support of a training run: processes, memory, random streams, interrupts and callback types."""
