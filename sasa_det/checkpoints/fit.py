"""Does a checkpoint hold a model's weights? If not, what differs, and which config would fit?"""

from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Tuple, Union

import torch
from mmengine.config import Config
from torch import nn

from ..configs import CONFIGS
from .loading import load_from_local
from .written_config import configs_beside, plain, written_config

Shapes = Dict[str, Tuple[int, ...]]

_SHOWN = 8


def describe_misfit(
    model: nn.Module,
    checkpoint: Mapping,
    model_cfg: Optional[Mapping] = None,
    *,
    path: Union[None, str, Path] = None,
    search: bool = True,
) -> str:
    """Say how a checkpoint's weights differ from a model's, and which config would fit.

    Args:
        model: The model to load the checkpoint into.
        checkpoint: The file's content: mmengine's dict, or the weights alone.
        model_cfg: The config's ``model``. If given, options that differ from those of the
            checkpoint's own config are named.
        path: The checkpoint's file, if it has one: the config that training wrote beside it is named.
        search: If there is none, search for a config of this package that fits, which takes seconds.

    Returns:
        Some lines of text; empty if the weights are exactly the model's, in its shapes.

    Raises:
        ValueError: It holds no weights by name.

    Examples:
        >>> print(describe_misfit(nn.Linear(2, 3), {'weight': torch.zeros(3, 4)}, search=False))
        1 weight has another shape:
          weight: (3, 4) in the checkpoint, (3, 2) in the model
        1 weight is not in the checkpoint: bias
    """
    found = shapes(_weights(checkpoint, path))
    expected = shapes(model.state_dict())
    lines = _differences(found, expected)
    if not lines:
        return ''
    written_with = (written_config(checkpoint) or {}).get('model')
    if model_cfg is not None and written_with is not None:
        options = list(_differing_options(written_with, model_cfg, 'model'))
        if options:
            lines.append('The config that the checkpoint was written with has')
            lines += [f'  {option}' for option in options[:_SHOWN]]
    beside = [
        config.filename
        for config in (configs_beside(path, checkpoint) if path is not None else ())
        if plain(config.model) != plain(model_cfg)
    ]
    if beside:
        lines.append(f'It was trained with the config beside it: {" or ".join(beside)}')
    elif search:
        fitting = find_fitting_config(found)
        lines.append(
            'No config of sasa_det fits it.' if fitting is None else f'It fits sasa_det::{fitting}'
        )
    return '\n'.join(lines)


def require_fit(
    model: nn.Module, checkpoint: Mapping, path, model_cfg: Optional[Mapping], search: bool = True
) -> None:
    """Raise if a checkpoint does not hold exactly a model's weights.

    Args:
        model, checkpoint, path, model_cfg, search: As for :func:`describe_misfit`.

    Raises:
        ValueError: It does not; says what differs, and which config would fit.

    Examples:
        >>> require_fit(nn.Linear(2, 3), nn.Linear(2, 3).state_dict(), 'a.pth', None)
    """
    misfit = describe_misfit(model, checkpoint, model_cfg, path=path, search=search)
    if misfit:
        raise ValueError(f"checkpoint {path} is not of this config's model. {misfit}")


def require_state(checkpoint: Mapping, path) -> None:
    """Raise if a run cannot go on from a checkpoint, since it holds weights alone.

    Args:
        checkpoint: The file's content.
        path: The file.

    Raises:
        ValueError: It lacks what a run goes on from; names it.

    Examples:
        >>> require_state({'meta': {}, 'message_hub': {}, 'optimizer': {}}, 'a.pth')
    """
    lacking = [key for key in ('meta', 'message_hub', 'optimizer') if key not in checkpoint]
    if lacking:
        raise ValueError(
            f'checkpoint {path} has no {" and no ".join(map(repr, lacking))}, so a run cannot go '
            'on from it; start a new one from its weights with --cfg-options load_from=...'
        )


def require_fit_before_run(config: Config, path, resume: bool = False) -> None:
    """Raise what a run with WholeCheckpointHook would raise, but before the run reads its data.

    Args:
        config: The run's config.
        path: The checkpoint's file.
        resume: Whether a training is to go on from it.

    Raises:
        FileNotFoundError, ValueError: It cannot be read, or does not fit.
    """
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    checkpoint = load_from_local(str(path), 'cpu')
    with DefaultScope.overwrite_default_scope(config.get('default_scope', 'mmdet')):
        model = MODELS.build(config.model)
    require_fit(model, checkpoint, path, config.model)
    if resume:
        require_state(checkpoint, path)


def shapes(state_dict: Mapping) -> Shapes:
    """List the shapes of weights, without num_batches_tracked, which torch supplies if missing.

    Args:
        state_dict: The weights by name; a wrapper's prefix ``module.`` is removed.

    Examples:
        >>> shapes({'module.fc.bias': torch.zeros(3), 'bn.num_batches_tracked': torch.tensor(1)})
        {'fc.bias': (3,)}
    """
    return {
        name.removeprefix('module.'): tuple(value.shape)
        for name, value in state_dict.items()
        if isinstance(value, torch.Tensor) and not name.endswith('num_batches_tracked')
    }


def find_fitting_config(found: Shapes) -> Optional[str]:
    """Find the config of this package whose model has these weights.

    Models are built without memory for their weights. The number of classes may differ.

    Args:
        found: Shapes of the weights, see :func:`shapes`.

    Returns:
        Path, below ``configs``, of the first config that fits, with the number of classes if it
        differs; None if none fits.

    Examples:
        >>> find_fitting_config({'fc.bias': (3,)}) is None  # doctest: +SKIP
        True
    """
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    if not any(name.startswith(('bbox_head.', 'roi_head.')) for name in found):
        return None  # not a detector: a classifier or something else
    for place in _likely_folders(found):
        for path in sorted((CONFIGS / place).glob('*.py')):
            if path.stem.endswith('paper-150e_coco'):
                continue  # the same models as the 1x configs
            with DefaultScope.overwrite_default_scope('mmdet'), torch.device('meta'):
                model = MODELS.build(Config.fromfile(path).model)
            classes = _classes_that_fit(found, shapes(model.state_dict()), _num_classes(model))
            if classes:
                name = path.relative_to(CONFIGS).as_posix()
                same = classes == _num_classes(model)
                return name if same else f'{name} with {classes} classes'
    return None


def _weights(checkpoint, path) -> Mapping:
    """The weights by name."""
    weights = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, Mapping) else None
    if isinstance(weights, Mapping) and all(isinstance(name, str) for name in weights):
        return weights
    raise ValueError(
        f'checkpoint {path} holds no weights by name, as model.state_dict() gives them'
    )


def _likely_folders(found: Shapes) -> Tuple[str, ...]:
    """Folders of the configs that such weights may fit: building all configs takes a minute."""
    if not any(name.startswith('bbox_head.retina_') for name in found):
        return ('other_detectors',)
    channels = found.get('neck.lateral_convs.0.conv.weight', (256,))[0]
    return ('quickstart', 'bccd') if channels < 256 else ('retinanet', 'paper')


def _num_classes(model: nn.Module) -> int:
    head = getattr(model, 'bbox_head', None)
    return getattr(head, 'num_classes', None) or 1


def _classes_that_fit(found: Shapes, expected: Shapes, classes: int) -> int:
    """Number of classes with which all shapes would agree; 0 if there is none."""
    if found.keys() != expected.keys():
        return 0
    fitting = {classes}
    for name, shape in found.items():
        if shape == expected[name]:
            continue
        if shape[1:] != expected[name][1:] or shape[0] * classes % expected[name][0]:
            return 0
        fitting = {shape[0] * classes // expected[name][0]} | (fitting - {classes})
    return fitting.pop() if len(fitting) == 1 else 0


def _differences(found: Shapes, expected: Shapes) -> List[str]:
    lines = []
    other = [name for name in expected if name in found and found[name] != expected[name]]
    if other:
        lines.append(f'{_count(other, "has", "have")} another shape:')
        lines += [
            f'  {name}: {found[name]} in the checkpoint, {expected[name]} in the model'
            for name in other[:_SHOWN]
        ]
        if len(other) > _SHOWN:
            lines.append('  ...')
    missing = [name for name in expected if name not in found]
    if missing:
        lines.append(f'{_count(missing, "is", "are")} not in the checkpoint: {_some(missing)}')
    extra = [name for name in found if name not in expected]
    if extra:
        lines.append(f'{_count(extra, "is", "are")} not in the model: {_some(extra)}')
    return lines


def _count(names: list, one: str, many: str) -> str:
    return f'1 weight {one}' if len(names) == 1 else f'{len(names)} weights {many}'


def _some(names: List[str]) -> str:
    return ', '.join(names[:_SHOWN]) + (', ...' if len(names) > _SHOWN else '')


def _differing_options(there, here, name: str) -> Iterator[str]:
    """Lines of a model's options that differ, leaving out those that do not change weights."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in dict.fromkeys([*there, *here]):
            if key not in ('_scope_', 'init_cfg', 'data_preprocessor', 'train_cfg', 'test_cfg'):
                yield from _differing_options(there.get(key), here.get(key), f'{name}.{key}')
    elif plain(there) != plain(here):
        yield f'{name}={plain(there)!r}, not {plain(here)!r}'
