"""Loading checkpoints that others made or a crash cut short: what may be in them."""

import os
import zipfile
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Iterator, Optional

import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.runner.checkpoint import CheckpointLoader

from .types import ASKS


@contextmanager
def safe_loading() -> Iterator[None]:
    """Have mmengine load checkpoints by this module's loaders for as long as the context lasts.

    All of mmengine's and mmdet's own code that loads a file or an address then refuses what is damaged or
    asks for code to be run, on any version of torch. ``sasa-det`` and :class:`WholeCheckpointHook` do so.

    Examples:
        >>> with safe_loading():
        ...     CheckpointLoader.load_checkpoint('no/such.pth')
        Traceback (most recent call last):
            ...
        FileNotFoundError: checkpoint no/such.pth does not exist
    """
    ours = {'': load_from_local, 'http://': load_from_http, 'https://': load_from_http}
    theirs = {prefix: CheckpointLoader._schemes[prefix] for prefix in ours}
    try:
        for prefix, loader in ours.items():
            CheckpointLoader.register_scheme(prefix, loader, force=True)
        yield
    finally:
        for prefix, loader in theirs.items():
            CheckpointLoader.register_scheme(prefix, loader, force=True)


def load_from_local(filename, map_location=None) -> dict:
    """Load a checkpoint file, or say which and why not.

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
        checkpoint = torch.load(path, map_location, weights_only=ASKS)
    except UnpicklingError as error:
        raise ValueError(
            f'checkpoint {path} is refused, and nothing of it was run: {_what_it_asks(path, error)}'
        ) from None
    except (RuntimeError, EOFError) as error:
        reason = str(error).partition('\n')[0]
        raise ValueError(f'checkpoint {path} cannot be read: {reason}') from None
    return _without_config(checkpoint)


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


def _without_config(checkpoint):
    """Drop a text that mmdet 1.x and 2.x wrote, and that mmengine's ``Runner.resume`` would run as Python."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict):
        meta.pop('config', None)
    return checkpoint
