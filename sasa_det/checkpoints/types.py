"""Which types may checkpoints hold beside tensors? Those of mmengine's logs, and no others."""

import warnings
from pickle import UnpicklingError
from typing import Callable, List, Tuple, Union

import numpy as np
import torch

# The dtypes of numbers in mmengine's logs: losses, metrics, times, counts.
_LOGGED_DTYPES = ('f2', 'f4', 'f8', 'i4', 'i8', '?')

# Older versions of torch have no list of allowed types.
ASKS = tuple(int(part) for part in torch.__version__.split('.')[:2]) >= (2, 6)


def allow_checkpoint_types() -> None:
    """Let ``torch.load`` read mmengine's checkpoints with ``weights_only`` left on.

    torch 2.6 and later load weights only, unless other types are allowed. mmengine's checkpoints
    also hold its logs: HistoryBuffers made of numpy arrays. Only these types are allowed, for this
    process. Versions of torch without such a list are left alone.

    Examples:
        >>> allow_checkpoint_types()
        >>> torch.serialization.get_safe_globals() != []
        True
    """
    if ASKS:
        torch.serialization.add_safe_globals(checkpoint_types())


def checkpoint_types() -> List[Tuple[Union[type, Callable], str]]:
    """List the types in mmengine's checkpoints beside tensors and plain Python values.

    Returns:
        Pairs of a type or function and the name under which a checkpoint asks for it.

    Examples:
        >>> [name for _, name in checkpoint_types() if name.startswith('mmengine')]
        ['mmengine.logging.history_buffer.HistoryBuffer']
    """
    from mmengine.logging.history_buffer import HistoryBuffer

    dtypes = {type(np.dtype(code)) for code in _LOGGED_DTYPES}
    allowed = [
        (HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
        (_history_buffer_method, 'builtins.getattr'),
        (np.ndarray, 'numpy.ndarray'),
        (np.dtype, 'numpy.dtype'),
        *((dtype, f'{dtype.__module__}.{dtype.__qualname__}') for dtype in dtypes),
    ]
    # numpy 2 moved this module; a checkpoint uses the name of the numpy that wrote it.
    for function in (_numpy_multiarray().scalar, _numpy_multiarray()._reconstruct):
        for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):
            allowed.append((function, f'{module}.{function.__name__}'))
    return allowed


def _history_buffer_method(owner: type, name: str) -> Callable:
    """Replace ``getattr``, which pickle calls for HistoryBuffer's statistics.

    The real ``getattr`` would give a file access to far more.
    """
    from mmengine.logging.history_buffer import HistoryBuffer

    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(owner, name)
    raise UnpicklingError(
        f'the checkpoint asks for attribute {name!r} of {owner!r}; only the statistics '
        "'min', 'max', 'current' and 'mean' of mmengine's HistoryBuffer may be loaded"
    )


def _numpy_multiarray():
    """Import numpy._core.multiarray, under its name in the installed numpy."""
    try:
        from numpy._core import multiarray
    except ImportError:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)
            from numpy.core import multiarray
    return multiarray
