#!/usr/bin/env python
"""Measure AP and time of a trained detector in lower precision, beside float32, on the CPU.

    python -m benchmarks.precision CONFIG CHECKPOINT
    python -m benchmarks.precision retinanet_sasa-tiny_digits sasa_det/demo/digits.pth --no-time

AP is mmdet's main metric on all validation data of the config. Every way of computing evaluates the same
images: float32 as it is; float32 with batch normalisation folded into other layers; the same in channels_last;
and both of these in bfloat16 and in int8. Inferences of the first batch take turns, round by round, in one
process; figures are medians. Writes OUT.json and OUT.md after each row.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Dict

import torch
from torch import nn

from sasa_det.checkpoints.detector import load_detector
from sasa_det.configs import find_config, read_config
from sasa_det.evaluation.accuracy import build_validation, evaluate
from sasa_det.export.fuse import fuse
from sasa_det.export.layout import to_channels_last
from sasa_det.export.precision import PRECISIONS, lower_precision
from sasa_det.plugin import register

from .measuring import above_zero, as_markdown, describe_machine, prepare, take_turns, write

TITLES = {'way': '{way}', 'AP': '{ap:.1f}', 'difference': '{difference:+.1f}'}
TIMES = {'inference ms': '{ms:.0f}', '/ first': '{ratio:.2f}'}
WAYS: Dict[str, Callable[[nn.Module], nn.Module]] = {
    'float32': lambda detector: detector,
    'fused': fuse,
    'fused, channels_last': lambda detector: to_channels_last(fuse(detector)),
    **{
        name: lambda detector, name=name: to_channels_last(lower_precision(fuse(detector), name))
        for name in PRECISIONS
    },
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file or name')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--ways', nargs='+', default=list(WAYS), choices=WAYS, metavar='WAY',
        help=f'of {", ".join(map(repr, WAYS))}; the others are compared with the first (all)',
    )  # fmt: skip
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    parser.add_argument('--threads', type=above_zero(int), help="default: torch's")
    parser.add_argument('--no-time', action='store_true', help='measure AP only')
    parser.add_argument(
        '--seconds', type=above_zero(float), default=20, help='for each (%(default)s)'
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/precision'))
    options = parser.parse_args()
    prepare(options.threads)
    register()
    config = read_config(find_config(options.config), options.cfg_options)
    detector = load_detector(config, options.checkpoint)
    loader, evaluator = build_validation(config)

    machine = describe_machine()
    machine.update(config=options.config, images=len(loader.dataset), batch=loader.batch_size)
    rows, models = [], {}
    for name in options.ways:
        try:
            models[name] = WAYS[name](detector)
        except (RuntimeError, ValueError) as error:  # this CPU or this detector has no such way
            print(f'{name}: {error}', file=sys.stderr, flush=True)
            continue
        print(name, flush=True)
        numbers = evaluate(models[name], loader, evaluator)
        ap = 100 * next(iter(numbers.values()), 0.0)
        rows.append(dict(way=name, ap=ap, difference=ap - (rows or [dict(ap=ap)])[0]['ap']))
        write(options.out, machine, rows, as_markdown(machine, TITLES, rows))
    titles = TITLES
    if not options.no_time:
        print('Timing, some', round(options.seconds * len(models)), 'seconds', flush=True)
        batch = next(iter(loader))
        calls = {name: dict(ms=partial(_infer, model, batch)) for name, model in models.items()}
        times = take_turns(calls, options.seconds)
        for row in rows:
            row['ms'] = 1e3 * times[row['way']]['ms']
            row['ratio'] = row['ms'] / rows[0]['ms']
        titles = {**TITLES, **TIMES}
    markdown = as_markdown(machine, titles, rows)
    write(options.out, machine, rows, markdown)
    print(markdown)


@torch.no_grad()
def _infer(model: nn.Module, batch: dict) -> None:
    model.test_step(batch)


if __name__ == '__main__':
    main()
