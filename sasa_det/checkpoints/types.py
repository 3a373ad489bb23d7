"""Which types may checkpoints hold beside tensors? Those of mmengine's logs, and no others."""

import math
from pickle import UnpicklingError
from typing import Callable, List, Tuple, Union

import numpy as np
import torch

# As numpy's pickles name them: booleans, integers and floats.
_CODES = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')

# Older versions of torch have no list of allowed types.
ASKS = torch.__version__ >= (2, 6)


def allow_checkpoint_types() -> None:
    """Let ``torch.load`` read mmengine's checkpoints with ``weights_only`` left on.

    torch 2.6 and later load weights only, unless other types are allowed. mmengine's checkpoints
    also hold its logs: HistoryBuffers made of numpy arrays. Only these types are allowed, for this
    process. Versions of torch without such a list are left alone. Where another part of the process allows
    numpy's own types, they load as without this function: torch's list has one entry for each name, so that
    each replacement here gives way to what it replaces.

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

    allowed = [
        (HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
        (_history_buffer_method, 'builtins.getattr'),
        (_Array, 'numpy.ndarray'),
        (_Dtype, 'numpy.dtype'),
        (_no_bytes, 'builtins.bytes'),
    ]
    # numpy 2 moved this module; a checkpoint uses the name of the numpy that wrote it.
    for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):
        allowed += [(_reconstruct, f'{module}._reconstruct'), (_scalar, f'{module}.scalar')]
    return allowed


def _others_allow(real) -> bool:
    """Tell whether someone else has put what is replaced here on torch's list."""
    entries = torch.serialization.get_safe_globals() if ASKS else ()
    return any(real is (entry[0] if isinstance(entry, tuple) else entry) for entry in entries)


class _Dtype:
    """Replace ``numpy.dtype``, which takes its flags and parts from the file.

    With a file's own flags numpy follows pointers that the file brings along, within the unpickler.
    """

    def __new__(cls, *args):
        return np.dtype(*args) if _others_allow(np.dtype) else super().__new__(cls)

    def __init__(self, code, align=False, copy=True) -> None:
        if not isinstance(code, str) or code not in _CODES:
            raise UnpicklingError(
                f'the checkpoint has numbers of type {code!r}, and may have {_CODES}'
            )
        self.real = np.dtype(code)

    def __setstate__(self, state) -> None:
        plain = isinstance(state, tuple) and all(x is None or type(x) in (int, str) for x in state)
        if not plain or state[:1] + state[2:] != (3, None, None, None, -1, -1, 0):
            raise UnpicklingError('the checkpoint has a type of numbers that numpy does not write')
        if state[1] not in ('<', '|', '='):
            raise UnpicklingError('the checkpoint has numbers of another byte order')

    def __reduce__(self):
        return self.real.__reduce__()


class _Array(np.ndarray):
    """Replace ``numpy.ndarray``: its content is the bytes of as many numbers as its shape has."""

    def __new__(cls, *args, **kwargs):
        raise UnpicklingError('the checkpoint makes an array in a way that numpy does not write')

    def __setstate__(self, state) -> None:
        _, shape, dtype, fortran, raw = state
        if isinstance(dtype, np.dtype):  # as others allow
            super().__setstate__(state)
            return
        dtype = _real(dtype)
        whole = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not whole or type(raw) is not bytes or len(raw) != math.prod(shape) * dtype.itemsize:
            raise UnpicklingError('the checkpoint has an array of another size than its content')
        super().__setstate__((1, shape, dtype, bool(fortran), raw))

    # Saved again, it is numpy's own.
    def __reduce__(self):
        return np.asarray(self).__reduce__()

    def __reduce_ex__(self, protocol):
        return np.asarray(self).__reduce_ex__(protocol)


def _reconstruct(kind, shape, code) -> np.ndarray:
    """Replace numpy's function of this name, by which its pickles begin an array."""
    if kind is np.ndarray:  # as others allow
        return np.empty(0).__reduce__()[0](kind, shape, code)
    if kind is not _Array:
        raise UnpicklingError(f'the checkpoint has an array of type {kind!r}')
    return np.ndarray.__new__(_Array, (0,), np.int8)


def _scalar(dtype, raw):
    """Replace numpy's function of this name, by which its pickles hold a single number."""
    if isinstance(dtype, np.dtype):  # as others allow
        return np.float64().__reduce__()[0](dtype, raw)
    dtype = _real(dtype)
    if type(raw) is not bytes or len(raw) != dtype.itemsize:
        raise UnpicklingError('the checkpoint has a number of another size than its type')
    return np.frombuffer(raw, dtype)[0]


def _no_bytes(*args) -> bytes:
    """Replace ``bytes``, which pickle calls without arguments for the content of an empty array."""
    if args and not _others_allow(bytes):
        raise UnpicklingError('the checkpoint has bytes that pickle does not write')
    return bytes(*args)


def _real(dtype) -> np.dtype:
    if not isinstance(dtype, _Dtype):
        raise UnpicklingError(f'the checkpoint has numbers of type {dtype!r}')
    return dtype.real


def _history_buffer_method(owner: type, name: str) -> Callable:
    """Replace ``getattr``, which pickle calls for HistoryBuffer's statistics.

    The real ``getattr`` would give a file access to far more.
    """
    from mmengine.logging.history_buffer import HistoryBuffer

    statistics = owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean')
    if statistics or _others_allow(getattr):
        return getattr(owner, name)
    raise UnpicklingError(
        f'the checkpoint asks for attribute {name!r} of {owner!r}; only the statistics '
        "'min', 'max', 'current' and 'mean' of mmengine's HistoryBuffer may be loaded"
    )
