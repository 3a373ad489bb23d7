"""What the tables of this folder's tools share: how they are written in Markdown."""

import math
import re
import statistics
from typing import Sequence


def format_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table.

    Args:
        titles: Of its columns.
        rows: The cells of each.

    Examples:
        >>> print(format_table(['config', 'AP'], [['tiny', '84.2']]))
        | config | AP |
        | --- | --- |
        | tiny | 84.2 |
    """
    lines = [titles, ['---'] * len(titles), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def as_mean(values: Sequence[float], digits: int = 1, sign: str = '') -> str:
    """Format a mean and, of more than one value, its standard error.

    Args:
        values: At least one.
        digits: After the point.
        sign: '+' for the sign of a mean that is not negative, too.

    Examples:
        >>> as_mean([40.0, 42.0]), as_mean([0.75], 2, '+')
        ('41.0 ± 1.0', '+0.75')
    """
    text = f'{statistics.fmean(values):{sign}.{digits}f}'
    if len(values) < 2:
        return text
    return f'{text} ± {standard_error(values):.{digits}f}'


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean.

    Args:
        values: At least two.

    Examples:
        >>> standard_error([40.0, 42.0])
        1.0
    """
    return statistics.stdev(values) / math.sqrt(len(values))


def put_between(text: str, begin: str, end: str, table: str, name) -> str:
    """Put a table into a document, between its markers.

    Args:
        text: The document.
        begin: The line before the table.
        end: The line after it.
        table: The table.
        name: The document's.

    Returns:
        The document with the table in the place of what was there.

    Raises:
        ValueError: A marker is missing; names the document and both.

    Examples:
        >>> put_between('a <b> old <e> z', '<b>', '<e>', 'new', 'a.md').split()
        ['a', '<b>', 'new', '<e>', 'z']
    """
    pattern = re.escape(begin) + '.*?' + re.escape(end)
    whole = f'{begin}\n\n{table}\n\n{end}'
    changed, found = re.subn(pattern, lambda _: whole, text, flags=re.DOTALL)
    if not found:
        raise ValueError(f'{name} must have the lines {begin!r} and {end!r}')
    return changed
