"""Loading checkpoints that others made or a crash cut short: what may be in them."""

import os
import warnings
import zipfile
from pickle import UnpicklingError
from typing import Callable, List, Optional, Tuple, Union

import numpy as np
import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.runner import CheckpointLoader

# The kinds of number that end up in mmengine's logs: losses, metrics, times, counts.
_LOGGED_DTYPES = ('f2', 'f4', 'f8', 'i4', 'i8', '?')

# Older versions of torch know no list of types that may be loaded.
_ASKS = tuple(int(part) for part in torch.__version__.split('.')[:2]) >= (2, 6)


def allow_checkpoint_types() -> None:
    """Let ``torch.load`` read mmengine's checkpoints with ``weights_only`` left on.

    torch 2.6 and later load weights only, unless told which other types a file may hold.
    mmengine's checkpoints also hold its logs: HistoryBuffers made of numpy arrays. Just these are
    allowed, for this process; older versions of torch, which do not ask, are left alone.

    Examples:
        >>> allow_checkpoint_types()
        >>> torch.serialization.get_safe_globals() != []
        True
    """
    if _ASKS:
        torch.serialization.add_safe_globals(checkpoint_types())


@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename, map_location=None) -> dict:
    """Load a checkpoint file, or say which and why not; mmengine and mmdet load every file by this.

    Nothing that a file brings along is run, neither by pickle nor as a config.

    Args:
        filename: The file.
        map_location: As ``torch.load`` takes it.

    Returns:
        What the file holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is cut short, damaged, or asks for code to be run.

    Examples:
        >>> load_from_local('no/such.pth')
        Traceback (most recent call last):
            ...
        FileNotFoundError: checkpoint no/such.pth does not exist
    """
    path = os.path.expanduser(filename)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    damage = find_damage(path)
    if damage is not None:
        raise ValueError(f'checkpoint {path} {damage}')
    try:
        checkpoint = torch.load(path, map_location, weights_only=_ASKS)
    except UnpicklingError as error:
        raise ValueError(
            f'checkpoint {path} is refused, and nothing of it was run: {_what_it_asks(path, error)}'
        ) from None
    except (RuntimeError, EOFError) as error:
        reason = str(error).partition('\n')[0]
        raise ValueError(f'checkpoint {path} cannot be read: {reason}') from None
    return _without_config(checkpoint, path)


@CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), force=True)
def load_from_http(filename, map_location=None) -> dict:
    """Download a checkpoint to torch's cache, and load it as a file is loaded.

    Args:
        filename: Its address.
        map_location: As ``torch.load`` takes it.

    Returns:
        What it holds.

    Raises:
        ValueError: As :func:`load_from_local`.
    """
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    path = os.path.join(folder, os.path.basename(filename.partition('?')[0]))
    rank, _ = get_dist_info()
    if rank:
        barrier()
    if not os.path.isfile(path):  # by now also there for the others on the first one's machine
        os.makedirs(folder, exist_ok=True)
        # torch writes it under another name and renames it: what is there is whole.
        torch.hub.download_url_to_file(filename, path, progress=os.isatty(0))
    if not rank:
        barrier()
    return load_from_local(path, map_location)


def find_damage(path) -> Optional[str]:
    """Say what is wrong with a checkpoint file that was written halfway or damaged later.

    Reads all of it, and checks it against the checksums that torch writes.

    Args:
        path: The file.

    Returns:
        The end of a sentence that begins with the file's name, None if it is whole. A file of torch's
        format before 1.6 has no checksums, and counts as whole.

    Examples:
        >>> find_damage('no/such.pth')
        'does not exist'
    """
    if not os.path.isfile(path):
        return 'does not exist'
    with open(path, 'rb') as file:
        begin = file.read(2)
    if not begin:
        return 'is empty'
    if begin != b'PK':
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError):
        return 'is cut short: the end of the file is not there'
    return None if damaged is None else f'is damaged: the checksum of {damaged} in it is wrong'


def _what_it_asks(path, error: UnpicklingError) -> str:
    """Name what a refused file wanted to call."""
    names = []
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # whatever a hostile file provokes; the error itself says enough
        pass
    if names:
        return (
            f'it asks for {", ".join(sorted(names)[:5])}, and only tensors, plain values and '
            "mmengine's logs may be loaded"
        )
    # torch goes on with advice on how to load it all the same.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line.partition('WeightsUnpickler error: ')[2] for line in lines]
    return next(filter(None, said), lines[0] if lines else 'it is no pickle')


def _without_config(checkpoint, path):
    """Refuse a text that mmengine's ``Runner.resume`` would run as Python, and never writes."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict) and 'config' in meta:
        raise ValueError(
            f"checkpoint {path} is refused: its meta['config'] is a text that mmengine would run as "
            "Python when it resumes; mmengine itself writes meta['cfg'], which is not run"
        )
    return checkpoint


def checkpoint_types() -> List[Tuple[Union[type, Callable], str]]:
    """List what mmengine's checkpoints hold beside tensors and plain Python values.

    Returns:
        Pairs of a type or function and the name under which a checkpoint asks for it.

    Examples:
        >>> [name for _, name in checkpoint_types() if name.startswith('mmengine')]
        ['mmengine.logging.history_buffer.HistoryBuffer']
    """
    from mmengine.logging import HistoryBuffer

    dtypes = {type(np.dtype(code)) for code in _LOGGED_DTYPES}
    allowed = [
        (HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
        (_history_buffer_method, 'builtins.getattr'),
        (np.ndarray, 'numpy.ndarray'),
        (np.dtype, 'numpy.dtype'),
        *((dtype, f'{dtype.__module__}.{dtype.__qualname__}') for dtype in dtypes),
    ]
    # numpy 2 moved this module; a checkpoint names the one of the numpy that wrote it.
    for function in (_numpy_multiarray().scalar, _numpy_multiarray()._reconstruct):
        for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):
            allowed.append((function, f'{module}.{function.__name__}'))
    return allowed


def _history_buffer_method(owner: type, name: str) -> Callable:
    """Stand in for ``getattr``, which pickle calls to name HistoryBuffer's statistics.

    The real ``getattr`` would let a file reach far beyond them.
    """
    from mmengine.logging import HistoryBuffer

    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(owner, name)
    raise UnpicklingError(
        f'the checkpoint asks for attribute {name!r} of {owner!r}; only the statistics '
        "'min', 'max', 'current' and 'mean' of mmengine's HistoryBuffer may be loaded"
    )


def _numpy_multiarray():
    """The module numpy._core.multiarray, under its name in the installed numpy."""
    try:
        from numpy._core import multiarray
    except ImportError:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)
            from numpy.core import multiarray
    return multiarray
