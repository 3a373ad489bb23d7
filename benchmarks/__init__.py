"""Measurements of time and memory; run from the repository: ``python -m benchmarks.attention``."""
