"""Trained detectors for other runtimes: how they are exported, and whether the detections agree."""

from .onnx_library import native_op_library

__all__ = ['native_op_library']
