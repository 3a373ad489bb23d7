"""Can a path be read as a file, and how is it shown?"""

import os
from typing import Optional


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
