"""What a conversion writes: the student's config and checkpoint, and what it resumes from."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Callable, Dict, Mapping, Optional

import torch
from mmengine.config import Config
from torch import nn

from ..checkpoints.loading import load_from_local
from ..configs import CONFIGS, config_literal
from ..files import written_whole
from .conversion import Conversion
from .walk import Fitted

FINETUNE = """\
# Written by `sasa-det convert`: a short training of the converted detector, at a low learning rate.
_base_ = {base}

train_cfg = dict(max_epochs={epochs}, val_interval=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        end={epochs},
        eta_min_ratio=0.01,
        convert_to_iter_based=True,
    ),
]
optim_wrapper = dict(optimizer=dict(lr={lr}), paramwise_cfg={paramwise})
"""
# Of queries, keys and positions, as a factor to that of the other weights. Content comes in by
# training alone, and less of it at a lower rate, such as that of configs that train from random weights.
LOGITS_LR = 1.0
CONFIG = """\
# Written by `sasa-det convert`: the detector of the base, with attention in the place of these convolutions.
_base_ = {base}

custom_imports = dict(imports={imports}, allow_failed_imports=False)
load_from = '{{{{ fileDirname }}}}/{checkpoint}'
model = dict(
    type='AttendingDetector',
    detector={detector},
    backbone=dict(init_cfg=None),
    attention={{
{attention}
    }},
)
"""


def converted_checkpoint(folder: Path, base: Path) -> Path:
    """Name the checkpoint of a converted detector; its config has the name with the suffix ``.py``.

    Args:
        folder: Its folder.
        base: The convolutional detector's config.

    Examples:
        >>> converted_checkpoint(Path('out'), Path('retinanet.py')).name
        'retinanet_converted.pth'
    """
    return folder / f'{base.stem}_converted.pth'


def write_student(
    checkpoint: Path,
    base: Path,
    config: Config,
    conversion: Conversion,
    changed: bool = False,
) -> None:
    """Write a converted detector's config and checkpoint.

    Args:
        checkpoint: What :func:`converted_checkpoint` named.
        base: The convolutional detector's config.
        config: Its content.
        conversion: The converted detector.
        changed: Whether options have changed the content; it is then written, too, to inherit from.
    """
    path = checkpoint.with_suffix('.py')
    if changed:
        base = checkpoint.with_name(f'{base.stem}_with_options.py')
        config.dump(base)
    imports = (config.get('custom_imports') or {}).get('imports') or []
    imports = [imports] if isinstance(imports, str) else [*imports]
    if 'sasa_det' not in imports:
        imports.append('sasa_det')
    lines = (
        f'        {config_literal(layer)}: dict({_arguments(attn_cfg)}),'
        for layer, attn_cfg in conversion.attention.items()
    )
    path.write_text(
        CONFIG.format(
            base=config_literal(_as_base(base, checkpoint.parent)),
            imports=config_literal(imports),
            checkpoint=checkpoint.name,
            detector=config_literal(config.model.type),
            attention='\n'.join(lines),
        ),
        encoding='utf-8',
    )
    meta = dict(
        dataset_meta=conversion.model.dataset_meta,
        cfg=Config.fromfile(path).pretty_text,
    )
    save(dict(state_dict=conversion.model.state_dict(), meta=meta), checkpoint)


def write_finetuning(
    converted: Path, epochs: int, path: Optional[Path] = None, logits_lr: float = LOGITS_LR
) -> Path:
    """Write a config that trains a converted detector for a short time.

    Args:
        converted: The converted detector's config.
        epochs: Number of epochs.
        path: The new config's name, in the same folder; by default that of the converted one, with
            ``finetune`` in the place of ``converted``.
        logits_lr: Learning rate of queries, keys and positions, as a factor to that of the other weights.

    Returns:
        The new config.

    Raises:
        ValueError: The detector's config does not train by epochs.
    """
    config = Config.fromfile(converted)
    check_finetuning(config, epochs)
    paramwise = config.optim_wrapper.get('paramwise_cfg') or {}
    keys = {name: dict(lr_mult=logits_lr) for name in ('.query.', '.key.', '.rel_row', '.rel_col')}
    paramwise = dict(paramwise, custom_keys={**paramwise.get('custom_keys', {}), **keys})
    path = path or converted.with_name(converted.name.replace('_converted.py', '_finetune.py'))
    path.write_text(
        FINETUNE.format(
            base=config_literal(converted.name),
            epochs=epochs,
            lr=config_literal(
                share_of_lr(epochs, config.train_cfg.max_epochs) * config.optim_wrapper.optimizer.lr
            ),
            paramwise=config_literal(paramwise),
        ),
        encoding='utf-8',
    )
    return path


def share_of_lr(epochs: int, trained: int) -> float:
    """Return the share of the learning rate that a cosine schedule has left, so many epochs before its end.

    A short fine-tuning at a higher rate ends worse than it began, and a long one at a lower rate gains less.

    Args:
        epochs: Of fine-tuning.
        trained: Epochs that the detector was trained for.

    Examples:
        >>> [round(share_of_lr(epochs, 12), 3) for epochs in (1, 2, 4, 12, 24)]
        [0.017, 0.067, 0.25, 1.0, 1.0]
    """
    return (1 - math.cos(math.pi * min(1.0, epochs / trained))) / 2


def check_finetuning(config: Config, epochs: int) -> None:
    """Check that a detector can be fine-tuned.

    Args:
        config: Its config.
        epochs: Number of epochs.

    Raises:
        ValueError: The config does not train by epochs, or their number is below 0.
    """
    if epochs < 0:
        raise ValueError(f'the number of epochs of fine-tuning must be at least 0, but is {epochs}')
    if not (config.get('train_cfg') or {}).get('max_epochs'):
        raise ValueError(f'{config.filename}: train_cfg.max_epochs is not set; --finetune needs it')


def _as_base(config: Path, folder: Path) -> str:
    """Name a config as a base: those of a package by name, as they lie elsewhere on another machine."""
    if config.resolve().is_relative_to(CONFIGS):
        return f'sasa_det::{config.resolve().relative_to(CONFIGS).as_posix()}'
    for parent in config.parents:
        if parent.parts[-2:] == ('.mim', 'configs'):
            return f'{parent.parents[1].name}::{config.relative_to(parent).as_posix()}'
    return Path(os.path.relpath(config, folder)).as_posix()


def _arguments(attn_cfg: Mapping) -> str:
    return ', '.join(f'{key}={config_literal(value)}' for key, value in attn_cfg.items())


def save(content: dict, path: Path) -> None:
    """Save by ``torch.save``, such that a file of this name is whole whenever it is read.

    Args:
        content: What to save.
        path: The file.
    """
    with written_whole(path) as partial:
        torch.save(content, partial)


class Progress:
    """What an interrupted conversion goes on from, kept in a file: layers, and what was measured before.

    Args:
        folder: Where the file is.
        settings: What must be equal for the content to be of use.
    """

    def __init__(self, folder: Path, settings: Mapping) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self._path = folder / 'unfinished.pth'
        self._content = dict(key=self.key, layers={}, fits={}, measured={})
        if self._path.is_file():
            saved = load_from_local(str(self._path), 'cpu')
            if saved.get('key') == self.key:
                self._content = saved

    @property
    def layers(self) -> Dict[str, dict]:
        """The state dicts of the layers that are converted, by name."""
        return self._content['layers']

    @property
    def fits(self) -> Dict[str, dict]:
        """What was found when these layers were fitted, by name: fields of ``Fitted``."""
        return self._content['fits']

    def add(self, name: str, layer: nn.Module, fitted: Fitted) -> None:
        """Keep a layer.

        Args:
            name: Its name.
            layer: The converted layer.
            fitted: How well it was fitted. Its error is measured anew in the finished detector.
        """
        self.fits[name] = dict(unavoidable=fitted.unavoidable, seconds=fitted.seconds)
        self.layers[name] = {key: value.cpu().clone() for key, value in layer.state_dict().items()}
        save(self._content, self._path)

    @property
    def has_measured(self) -> bool:
        """Whether :meth:`once` has measured anything."""
        return bool(self._content['measured'])

    def once(self, what: str, measure: Callable):
        """Measure something, or give what was measured before the interruption.

        Times differ from run to run, so that a conversion must go on with the same ones.

        Args:
            what: Its name.
            measure: Gives numbers, in lists and dicts.
        """
        measured = self._content['measured']
        if what not in measured:
            measured[what] = measure()
            save(self._content, self._path)
        return measured[what]

    def remove(self) -> None:
        """Remove the file once all is converted."""
        self._path.unlink(missing_ok=True)
