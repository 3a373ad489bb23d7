"""Trained detectors for other runtimes: what is exported, how, and whether it still says the same."""
