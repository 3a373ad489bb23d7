"""How the tools in mmdet's and mmpretrain's packages are found and run, unchanged.

They are inside of the installed package (``mmdet/.mim/tools``).
"""

import argparse
import ast
import os
import runpy
import sys
import traceback
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import List, Optional

from ..environment.stack import mend_command


def tools_folder(package: str = 'mmdet') -> Path:
    """Find the folder of a package's own tools.

    Args:
        package: 'mmdet' or 'mmpretrain'.

    Returns:
        The folder that holds ``train.py`` and ``test.py``.

    Raises:
        FileNotFoundError: The package was installed without them.

    Examples:
        >>> (tools_folder() / 'train.py').is_file()
        True
    """
    root = Path(find_spec(package).origin).parent
    # An installed package holds the tools itself; in a checkout they are beside the package.
    for folder in (root / '.mim' / 'tools', root.parent / 'tools'):
        if (folder / 'train.py').is_file():
            return folder
    raise FileNotFoundError(
        f'{package} at {root} has no tools/train.py; reinstall it with '
        f'{sys.executable} -m pip install --force-reinstall --no-deps {package}'
    )


def tool_path(name: str, package: str = 'mmdet') -> Path:
    """Find one of a package's tools.

    Args:
        name: Its path below ``tools``, without the suffix, such as ``analysis_tools/get_flops``.
        package: 'mmdet' or 'mmpretrain'.

    Raises:
        ValueError: There is no such tool; lists the existing ones.

    Examples:
        >>> tool_path('test').name
        'test.py'
    """
    folder = tools_folder(package)
    path = folder / f'{name}.py'
    if not path.is_file():
        known = sorted(
            str(tool.relative_to(folder).with_suffix('')) for tool in folder.rglob('*.py')
        )
        raise ValueError(f'{package} has no tool {name!r}; it has {", ".join(known)}')
    return path


def read_arguments(
    name: str, arguments: List[str], prog: str, package: str = 'mmdet'
) -> Optional[argparse.Namespace]:
    """Read a tool's arguments by its own function ``parse_args``, without what the tool imports.

    Args:
        name: As :func:`tool_path` takes it.
        arguments: The tool's own.
        prog: The program's name in help and errors.
        package: 'mmdet' or 'mmpretrain'.

    Returns:
        The arguments; values of config options are not read. None if the tool has no such function, or
        it needs the imports.

    Raises:
        ValueError: There is no such tool; lists the existing ones.
        SystemExit: The arguments are wrong, or ask for help.

    Examples:
        >>> read_arguments('test', ['a.py', 'a.pth', '--tta'], 'sasa-det test').checkpoint
        'a.pth'
    """
    path = tool_path(name, package)
    tree = ast.parse(path.read_text(), str(path))
    tree.body = [each for each in tree.body if getattr(each, 'name', '') == 'parse_args']
    parser = partial(argparse.ArgumentParser, prog=prog)
    scope = dict(
        argparse=SimpleNamespace(**{**vars(argparse), 'ArgumentParser': parser}),
        os=SimpleNamespace(environ=dict(os.environ)),  # some set LOCAL_RANK
        DictAction='store',
    )
    exec(compile(tree, str(path), 'exec'), scope)
    before, sys.argv = sys.argv, [prog, *arguments]
    try:
        return scope['parse_args']()
    except (AttributeError, KeyError, NameError):
        return None
    finally:
        sys.argv = before


def run_tool(name: str, arguments: List[str], package: str = 'mmdet') -> None:
    """Run a tool in this process, as a script.

    Args:
        name: As :func:`tool_path` takes it.
        arguments: The tool's own.
        package: 'mmdet' or 'mmpretrain'.

    Raises:
        ValueError: There is no such tool; lists the existing ones.
        Exception: Any error of the tool, after its traceback is printed.
    """
    path = str(tool_path(name, package))
    launcher = ' '.join(arguments).replace('--launcher=', '--launcher ').partition('--launcher ')[2]
    if launcher and not launcher.startswith('none'):
        from ..engine.distributed import join_processes

        join_processes()
    sys.argv = [path, *arguments]
    try:
        runpy.run_path(path, run_name='__main__')
    except Exception:
        # Developers need the traceback; the command adds its one-sentence message as the last line.
        traceback.print_exc()
        raise


def missing_for_mmpretrain() -> Optional[str]:
    """Give the command that installs mmpretrain or its missing dependency; None if none is missing.

    Examples:
        >>> missing_for_mmpretrain() is None or 'pip install' in missing_for_mmpretrain()
        True
    """
    if find_spec('mmpretrain') is None:
        return f"mmpretrain is not installed: {sys.executable} -m pip install 'sasa_det[pretrain]'"
    if find_spec('torchvision') is None:
        return f'mmpretrain needs torchvision: {mend_command("torchvision")}'
    return None
