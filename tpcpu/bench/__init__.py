"""Measuring a loaded model: how fast it answers, and how fast this machine could at best.

Stands on the engine, which knows nothing of being measured. Everything here is collective: all ranks measure together,
rank 0 has the answer.
"""
