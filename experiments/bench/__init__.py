"""Benchmarks: speed and memory, measured in one run on one machine."""
