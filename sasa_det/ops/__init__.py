"""The computation: functions on tensors, without learned parameters."""

from .arguments import check_window
from .backends.choice import available_backends
from .local_attention import local_attention

__all__ = ['available_backends', 'check_window', 'local_attention']
