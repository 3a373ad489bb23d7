"""Trained detectors for other runtimes: how they are exported, and whether the detections agree."""
