"""Which settings does a sweep try? ``KEY=V1,V2`` of ``sasa-det compare --sweep``, read and combined."""

from itertools import product
from typing import Dict, Iterable, List, Mapping, Sequence
from urllib.parse import quote

from mmengine.config import Config


def read_sweep(sweep: Sequence[str]) -> List[Dict[str, str]]:
    """Combine all values of all keys.

    Args:
        sweep: ``KEY=V1,V2`` each. A comma in brackets belongs to a value.

    Returns:
        One value by key for each combination, the last key's changing fastest; without a sweep, one empty
        combination.

    Raises:
        ValueError: There is no ``=`` in one, or a key or one of its values is given twice or is empty.

    Examples:
        >>> read_sweep(['optimizer.lr=0.01,0.02', 'scale=(4,4)'])
        [{'optimizer.lr': '0.01', 'scale': '(4,4)'}, {'optimizer.lr': '0.02', 'scale': '(4,4)'}]
    """
    values = {}
    for text in sweep:
        key, equals, rest = text.partition('=')
        found = _split(rest)
        if not (equals and key and all(found)):
            raise ValueError(f'--sweep takes KEY=V1,V2, but got {text!r}')
        if key in values or len(set(found)) < len(found):
            raise ValueError(f'--sweep has a key or a value twice: {text!r}')
        values[key] = found
    return [dict(zip(values, each)) for each in product(*values.values())]


def as_cfg_options(setting: Mapping[str, str], config: Config, name: str) -> List[str]:
    """Write a combination as ``--cfg-options`` takes it.

    Args:
        setting: A value by key. A ``*`` in a key stands for each key at its place.
        config: The config to change, which must have the keys.
        name: The config's, for errors.

    Raises:
        ValueError: The config lacks a key; says what it has there.

    Examples:
        >>> config = Config(dict(keys=dict(query=dict(mult=0.1), key=dict(mult=0.1))))
        >>> as_cfg_options({'keys.*.mult': '0.3'}, config, 'mine')
        ['keys.query.mult=0.3', 'keys.key.mult=0.3']
    """
    return [
        f'{full}={value}' for key, value in setting.items() for full in _find(key, config, name)
    ]


def short_names(keys: Iterable[str]) -> Dict[str, str]:
    """Shorten keys to their last parts, as far as these differ.

    Args:
        keys: Dotted keys.

    Examples:
        >>> short_names(['optim_wrapper.optimizer.lr', 'train_dataloader.batch_size'])
        {'optim_wrapper.optimizer.lr': 'lr', 'train_dataloader.batch_size': 'batch_size'}
        >>> short_names(['model.neck.init', 'model.backbone.init'])
        {'model.neck.init': 'neck.init', 'model.backbone.init': 'backbone.init'}
    """
    parts = {key: key.split('.') for key in keys}
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {key: '.'.join(each[-length:]) for key, each in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {}


def describe(setting: Mapping[str, str]) -> str:
    """Write a combination for people, with short names.

    Examples:
        >>> describe({'optim_wrapper.optimizer.lr': '0.01', 'train_dataloader.batch_size': '8'})
        'lr=0.01, batch_size=8'
    """
    names = short_names(setting)
    return ', '.join(f'{names[key]}={value}' for key, value in setting.items())


def folder_name(setting: Mapping[str, str]) -> str:
    """Name the folder of a combination; '' without one.

    Examples:
        >>> folder_name({'model.init_cfg.checkpoint': 'a/b.pth'})
        'checkpoint=a%2Fb.pth'
    """
    return quote(describe(setting).replace(', ', ','), safe='=,()[]')


def _split(text: str) -> List[str]:
    """Split at the commas outside of brackets."""
    values, depth = [''], 0
    for char in text:
        depth += (char in '([') - (char in ')]')
        if char == ',' and depth == 0:
            values.append('')
        else:
            values[-1] += char
    return values


def _find(key: str, config: Config, name: str) -> List[str]:
    """Find the config's keys that one of a sweep stands for."""
    found = {'': config}
    for part in key.split('.'):
        below = {
            f'{path}.{child}'.lstrip('.'): each
            for path, node in found.items()
            for child, each in _children(node).items()
            if part in ('*', child)
        }
        if not below:
            path, node = next(iter(found.items()))
            has = ', '.join(sorted(_children(node))) or 'no keys'
            raise ValueError(
                f'--sweep: {name} has no {key!r}; there is no {part!r} in {path or "it"}, which has {has}'
            )
        found = below
    return list(found)


def _children(node) -> dict:
    if isinstance(node, (list, tuple)):
        return {str(place): each for place, each in enumerate(node)}
    return dict(node.items()) if hasattr(node, 'items') else {}
