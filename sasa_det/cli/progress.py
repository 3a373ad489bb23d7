"""How a command shows on stderr what it is doing."""

import sys
import time
from contextlib import contextmanager
from typing import Callable, Iterable, Iterator

EVERY = 10  # seconds between two counts, where there is no terminal to draw a bar in


@contextmanager
def step(text: str) -> Iterator[None]:
    """Show a step while it lasts: a spinner in a terminal, else a line.

    Args:
        text: What is done.

    Examples:
        >>> with step('Loading epoch_8.pth'):
        ...     pass
    """
    from rich.text import Text

    console = _console()
    if _draws(console):
        with console.status(Text(text)):
            yield
    else:
        print(text, file=sys.stderr, flush=True)
        yield


@contextmanager
def counting(total: int, text: str) -> Iterator[Callable[[int, str], None]]:
    """Show how many of some things are done: a bar in a terminal, else a line every few seconds.

    Args:
        total: How many there are.
        text: What is done with them.

    Returns:
        A context that gives a function of the number of those that are done, and of another text.

    Examples:
        >>> with counting(2, 'Converting') as count:
        ...     count(1)
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeRemaining

    console = _console()
    if _draws(console):
        columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, TimeRemaining(), console=console, transient=True) as progress:
            task = progress.add_task(text, total=total)
            yield lambda done, text=text: progress.update(task, completed=done, description=text)
        return
    print(f'{text}: 0 of {total}', file=sys.stderr, flush=True)
    last = time.monotonic()

    def count(done, text=text):
        nonlocal last
        if time.monotonic() - last >= EVERY:
            print(f'{text}: {done} of {total}', file=sys.stderr, flush=True)
            last = time.monotonic()

    yield count


@contextmanager
def counted(items: Iterable, total: int, text: str) -> Iterator[Iterable]:
    """Count items as they are taken, as :func:`counting` does.

    Args:
        items: The items.
        total: How many there are.
        text: What is done with them.

    Returns:
        A context that gives the items.

    Examples:
        >>> with counted('ab', 2, 'Detecting') as letters:
        ...     list(letters)
        ['a', 'b']
    """
    with counting(total, text) as count:

        def take():
            for done, item in enumerate(items, 1):
                yield item
                count(done)

        yield take()


def _console():
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def _draws(console) -> bool:
    # TERM=dumb, such as a shell within an editor: nothing can be drawn over.
    return console.is_terminal and not console.is_dumb_terminal
