"""``python -m sasa_det.cli.mmdet_tool train CONFIG ...`` runs a tool that mmdet's package brings along.

The tools lie deep in the installed package (``mmdet/.mim/tools``); they are run as they are, with
sasa_det imported first.
"""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import List


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
    # An installed package has them inside, a checkout of it beside the package.
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
        name: Its path below ``tools``, without the ending, such as ``analysis_tools/get_flops``.
        package: 'mmdet' or 'mmpretrain'.

    Raises:
        ValueError: There is no such tool; lists those there are.

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


def main(arguments: List[str], package: str = 'mmdet') -> None:
    """Run the command.

    Args:
        arguments: The tool's name, then its own arguments; none prints where the tools are.
        package: 'mmdet' or 'mmpretrain'.
    """
    if not arguments:
        print(tools_folder(package))
        return
    try:
        path = str(tool_path(arguments[0], package))
    except ValueError as error:
        sys.exit(str(error))
    launcher = ' '.join(arguments).replace('--launcher=', '--launcher ').partition('--launcher ')[2]
    if launcher and not launcher.startswith('none'):
        from ..engine.distributed import join_processes

        join_processes()
    sys.argv = [path, *arguments[1:]]
    runpy.run_path(path, run_name='__main__')


if __name__ == '__main__':
    main(sys.argv[1:])
