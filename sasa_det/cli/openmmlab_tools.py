"""How the tools in mmdet's and mmpretrain's packages are found and run, unchanged.

They are inside of the installed package (``mmdet/.mim/tools``).
"""

import runpy
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import List, Optional


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
    import torch

    pip = f'{sys.executable} -m pip install'
    if find_spec('mmpretrain') is None:
        return f"mmpretrain is not installed: {pip} 'sasa_det[pretrain]'"
    if find_spec('torchvision') is None:
        # torch 2.x came with torchvision 0.(x + 15). Without --no-deps pip might change torch.
        minor = int(torch.__version__.split('.')[1])
        return f"mmpretrain needs torchvision: {pip} --no-deps 'torchvision==0.{minor + 15}.*'"
    return None
