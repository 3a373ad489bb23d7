"""How untrusted or truncated checkpoints are loaded: what they may hold, and what is refused."""

import difflib
import hashlib
import os
import re
import tarfile
import warnings
import zipfile
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Callable, Dict, Iterator, Optional

import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.fileio import get_file_backend
from mmengine.runner.checkpoint import (
    CheckpointLoader,
    _get_mmengine_home,
    _process_mmcls_checkpoint,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from ..environment.stack import mend_command
from ..files import find_path_problem
from . import restricted_pickle
from .types import ASKS

_TORCHVISION = ('torchvision', 'modelzoo')
_OPENMMLAB = ('open-mmlab', 'openmmlab')
_LOCAL_FILE = (
    'a local file is named by --cfg-options model.backbone.init_cfg.checkpoint=/path/resnet50.pth'
)


@contextmanager
def safe_loading() -> Iterator[None]:
    """Have mmengine load checkpoints with this module's loaders inside of the context.

    mmengine's and mmdet's own loading of a file, a URL or a name of a zoo then refuses checkpoints that are
    damaged or ask for code to be run. This holds for any version of torch. ``sasa-det`` and
    :class:`WholeCheckpointHook` use it. Places that others have registered with mmengine are read by their
    own loaders. So are the folders of DeepSpeed and ColossalAI, which mmengine does not read itself.

    Examples:
        >>> with safe_loading():
        ...     CheckpointLoader.load_checkpoint('no/such.pth')
        Traceback (most recent call last):
            ...
        FileNotFoundError: checkpoint no/such.pth does not exist
    """
    ours = _loaders()
    theirs = {prefix: CheckpointLoader._schemes[prefix] for prefix in ours}
    try:
        for prefix, loader in ours.items():
            CheckpointLoader.register_scheme(prefix, loader, force=True)
        yield
    finally:
        for prefix, loader in theirs.items():
            CheckpointLoader.register_scheme(prefix, loader, force=True)


def _loaders() -> Dict[str, Callable]:
    """A loader of this module for each prefix of mmengine's own."""
    ours = {'': load_from_local, 'http://': load_from_http, 'https://': load_from_http}
    ours |= {f'{zoo}://': load_from_zoo for zoo in (*_TORCHVISION, *_OPENMMLAB, 'mmcls')}
    ours |= {rf'(\S+\:)?{store}://': load_from_store for store in ('s3', 'petrel')}
    return {
        prefix: ours.get(prefix, load_from_elsewhere)
        for prefix, loader in CheckpointLoader._schemes.items()
        # Those that a user registered stay as they are.
        if prefix in ours or loader.__module__ == CheckpointLoader.__module__
    }


def load_from_local(filename, map_location=None) -> dict:
    """Load a checkpoint file, or raise an error with the file and the reason.

    No code from the file is run, neither by pickle nor as a config. Types that the process has put on torch's
    list, by ``torch.serialization.add_safe_globals``, are loaded, too.

    Args:
        filename: The file.
        map_location: As ``torch.load`` takes it.

    Returns:
        The file's content.

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
    damage = find_damage(path)
    if damage is not None:
        raise (ValueError if os.path.exists(path) else FileNotFoundError)(
            f'checkpoint {path} {damage}'
        )
    try:
        with warnings.catch_warnings():
            # Of the pickle's protocol: torch asks for an issue where this function refuses or reads.
            warnings.filterwarnings('ignore', message='Detected pickle protocol')
            how = dict(weights_only=True) if ASKS else dict(pickle_module=restricted_pickle)
            checkpoint = torch.load(path, map_location, **how)
    except UnpicklingError as error:
        raise ValueError(
            f'checkpoint {path} is refused, and nothing of it was run: {_what_it_asks(path, error)}'
        ) from None
    except Exception as error:  # damage may show as an error of any kind
        reason = str(error).partition('\n')[0] or type(error).__name__
        if not isinstance(error, (RuntimeError, OSError)):  # such as a number that is in no table
            reason = f'torch did not write it, or it is damaged ({type(error).__name__}: {reason})'
        raise ValueError(f'checkpoint {path} cannot be read: {reason}') from None
    return _without_config(checkpoint)


def load_from_http(filename, map_location=None) -> dict:
    """Download a checkpoint to torch's cache, and load it as a file is loaded.

    Args:
        filename: Its URL.
        map_location: As ``torch.load`` takes it.

    Returns:
        The checkpoint's content.

    Raises:
        ValueError: The URL names no file. Or as :func:`load_from_local`.
        OSError: It cannot be downloaded; says where a file of one's own goes.
    """
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    name = os.path.basename(filename.partition('?')[0])
    if name in ('', '.', '..'):
        raise ValueError(f'checkpoint {filename} names no file')
    if not re.search(r'-[0-9a-f]{8,}\.\w+$', name):
        # No checksum in it, as torchvision and OpenMMLab write: other addresses may have a file of its name.
        name = f'{hashlib.sha256(filename.encode()).hexdigest()[:16]}-{name}'
    path = os.path.join(folder, name)
    rank, _ = get_dist_info()
    if rank:
        barrier()
    if not os.path.isfile(path):  # other ranks on the first one's machine find it here
        os.makedirs(folder, exist_ok=True)
        # torch downloads under another name, then renames: a file that exists is whole.
        try:
            torch.hub.download_url_to_file(filename, path, progress=os.isatty(0))
        except OSError as error:  # a URLError or a timeout, or a folder that cannot be written to
            raise OSError(
                f'checkpoint {filename} cannot be downloaded to {path} ({error}); without a network, put the '
                f"file there yourself; for a backbone's weights, {_LOCAL_FILE}"
            ) from None
    if not rank:
        barrier()
    return load_from_local(path, map_location)


def load_from_zoo(filename, map_location=None) -> dict:
    """Find a name of torchvision's or OpenMMLab's in their tables, and load that checkpoint.

    Args:
        filename: Such as ``torchvision://resnet50``, ``open-mmlab://detectron2/resnet50_caffe`` or
            ``mmcls://mobilenet_v2``.
        map_location: As ``torch.load`` takes it.

    Returns:
        The checkpoint's content; of ``mmcls``, the backbone's weights alone.

    Raises:
        ImportError: torchvision's table needs torchvision; says what to do without it.
        ValueError: There is no such name. Or as :func:`load_from_http`.
    """
    zoo, _, name = filename.partition('://')
    if zoo == 'mmcls':
        urls = get_mmcls_models()
    elif zoo in _OPENMMLAB:
        urls = get_external_models()
        name = get_deprecated_model_names().get(name, name)
    else:
        try:
            urls = get_torchvision_models()
        except ImportError as error:
            install = mend_command('torchvision')
            raise ImportError(
                f'{filename} needs torchvision ({error}): {install}; without it, '
                f'model.backbone.init_cfg=None trains from random weights, and {_LOCAL_FILE}'
            ) from None
    if name not in urls:
        near = difflib.get_close_matches(name, urls) or sorted(urls)[:3]
        raise ValueError(
            f'checkpoint {filename}: {zoo} has no {name!r}; it has {", ".join(near)}, ...'
        )
    if '://' in urls[name]:
        checkpoint = load_from_http(urls[name], map_location)
    else:
        checkpoint = load_from_local(os.path.join(_get_mmengine_home(), urls[name]), map_location)
    return _process_mmcls_checkpoint(checkpoint) if zoo == 'mmcls' else checkpoint


def load_from_store(filename, map_location=None) -> dict:
    """Copy a checkpoint from an object store to a temporary file, and load it as a file is loaded.

    Args:
        filename: Such as ``s3://bucket/epoch_12.pth``.
        map_location: As ``torch.load`` takes it.

    Returns:
        The checkpoint's content.

    Raises:
        ImportError: mmengine's client of the store is missing.
        ValueError: As :func:`load_from_local`.
    """
    backend = get_file_backend(filename, backend_args={'backend': 'petrel'})
    with backend.get_local_path(filename) as path:
        try:
            return load_from_local(str(path), map_location)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), filename)) from None


def load_from_elsewhere(filename, map_location=None) -> dict:
    """Refuse a place that mmengine would read without restrictions.

    Args:
        filename: Such as ``pavi://model``.
        map_location: Unused.

    Raises:
        ValueError: Always; says what to do.
    """
    prefix = filename.partition('://')[0]
    raise ValueError(
        f"checkpoint {filename} is refused: mmengine's loader of {prefix}:// may run code from it; download it "
        'and name the file'
    )


def find_damage(path) -> Optional[str]:
    """Describe the damage of a checkpoint file that was written halfway or damaged later.

    Reads the whole file, and verifies the checksums that torch wrote.

    Args:
        path: The file.

    Returns:
        The end of a sentence that begins with the file's name; None if the file is whole. Files in
        torch's format before 1.6 have no checksums, and count as whole. TorchScript archives and
        tar files, torch's format of 2016, are no checkpoints here: torch would run or extract them.

    Examples:
        >>> find_damage('no/such.pth')
        'does not exist'
    """
    problem = find_path_problem(path)
    if problem is not None:
        return problem
    with open(path, 'rb') as file:
        begin = file.read(2)
    if not begin:
        return 'is empty'
    if begin != b'PK':
        return 'is a tar file' if tarfile.is_tarfile(path) else None
    try:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith('/constants.pkl') for name in archive.namelist()):
                return 'is a program in TorchScript'
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    # A few megabytes may unpack to more than the memory.
                    return f'was not written by torch: {entry.filename} in it is compressed'
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError):
        return 'is cut short: the end of the file is not there'
    except Exception as error:  # of a version or an encryption that torch does not write
        return f'was not written by torch: {error}'
    return None if damaged is None else f'is damaged: the checksum of {damaged} in it is wrong'


def _what_it_asks(path, error: UnpicklingError) -> str:
    """Name the globals that a refused file asks for."""
    names = []
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a hostile file may raise anything; the first error says enough
        pass
    if names:
        return (
            f'it asks for {", ".join(sorted(names)[:5])}, and only tensors, plain values and '
            "mmengine's logs may be loaded"
        )
    # Around the reason, torch advises how to load the file anyway; that is dropped.
    reason = (
        str(error).partition('WeightsUnpickler error:')[2].partition('Check the documentation')[0]
    )
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    if not lines or lines[0].startswith('Unsupported operand'):
        return 'it is no file that torch.save writes'
    return lines[0]


def _without_config(checkpoint):
    """Drop the config text of mmdet 1.x and 2.x, which mmengine's ``Runner.resume`` would run as Python."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict):
        meta.pop('config', None)
    return checkpoint
