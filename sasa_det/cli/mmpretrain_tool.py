"""``python -m sasa_det.cli.mmpretrain_tool train CONFIG ...`` runs a tool that mmpretrain brings along.

As :mod:`sasa_det.cli.mmdet_tool` does for mmdet.
"""

import sys
from importlib.util import find_spec
from typing import List, Optional

import torch

from .mmdet_tool import main


def what_is_missing() -> Optional[str]:
    """Say by which command to install what mmpretrain lacks, or give None.

    Examples:
        >>> what_is_missing() is None or 'pip install' in what_is_missing()
        True
    """
    pip = f'{sys.executable} -m pip install'
    if find_spec('mmpretrain') is None:
        return f"mmpretrain is not installed: {pip} 'sasa_det[pretrain]'"
    if find_spec('torchvision') is None:
        # torch 2.x came with torchvision 0.(x + 15). With its dependencies pip might change torch.
        minor = int(torch.__version__.split('.')[1])
        return f"mmpretrain needs torchvision: {pip} --no-deps 'torchvision==0.{minor + 15}.*'"
    return None


def run(arguments: List[str]) -> None:
    """Run the command.

    Args:
        arguments: The tool's name, then its own arguments; none prints where the tools are.
    """
    missing = what_is_missing()
    if missing:
        sys.exit(missing)
    main(arguments, 'mmpretrain')


if __name__ == '__main__':
    run(sys.argv[1:])
