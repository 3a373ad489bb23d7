"""How a sub-command takes a detector: a checkpoint, and its config by file or name."""

import argparse
from pathlib import Path

from ..configs import find_config, read_config


def add_detector_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a trained detector to a sub-command.

    Args:
        parser: The sub-command's parser.
    """
    parser.add_argument('--checkpoint', required=True, help='weights, as training saves them')
    parser.add_argument(
        '--config',
        help='config file or name (default: the one beside the checkpoint, where training puts it)',
    )
    parser.add_argument('--device', help='such as cpu or cuda:0 (default: a GPU if there is one)')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config'
    )


def load(options: argparse.Namespace):
    """Load the detector that the arguments name.

    Args:
        options: The options of a parser that went through :func:`add_detector_arguments`.

    Returns:
        The detector, ready for ``mmdet.apis.inference_detector``.

    Raises:
        FileNotFoundError, ValueError: A file is missing or invalid; names it.
    """
    from .process import prepare

    prepare()
    import torch

    from ..checkpoints.detector import load_detector

    checkpoint = Path(options.checkpoint)
    if not checkpoint.is_file():
        raise FileNotFoundError(f'{checkpoint}: no such checkpoint')
    path = find_config(options.config) if options.config else _config_beside(checkpoint)
    config = read_config(path, options.cfg_options or ())
    device = options.device or ('cuda:0' if torch.cuda.is_available() else 'cpu')
    return load_detector(config, checkpoint, device)


def _config_beside(checkpoint: Path) -> Path:
    found = sorted(checkpoint.parent.glob('*.py'))
    if len(found) != 1:
        names = ', '.join(path.name for path in found) or 'none'
        raise ValueError(
            f'{checkpoint}: of configs beside it, one is needed, but there are: {names}. '
            'Name the config by --config'
        )
    return found[0]
