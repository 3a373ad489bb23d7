"""How a sub-command takes a detector: a checkpoint, and its config by file or name."""

import argparse
import sys
from pathlib import Path

from ..configs import find_config, parse_cfg_options, read_config


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
    from ..checkpoints.written_config import config_beside

    checkpoint = Path(options.checkpoint)
    if not checkpoint.is_file():
        raise FileNotFoundError(f'{checkpoint}: no such checkpoint')
    cfg_options = options.cfg_options or ()
    if options.config:
        config = read_config(find_config(options.config), cfg_options)
    else:
        config = config_beside(checkpoint)
        config.merge_from_dict(parse_cfg_options(cfg_options))
        print(f'config: {config.filename}', file=sys.stderr)
    device = options.device or ('cuda:0' if torch.cuda.is_available() else 'cpu')
    return load_detector(config, checkpoint, device)
