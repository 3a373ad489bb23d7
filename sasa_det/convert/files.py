"""What a conversion writes: the student's config and checkpoint, a report, and what it resumes from."""

import hashlib
import json
import os
from pathlib import Path
from typing import Dict, Mapping, Optional, Sequence

import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..checkpoints.loading import load_from_local
from ..configs import CONFIGS, config_literal
from ..files import written_whole
from .accuracy import LabelledImages
from .budget import Budget, draw_tradeoff, spend
from .conversion import Conversion
from .costs import compare_layers, compare_models
from .layers import Choice
from .walk import Calls, Stage

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
# Of the learning rate that the detector was trained with.
FINETUNE_LR = 0.2
# Of that of the other weights: logits add up the steps of two projections.
LOGITS_LR = 0.1
TITLES = ('layer', 'unexplained', 'free', 'M parameters', 'GFLOPs', 'ms')
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
    key: str,
    changed: bool = False,
) -> None:
    """Write a converted detector's config and checkpoint.

    Args:
        checkpoint: What :func:`converted_checkpoint` named.
        base: The convolutional detector's config.
        config: Its content.
        conversion: The converted detector.
        key: Of the conversion's settings.
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
        conversion=key,
    )
    save(dict(state_dict=conversion.model.state_dict(), meta=meta), checkpoint)


def write_report(
    folder: Path,
    teacher: nn.Module,
    conversion: Conversion,
    stages: Sequence[Stage],
    images: Tensor,
    calls: Mapping[str, Calls],
    ap: Mapping,
) -> str:
    """Write report.json and report.md: what each layer leaves unexplained, and costs before and after.

    Args:
        folder: Where to.
        teacher: The convolutional detector.
        conversion: The converted one.
        stages: What runs them.
        images: What was converted with.
        calls: How each layer is called.
        ap: What :func:`measure_both` found.

    Returns:
        The text of report.md.
    """
    costs = compare_layers(
        teacher, conversion.model, {name: calls[name] for name in conversion.fitted}
    )
    layers = [
        dict(layer=name, **fitted._asdict(), **costs[name])
        for name, fitted in conversion.fitted.items()
    ]
    total = compare_models(teacher, conversion.model, stages, images[:1])
    content = dict(
        images=len(images),
        size=list(images.shape[2:]),
        ap=ap,
        total=total,
        layers=layers,
        kept=conversion.kept,
    )
    (folder / 'report.json').write_text(json.dumps(content, indent=2) + '\n')
    rows = [
        [
            row['layer'],
            f'{row["unexplained"]:.3f}',
            f'{row["unavoidable"]:.3f}',
            *(_before_and_after(row)),
        ]
        for row in layers
    ]
    rows.append(['whole detector', '', '', *_before_and_after(total)])
    text = (
        f'{len(layers)} convolutions became attention, by {len(images)} images of '
        f'{images.shape[2]} x {images.shape[3]} pixels. Unexplained: the share of the variance of the '
        "teacher's layer that is left on images held out. Free: what a convolution of any weights would "
        "leave. GFLOPs and times are for one image, a multiply-add counts as two, and the head's "
        f'post-processing is left out.\n\n{_table(TITLES, rows)}\n'
    )
    if 'after' in ap:
        text += (
            f'\nAP on {ap["images"]} labelled images: {ap["before"]:.1f} before, {ap["after"]:.1f} after, '
            'without any training.\n'
        )
    else:
        text += f'\nAP was not measured: {ap["missing"]}.\n'
    if conversion.kept:
        text += '\nThese stay convolutions:\n\n'
        text += ''.join(f'- {name}: {reason}\n' for name, reason in conversion.kept.items())
    (folder / 'report.md').write_text(text)
    return text


def measure_both(teacher: nn.Module, student: nn.Module, config: Config, most: int) -> dict:
    """Measure AP before and after, where a config has labelled images.

    Args:
        teacher: The convolutional detector.
        student: The converted one.
        config: The former's config.
        most: At most so many of its validation images; 0 for none.

    Returns:
        The number of 'images', and AP 'before' and 'after', in per cent; or why it is 'missing'.
    """
    if most < 1:
        return dict(missing='it was not asked for')
    try:
        labelled = LabelledImages(config, most)
        return dict(
            images=len(labelled.indices), before=labelled.ap(teacher), after=labelled.ap(student)
        )
    except (OSError, ValueError) as error:
        return dict(missing=str(error))


def _before_and_after(row: Mapping) -> list:
    return [
        f'{row[f"{key}_before"] / unit:.{digits}f} → {row[f"{key}_after"] / unit:.{digits}f}'
        for key, unit, digits in (('parameters', 1e6, 3), ('gflops', 1, 3), ('ms', 1, 1))
    ]


def write_finetuning(converted: Path, epochs: int, path: Optional[Path] = None) -> Path:
    """Write a config that trains a converted detector for a short time.

    Args:
        converted: The converted detector's config.
        epochs: Number of epochs.
        path: The new config's name, in the same folder; by default that of the converted one, with
            ``finetune`` in the place of ``converted``.

    Returns:
        The new config.

    Raises:
        ValueError: The detector's config does not train by epochs.
    """
    config = Config.fromfile(converted)
    check_finetuning(config, epochs)
    paramwise = config.optim_wrapper.get('paramwise_cfg') or {}
    keys = {name: dict(lr_mult=LOGITS_LR) for name in ('.query.', '.key.', '.rel_row', '.rel_col')}
    paramwise = dict(paramwise, custom_keys={**paramwise.get('custom_keys', {}), **keys})
    path = path or converted.with_name(converted.name.replace('_converted.py', '_finetune.py'))
    path.write_text(
        FINETUNE.format(
            base=config_literal(converted.name),
            epochs=epochs,
            lr=config_literal(FINETUNE_LR * config.optim_wrapper.optimizer.lr),
            paramwise=config_literal(paramwise),
        ),
        encoding='utf-8',
    )
    return path


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
    """Name a config as a base: those of this package by name, as they lie elsewhere on another machine."""
    if config.resolve().is_relative_to(CONFIGS):
        return f'sasa_det::{config.resolve().relative_to(CONFIGS).as_posix()}'
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


def plan_within(
    folder: Path,
    key: str,
    budget: Budget,
    model: nn.Module,
    choices: Mapping[str, Choice],
    *others,
) -> Dict[str, Choice]:
    """Choose the layers within a budget, and write budget.json and budget.png; or read what was chosen before.

    Times differ from run to run: a conversion that goes on must go on with the same layers.

    Args:
        folder: Where to.
        key: Of the conversion's settings.
        budget: What is wanted.
        model: The convolutional detector.
        choices: What may become of each convolution.
        others: The other arguments of :func:`sasa_det.convert.budget.spend`.

    Returns:
        What becomes of each convolution.

    Raises:
        ValueError: No set of layers meets it; says what can be had.
    """
    path = folder / 'budget.json'
    if path.is_file():
        saved = json.loads(path.read_text())
        if saved['key'] == key:
            return {name: Choice(*choice) for name, choice in saved['choices'].items()}
    plan = spend(budget, model, choices, *others)
    draw_tradeoff(plan, budget).savefig(folder / 'budget.png', dpi=120)
    path.write_text(
        json.dumps(dict(key=key, budget=budget._asdict(), **plan._asdict()), indent=2) + '\n'
    )
    return plan.choices


class Progress:
    """The layers converted so far, kept in a file that an interrupted conversion goes on from.

    Args:
        folder: Where the file is.
        settings: What must be equal for the layers to be of use.
    """

    def __init__(self, folder: Path, settings: Mapping) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self._path = folder / 'converted_layers.pth'
        self.layers: Dict[str, dict] = {}
        if self._path.is_file():
            saved = load_from_local(str(self._path), 'cpu')
            if saved.get('key') == self.key:
                self.layers = saved['layers']

    def add(self, name: str, layer: nn.Module) -> None:
        """Keep a layer.

        Args:
            name: Its name.
            layer: The converted layer.
        """
        self.layers[name] = {key: value.cpu().clone() for key, value in layer.state_dict().items()}
        save(dict(key=self.key, layers=self.layers), self._path)

    def made(self, checkpoint: Path) -> bool:
        """Say whether a checkpoint is what a whole conversion with these settings wrote.

        Args:
            checkpoint: The file, which need not exist.
        """
        if not checkpoint.is_file():
            return False
        meta = load_from_local(str(checkpoint), 'cpu').get('meta') or {}
        return meta.get('conversion') == self.key

    def remove(self) -> None:
        """Remove the file once all is converted."""
        self._path.unlink(missing_ok=True)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ['---'] * len(titles), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
