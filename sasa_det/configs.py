"""Which configs ship with the package, and how any config is read."""

import argparse
import difflib
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, Sequence

# mmengine expects a package's configs there; in a checkout it is a link to configs/.
CONFIGS = (Path(__file__).resolve().parent / '.mim' / 'configs').resolve()
# What configs for data of one's own inherit from.
COCO_FORMAT = 'sasa_det::quickstart/retinanet_sasa-tiny_coco-format.py'


def shipped_configs() -> Dict[str, Path]:
    """Find the configs that ship with the package, by name.

    Examples:
        >>> shipped_configs()['retinanet_sasa-tiny_digits'].name
        'retinanet_sasa-tiny_digits.py'
    """
    leaves = (
        path for path in CONFIGS.rglob('*.py') if '_base_' not in path.relative_to(CONFIGS).parts
    )
    return {path.stem: path for path in sorted(leaves)}


def find_config(name: str) -> Path:
    """Find a config by its file, or by its name among those that ship with the package.

    Args:
        name: A path, a name as `sasa-det configs` lists it, ``sasa_det::folder/name.py``, or likewise a config
            of another package, such as ``mmdet::retinanet/retinanet_r50_fpn_1x_coco.py``.

    Raises:
        FileNotFoundError: There is none; names those of similar spelling.

    Examples:
        >>> find_config('retinanet_sasa-tiny_digits').name
        'retinanet_sasa-tiny_digits.py'
    """
    if Path(name).is_file():
        return Path(name)
    package, _, file = name.rpartition('::')
    if package.isidentifier() and package != 'sasa_det':
        spec = find_spec(package)
        path = spec and spec.origin and Path(spec.origin).parent / '.mim' / 'configs' / file
        if path and path.is_file():
            return path
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


def read_config(path, cfg_options: Sequence[str] = ()):
    """Read a config and merge options into it; a failure is reported in one line.

    Args:
        path: Its file.
        cfg_options: ``key=value`` each, as mmdet's ``--cfg-options`` takes them.

    Returns:
        mmengine's Config.

    Raises:
        ValueError: It cannot be read, or an option has no ``=``; names the file and says why.

    Examples:
        >>> path = find_config('retinanet_sasa-tiny_digits')
        >>> read_config(path, ['train_cfg.max_epochs=2']).train_cfg.max_epochs
        2
    """
    from mmengine.config import Config

    options = parse_cfg_options(cfg_options)
    try:
        config = Config.fromfile(path)
        config.merge_from_dict(options)
    except Exception as error:  # a config is a program, which may raise any error
        reason = (str(error).strip() or 'no message').splitlines()[0]
        raise ValueError(
            f'{path}: cannot be read as a config ({type(error).__name__}: {reason})'
        ) from error
    if 'model' not in config:
        raise ValueError(f'{path}: has no `model`, so it is no config of a detector')
    return config


def describe_parts(model) -> str:
    """Say in words which parts of a detector attend, for a plot's legend.

    Args:
        model: A config's ``model``, made of this package's parts.

    Examples:
        >>> describe_parts(read_config(find_config('retinanet_sasa-tiny_digits')).model)
        'attention in all parts'
        >>> describe_parts(read_config(find_config('retinanet_tiny_digits')).model)
        'convolution'
    """
    names = dict(backbone='the backbone', neck='the FPN', bbox_head='the head')
    parts = [names[part] for part in names if model.get(part, {}).get('attn_cfg') is not None]
    stages = model.get('backbone', {}).get('attn_stages')
    if 'backbone' in parts and stages and not all(stages):
        attending = [str(number) for number, attends in enumerate(stages, 1) if attends]
        parts[0] = f'stages {", ".join(attending)} of the backbone'
    elif len(parts) == len(names):
        parts = ['all parts']
    if model.get('backbone', {}).get('stem', 'conv') != 'conv':
        parts.append('the stem')
    if not parts:
        return 'convolution'
    *first, last = parts
    return f'attention in {", ".join(first)}{" and " * bool(first)}{last}'


def parse_cfg_options(cfg_options: Sequence[str]) -> dict:
    """Read ``key=value`` as mmdet's ``--cfg-options`` does.

    Raises:
        ValueError: There is no ``=`` in one.

    Examples:
        >>> parse_cfg_options(['model.test_cfg.score_thr=0.5'])
        {'model.test_cfg.score_thr': 0.5}
    """
    from mmengine.config import DictAction

    for option in cfg_options:
        if '=' not in option:
            raise ValueError(f'--cfg-options takes key=value, but got {option!r}')
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    return parser.parse_args(['--cfg-options', *cfg_options] if cfg_options else []).cfg_options


def config_literal(value) -> str:
    """Write a value as Python reads it back, whatever the data says.

    mmengine's own formatting does not escape the keys of dicts. It also replaces `{{ ... }}` in a config's
    text, within strings too, so that no brace of a string may stand there as it is.

    Args:
        value: Dicts, lists, tuples, texts, numbers, booleans and None.

    Raises:
        ValueError: The value has parts of other types than a config has.

    Examples:
        >>> config_literal({'a': ('b',)})
        "{'a': ('b',)}"
    """
    if isinstance(value, dict):
        items = (f'{config_literal(key)}: {config_literal(item)}' for key, item in value.items())
        return f'{{{", ".join(items)}}}'
    if isinstance(value, (list, tuple)):
        ends = '()' if isinstance(value, tuple) else '[]'
        comma = ',' if isinstance(value, tuple) and len(value) == 1 else ''
        return f'{ends[0]}{", ".join(map(config_literal, value))}{comma}{ends[1]}'
    if isinstance(value, str):
        return repr(str(value)).replace('{', '\\x7b')
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    raise ValueError(f'a config cannot hold {value!r}')
