"""Can a path be read as a file, how is it shown, and how is it written so that it is always whole?"""

import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Optional


def find_path_problem(path) -> Optional[str]:
    """Say why a path cannot be read as a file.

    To open a named pipe waits for a writer, which may never come; a device may have no end.

    Args:
        path: The path.

    Returns:
        The end of a sentence that begins with the path; None if it is a regular file or a link to one.

    Examples:
        >>> find_path_problem('no/such.json')
        'does not exist'
        >>> find_path_problem('/dev/null')
        'is no regular file'
    """
    if os.path.isfile(path):
        return None
    return 'is no regular file' if os.path.exists(path) else 'does not exist'


def printable(path) -> str:
    """Escape what a terminal would not print but act on, or could not encode.

    Args:
        path: A path that comes from data.

    Examples:
        >>> print(printable('a\x1b[2J.jpg'))
        a\\x1b[2J.jpg
    """
    return ''.join(
        char if char.isprintable() else char.encode('unicode_escape').decode() for char in str(path)
    )


@contextmanager
def written_whole(path, *, partial=None, sync: bool = False) -> Iterator[Path]:
    """Write a file or a folder under another name, which is renamed once all is written.

    Under its own name it is always the old one or the new one, wherever the process stops.

    Args:
        path: The file; or the folder, which must not exist yet.
        partial: The other name, in the same file system. What is there is removed. By default it is a new
            name beside the path, so that two processes may write the same file.
        sync: For files: wait for the disk before the renaming, so that the file also survives a power cut.

    Yields:
        Path to write to. After an error it is removed.

    Raises:
        OSError: It cannot be written or renamed.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with written_whole(folder / 'numbers.txt') as path:
        ...     _ = path.write_text('1 2 3')
        >>> [path.name for path in folder.iterdir()]
        ['numbers.txt']
    """
    path = Path(path)
    if partial is None:
        partial = path.with_name(f'{path.name}.{secrets.token_hex(4)}.partial')
    _remove(partial)
    try:
        yield partial
        if sync:
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise


def write_whole(path, content: bytes) -> None:
    """Write a file by :func:`written_whole`, and wait for the disk.

    Args:
        path: The file.
        content: Its content.

    Raises:
        OSError: It cannot be written, as on a full disk; says how much is free. The previous file is kept.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), 'numbers.txt')
        >>> write_whole(path, b'1 2 3')
        >>> path.read_bytes()
        b'1 2 3'
    """
    path = Path(path)
    try:
        with written_whole(path, sync=True) as partial:
            partial.write_bytes(content)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno,
            f'could not be written ({error.strerror}): it has {len(content) / 1e6:.1f} MB, and '
            f'{free / 1e6:.1f} MB are free there',
            str(path),
        ) from None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
