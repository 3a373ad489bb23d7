"""What sub-commands are given: configs, by file or name, and checkpoints."""

import argparse
import difflib
from pathlib import Path
from typing import Dict, Optional


def shipped_configs() -> Dict[str, Path]:
    """Find the configs that the package brings along, by name.

    Examples:
        >>> shipped_configs()['retinanet_sasa-tiny_digits'].name
        'retinanet_sasa-tiny_digits.py'
    """
    folder = Path(__file__).resolve().parents[1] / '.mim' / 'configs'
    # Through its target: Python's rglob does not look through a link.
    leaves = (path for path in folder.resolve().rglob('*.py') if '_base_' not in path.parts)
    return {path.stem: path for path in sorted(leaves)}


def find_config(name: str) -> Path:
    """Find a config by its file, or by its name among those that the package brings along.

    Args:
        name: A path, a name as `sasa-det configs` lists it, or ``sasa_det::folder/name.py``.

    Raises:
        FileNotFoundError: There is none; names those that are spelt alike.

    Examples:
        >>> find_config('retinanet_sasa-tiny_digits').name
        'retinanet_sasa-tiny_digits.py'
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    stem = Path(name.removeprefix('sasa_det::')).stem
    if stem in shipped and (name.startswith('sasa_det::') or name == stem):
        return shipped[stem]
    close = [other for other in shipped if stem in other][:3]
    close = close or difflib.get_close_matches(stem, shipped, n=3, cutoff=0.5)
    hint = f'; did you mean {" or ".join(close)}?' if close else ''
    raise FileNotFoundError(
        f'{name}: no such config; there is no such file, and `sasa-det configs` does not list it{hint}'
    )


def read_config(path: Path, cfg_options: Optional[dict] = None):
    """Read a config, and say so in one line where that fails.

    Args:
        path: Its file.
        cfg_options: What overrides its settings.

    Returns:
        mmengine's Config.

    Raises:
        ValueError: It cannot be read; names the file and says why.
    """
    from mmengine.config import Config

    try:
        config = Config.fromfile(path)
        config.merge_from_dict(cfg_options or {})
    except Exception as error:  # a config is a program, which may fail by any error
        raise ValueError(f'{path}: cannot be read as a config ({_kind(error)})') from error
    if 'model' not in config:
        raise ValueError(f'{path}: has no `model`, so it is no config of a detector')
    return config


def add_detector_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a sub-command take a trained detector.

    Args:
        parser: The sub-command's.
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
        options: Of a parser that :func:`add_detector_arguments` was called with.

    Returns:
        The detector, ready for ``mmdet.apis.inference_detector``.

    Raises:
        FileNotFoundError, ValueError: A file is missing or not what it should be; names it.
    """
    from .. import register

    register()
    import torch

    from ..checkpoints.detector import load_detector

    checkpoint = Path(options.checkpoint)
    if not checkpoint.is_file():
        raise FileNotFoundError(f'{checkpoint}: no such checkpoint')
    path = find_config(options.config) if options.config else _config_beside(checkpoint)
    config = read_config(path, parse_cfg_options(options.cfg_options))
    device = options.device or ('cuda:0' if torch.cuda.is_available() else 'cpu')
    return load_detector(config, checkpoint, device)


def parse_cfg_options(given: Optional[list]) -> dict:
    """Read ``key=value`` as mmdet's tools do.

    Raises:
        ValueError: There is no ``=`` in one.

    Examples:
        >>> parse_cfg_options(['model.test_cfg.score_thr=0.5'])
        {'model.test_cfg.score_thr': 0.5}
    """
    if not given:
        return {}
    from mmengine.config import DictAction

    for option in given:
        if '=' not in option:
            raise ValueError(f'--cfg-options takes key=value, but got {option!r}')
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args(['--cfg-options', *given]).cfg_options


def _config_beside(checkpoint: Path) -> Path:
    found = sorted(checkpoint.parent.glob('*.py'))
    if len(found) != 1:
        names = ', '.join(path.name for path in found) or 'none'
        raise ValueError(
            f'{checkpoint}: of configs beside it, one is needed, but there are: {names}. '
            'Name the config by --config'
        )
    return found[0]


def _kind(error: Exception) -> str:
    first = (str(error).strip() or 'no message').splitlines()[0]
    return f'{type(error).__name__}: {first}'
