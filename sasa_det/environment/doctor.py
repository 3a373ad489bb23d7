"""``sasa-det doctor`` shows what sasa_det stands on here, and what is wrong with it.

It works with a stack so broken that ``import sasa_det`` fails.
"""

import argparse
import platform
import sys
from typing import Dict, List, Optional, Sequence, Tuple

from ..version import __version__
from .stack import MINIMUM_PYTHON, Problem, find_problems, installed_version, is_fork, supported

Row = Tuple[str, str, str, str]


def examine() -> Tuple[List[Row], List[Problem], Dict[str, Optional[str]]]:
    """Examine every package and every backend of the operator.

    Returns:
        Rows of name, version, accepted versions and state; the problems; the backends of the
        operator. Each backend has None or the reason why it cannot be used.

    Examples:
        >>> rows, problems, backends = examine()
        >>> rows[0][0], problems, backends['reference']
        ('python', [], None)
    """
    problems = find_problems(imports=True)
    states = {problem.name: 'wrong' for problem in problems}
    accepted = {'python': '>=' + '.'.join(map(str, MINIMUM_PYTHON)), **supported()}
    if 'opencv-python' in states:
        accepted['opencv-python'] = 'one that imports'
    rows = []
    for name, specifier in accepted.items():
        version = platform.python_version() if name == 'python' else installed_version(name)
        good = 'ok, its ops import' if name.endswith('mmcv') else 'ok'
        rows.append((name, version or 'missing', specifier, states.get(name, good)))
    backends, found = examine_operator()
    # It needs torch, so it is no problem of its own where that has one.
    if found is not None and 'torch' not in states:
        problems.append(
            Problem(
                'sasa_det.ops',
                found,
                "one that imports and has a backend for 'auto'",
                f'{sys.executable} -m pip install --force-reinstall --no-deps --no-build-isolation '
                'path/to/sasa_det',
            )
        )
    return rows, problems, backends


def examine_operator() -> Tuple[Dict[str, Optional[str]], Optional[str]]:
    """Examine the operator: whether it imports, and which backends it has.

    Returns:
        Each backend with None or the reason why it cannot be used; and what is wrong with the operator,
        None if nothing is.

    Examples:
        >>> examine_operator()[1] is None
        True
    """
    try:
        from ..ops import available_backends
        from ..ops.backends.choice import FUSED

        backends = available_backends()
    except Exception as error:  # the operator needs torch, which may itself be broken
        return {'all': f'sasa_det.ops does not import: {error}'}, f'an import that fails: {error}'
    reasons = [backends[name] for name in FUSED]
    return backends, "no backend for 'auto': " + '; '.join(reasons) if all(reasons) else None


def describe_backend(name: str, why_not: Optional[str]) -> str:
    """Say whether a backend can be used; the one of CUDA C++ is first compared with another backend.

    Args:
        name: The backend.
        why_not: Why it cannot be used; None if it can.

    Examples:
        >>> describe_backend('native', None)
        'available'
    """
    if why_not is not None:
        return f'no: {why_not}'
    if name != 'cuda':
        return 'available'
    from ..ops.backends.cuda import distrust_layer

    try:
        distrust = distrust_layer()
    except RuntimeError as error:  # such as a GPU without free memory
        return f'available, but it could not be compared with another backend: {error}'
    if distrust is None:
        return "available; for the paper's layer it agrees with another backend"
    return f"available, but 'auto' does not take it for the paper's layer: {distrust}"


def show(rows: List[Row], problems: List[Problem], backends: Dict[str, Optional[str]]) -> None:
    """Print the results of ``examine``, as tables if rich is installed.

    Args:
        rows: Name, version, accepted versions and state of each package.
        problems: Each problem found.
        backends: Each backend of the operator with None or the reason why it cannot be used.
    """
    family = 'the onedl fork' if is_fork() else "OpenMMLab's packages"
    _table(
        f'sasa_det {__version__} stands on {family}',
        ('package', 'version', 'accepted', 'state'),
        rows,
    )
    states = [(name, describe_backend(name, why)) for name, why in backends.items()]
    _table('backends of the operator', ('backend', 'state'), states)
    for problem in problems:
        print(problem)
    print('Something is wrong, see above.' if problems else 'All is well.')


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command.

    Args:
        arguments: The command line's, without the program's name.

    Returns:
        The exit status: 1 if there is a problem.
    """
    parser = argparse.ArgumentParser(prog='sasa-det doctor', description=__doc__)
    parser.add_argument('--quiet', action='store_true', help='print problems only, for scripts')
    options = parser.parse_args(arguments)
    rows, problems, backends = examine()
    if options.quiet:
        for problem in problems:
            print(problem, file=sys.stderr)
    else:
        show(rows, problems, backends)
    return 1 if problems else 0


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with rich if it is installed, else plainly."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        print(title)
        for row in (header, *rows):
            print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        print()
        return
    table = Table(*header, title=title, title_justify='left')
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
