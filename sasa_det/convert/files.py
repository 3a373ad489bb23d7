"""What a conversion writes: the student's config and checkpoint, a report, and what it resumes from."""

import hashlib
import json
import os
from pathlib import Path
from typing import Dict, Mapping, Sequence

import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..checkpoints.loading import load_from_local
from ..configs import config_literal
from .conversion import Conversion
from .costs import compare_layers, compare_models
from .walk import Calls, Stage

TITLES = ('layer', 'unexplained', 'free', 'M parameters', 'GFLOPs', 'ms')
CONFIG = """\
# Written by `sasa-det convert`: the detector of the base, with attention in the place of these convolutions.
_base_ = {base}

custom_imports = dict(imports={imports}, allow_failed_imports=False)
load_from = {checkpoint}
model = dict(
    type='AttendingDetector',
    detector={detector},
    backbone=dict(init_cfg=None),
    attention={{
{attention}
    }},
)
"""


def write_student(folder: Path, base: Path, config: Config, conversion: Conversion) -> Path:
    """Write a converted detector's config and checkpoint.

    Args:
        folder: Where to.
        base: The convolutional detector's config.
        config: Its content.
        conversion: The converted detector.

    Returns:
        The checkpoint; the config has its name, with the suffix ``.py``.
    """
    checkpoint = folder / f'{base.stem}_converted.pth'
    path = checkpoint.with_suffix('.py')
    imports = [*config.get('custom_imports', {}).get('imports', [])]
    if 'sasa_det' not in imports:
        imports.append('sasa_det')
    lines = (
        f'        {config_literal(layer)}: dict({_arguments(attn_cfg)}),'
        for layer, attn_cfg in conversion.attention.items()
    )
    path.write_text(
        CONFIG.format(
            base=config_literal(os.path.relpath(base, folder)),
            imports=config_literal(imports),
            checkpoint=config_literal(str(checkpoint)),
            detector=config_literal(config.model.type),
            attention='\n'.join(lines),
        ),
        encoding='utf-8',
    )
    meta = dict(dataset_meta=conversion.model.dataset_meta, cfg=Config.fromfile(path).pretty_text)
    save(dict(state_dict=conversion.model.state_dict(), meta=meta), checkpoint)
    return checkpoint


def write_report(
    folder: Path,
    teacher: nn.Module,
    conversion: Conversion,
    stages: Sequence[Stage],
    images: Tensor,
    calls: Mapping[str, Calls],
) -> str:
    """Write report.json and report.md: what each layer leaves unexplained, and costs before and after.

    Args:
        folder: Where to.
        teacher: The convolutional detector.
        conversion: The converted one.
        stages: What runs them.
        images: What was converted with.
        calls: How each layer is called.

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
    if conversion.kept:
        text += '\nThese stay convolutions:\n\n'
        text += ''.join(f'- {name}: {reason}\n' for name, reason in conversion.kept.items())
    (folder / 'report.md').write_text(text)
    return text


def _before_and_after(row: Mapping) -> list:
    return [
        f'{row[f"{key}_before"] / unit:.{digits}f} → {row[f"{key}_after"] / unit:.{digits}f}'
        for key, unit, digits in (('parameters', 1e6, 3), ('gflops', 1, 3), ('ms', 1, 1))
    ]


def _arguments(attn_cfg: Mapping) -> str:
    return ', '.join(f'{key}={config_literal(value)}' for key, value in attn_cfg.items())


def save(content: dict, path: Path) -> None:
    """Save by ``torch.save``, such that a file of this name is whole whenever it is read.

    Args:
        content: What to save.
        path: The file.
    """
    partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
    torch.save(content, partial)
    partial.replace(path)


class Progress:
    """The layers converted so far, kept in a file that an interrupted conversion goes on from.

    Args:
        folder: Where the file is.
        settings: What must be equal for the layers to be of use.
    """

    def __init__(self, folder: Path, settings: Mapping) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        self._key = hashlib.sha256(text.encode()).hexdigest()
        self._path = folder / 'converted_layers.pth'
        self.layers: Dict[str, dict] = {}
        if self._path.is_file():
            saved = load_from_local(str(self._path), 'cpu')
            if saved.get('key') == self._key:
                self.layers = saved['layers']

    def add(self, name: str, layer: nn.Module) -> None:
        """Keep a layer.

        Args:
            name: Its name.
            layer: The converted layer.
        """
        self.layers[name] = {key: value.cpu().clone() for key, value in layer.state_dict().items()}
        save(dict(key=self._key, layers=self.layers), self._path)

    def remove(self) -> None:
        """Remove the file once all is converted."""
        self._path.unlink(missing_ok=True)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ['---'] * len(titles), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
