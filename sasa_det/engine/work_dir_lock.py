"""One training at a time in a work_dir: two would overwrite each other's checkpoints."""

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import Dict, TextIO, Tuple

from mmengine.logging import print_log

NAME = '.training'
# By process and folder, as a forked process has a copy of this: the open file, and whether it is locked.
_HELD: Dict[Tuple[int, str], Tuple[TextIO, bool]] = {}


def hold_work_dir(work_dir) -> bool:
    """Hold a folder for this process, until :func:`release_work_dir` or the process's end, however it ends.

    Processes that it forks, such as those of a data loader, do not hold the folder. A process may hold one
    more than once. It is the main process of a distributed run that calls this, for all.

    Args:
        work_dir: The folder; made if missing.

    Returns:
        True if no other process can hold it now. False if the file system has no locks; this is logged once.

    Raises:
        RuntimeError: Another process holds it; names the process and its machine.
        OSError: The folder cannot be written to.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> hold_work_dir(folder)
        True
        >>> release_work_dir(folder)
    """
    place = os.path.realpath(work_dir)
    if (os.getpid(), place) in _HELD:
        return _HELD[os.getpid(), place][1]
    os.makedirs(place, exist_ok=True)
    file = open(Path(place, NAME), 'a+', encoding='utf-8')
    try:
        # Not flock: forked processes would hold that as well, and may outlive a killed one by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = _first_line(file) or 'another process'
            file.close()
            raise RuntimeError(
                f'work_dir {work_dir} is in use by {holder}: wait for its end, stop it, or choose another '
                'folder by --work-dir'
            ) from None
        locked = False
        print_log(
            f'work_dir {work_dir} cannot be locked ({error.strerror}): start no second training there',
            logger='current',
            level=logging.WARNING,
        )
    file.truncate(0)
    file.write(
        f'process {os.getpid()} on {socket.gethostname()}, since {time.strftime("%Y-%m-%d %H:%M:%S")}\n'
    )
    file.flush()
    _HELD[os.getpid(), place] = file, locked
    return locked


def release_work_dir(work_dir) -> None:
    """Let other processes train in a folder again; nothing is done if this process does not hold it.

    Args:
        work_dir: As for :func:`hold_work_dir`.

    Examples:
        >>> release_work_dir('no/such/folder')
    """
    # The file stays: to remove it would let two processes lock two files of its name.
    file, _ = _HELD.pop((os.getpid(), os.path.realpath(work_dir)), (None, False))
    if file is not None:
        file.close()


def _first_line(file: TextIO) -> str:
    file.seek(0)
    return ''.join(char for char in file.readline(200) if char.isprintable())
