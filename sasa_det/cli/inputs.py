"""How a sub-command takes a detector: a checkpoint, and its config by file or name."""

import argparse
import sys
from pathlib import Path
from typing import Optional

from ..configs import find_config, parse_cfg_options, read_config
from .progress import step


def add_detector_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a trained detector to a sub-command.

    Args:
        parser: The sub-command's parser.
    """
    parser.add_argument('--checkpoint', required=True, help='weights, as training saves them')
    parser.add_argument(
        '--config',
        help='config file or name (default: the file beside the checkpoint that training put there)',
    )
    parser.add_argument('--device', help='such as cpu or cuda:0 (default: a GPU if there is one)')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config'
    )


def find_checkpoint(name: str) -> str:
    """Check that a checkpoint is there, where it is a file of this machine.

    Args:
        name: Its file; or its address, which mmengine reads.

    Raises:
        FileNotFoundError: There is no such file.

    Examples:
        >>> find_checkpoint('nowhere.pth')
        Traceback (most recent call last):
        FileNotFoundError: nowhere.pth: no such checkpoint
    """
    if '://' not in name and not Path(name).is_file():
        raise FileNotFoundError(f'{name}: no such checkpoint')
    return name


def find_detector(options: argparse.Namespace) -> Optional[Path]:
    """Check that a detector's files are there, before anything slow is imported.

    Args:
        options: As for :func:`load`.

    Returns:
        The config; None if the arguments name none.

    Raises:
        FileNotFoundError: There is no such config or checkpoint.
    """
    find_checkpoint(options.checkpoint)
    return find_config(options.config) if options.config else None


def load(options: argparse.Namespace):
    """Load the detector that the arguments name.

    Args:
        options: The options of a parser that went through :func:`add_detector_arguments`.

    Returns:
        The detector, ready for ``mmdet.apis.inference_detector``.

    Raises:
        FileNotFoundError, ValueError: A file is missing or invalid; names it.
    """
    config_file = find_detector(options)
    checkpoint, cfg_options = Path(options.checkpoint), options.cfg_options or ()
    with step(f'Loading {checkpoint}'):
        from .process import prepare

        prepare()
        import torch

        from ..checkpoints.detector import load_detector
        from ..checkpoints.written_config import config_beside

        if config_file:
            config = read_config(config_file, cfg_options)
        else:
            config = config_beside(checkpoint)
            config.merge_from_dict(parse_cfg_options(cfg_options))
        device = options.device or ('cuda:0' if torch.cuda.is_available() else 'cpu')
        model = load_detector(config, checkpoint, device)
    print(f'detector: {checkpoint} with {config.filename} on {device}', file=sys.stderr)
    return model
