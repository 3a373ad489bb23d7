"""Trained convolutional models become attention ones."""

from .conversion import Conversion, convert

__all__ = ['Conversion', 'convert']
