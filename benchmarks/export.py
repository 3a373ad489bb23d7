#!/usr/bin/env python
"""Time exported detectors under onnxruntime against PyTorch with the native kernel, on the CPU.

    python -m benchmarks.export                      RetinaNet-R50, 640 x 640, batch 1
    python -m benchmarks.export --size 320 --configs retinanet_sasa-r50_sasa-fpn_sasa-head_1x_coco
    python -m benchmarks.export --op native          attention as one operator, from this package's library

All of it is from raw pixels to every prior's box and scores, without suppression. Before it is timed, what
was exported is compared with PyTorch. Both take turns, round by round, in one process, with the same number
of threads; figures are medians. The peak of resident memory is measured in a process for each. Weights and
the image are random: neither changes what is computed. Writes OUT.json, OUT.md and, beside them, the
exported files.
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

import sasa_det
from sasa_det.configs import CONFIGS, find_config, read_config
from sasa_det.export.check import open_session
from sasa_det.export.decoded import DecodedDetector
from sasa_det.export.to_onnx import OPS, export_onnx

from .measuring import (
    above_zero,
    as_markdown,
    describe_machine,
    in_own_process,
    peak_growth,
    prepare,
    take_turns,
    write,
)

CHOSEN = ['retinanet_r50_fpn_1x_coco', 'retinanet_sasa-r50_sasa-fpn_sasa-head_1x_coco']
RUNTIMES = ('torch', 'onnxruntime')
TITLES = {
    'config': '{config}',
    'torch ms': '{torch_ms:.0f}',
    'onnxruntime ms': '{onnxruntime_ms:.0f}',
    'onnxruntime / torch': '{ratio:.2f}',
    'peak MB torch': '{torch_mb:.0f}',
    'peak MB onnxruntime': '{onnxruntime_mb:.0f}',
    'file MB': '{file_mb:.0f}',
    'nodes': '{nodes}',
    'boxes apart, px': '{box:.1g}',
    'scores apart': '{score:.1g}',
}


def build(name: str) -> DecodedDetector:
    """Build a detector of random weights, the same in each call."""
    register_all_modules()
    sasa_det.register()
    config = read_config(find_config(name))
    config.model.backbone.init_cfg = None  # random weights: nothing to download
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    return DecodedDetector(model).eval()


def caller(runtime: str, name: str, path: Path, images: torch.Tensor):
    """Return a function that detects and returns boxes and scores as arrays."""
    if runtime == 'torch':
        model = build(name)

        def call():
            with torch.no_grad():
                return [each.numpy() for each in model(images)]

        return call
    # Otherwise its threads keep the cores busy between rounds, waiting for work.
    session = open_session(path, torch.get_num_threads(), spinning=False)
    return lambda: session.run(None, dict(images=images.numpy()))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(path.stem for path in (CONFIGS / 'retinanet').glob('*.py'))
    parser.add_argument('--configs', nargs='+', default=CHOSEN, choices=names, metavar='NAME')
    parser.add_argument(
        '--size', type=above_zero(int), default=640, help='edge of the image in pixels'
    )
    parser.add_argument('--op', default='standard', choices=OPS, help='how attention is written')
    parser.add_argument('--batch', type=above_zero(int), default=1)
    parser.add_argument('--threads', type=above_zero(int), help="default: torch's")
    parser.add_argument(
        '--seconds', type=above_zero(float), default=30, help='for each (%(default)s)'
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/export'))
    parser.add_argument('--memory-of', choices=RUNTIMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    prepare(options.threads)
    images = torch.from_numpy(
        np.random.RandomState(0).randint(0, 256, (options.batch, 3, options.size, options.size))
    ).float()
    paths = {name: options.out.with_name(f'{name}.onnx') for name in options.configs}
    if options.memory_of:
        name = options.configs[0]
        call = caller(options.memory_of, name, paths[name], images)
        print(peak_growth(call))
        return

    options.out.parent.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    machine.update(
        size=options.size, batch=options.batch, op=options.op, onnxruntime=onnxruntime.__version__
    )
    rows, calls = [], {}
    for name in options.configs:
        print('Exporting', name, flush=True)
        export_onnx(build(name).detector, paths[name], op=options.op)
        both = {runtime: caller(runtime, name, paths[name], images) for runtime in RUNTIMES}
        box, score = (float(abs(a - b).max()) for a, b in zip(*(call() for call in both.values())))
        row = dict(config=name, box=box, score=score, file_mb=paths[name].stat().st_size / 2**20)
        row['nodes'] = count_nodes(paths[name])
        for runtime in RUNTIMES:
            peak = in_own_process(
                '--memory-of', runtime, '--configs', name, '--size', options.size,
                '--batch', options.batch, '--threads', torch.get_num_threads(),
                '--out', options.out,
            )  # fmt: skip
            row[f'{runtime}_mb'] = peak / 2**20
        rows.append(row)
        calls[name] = both
    print('Timing, some', round(options.seconds * len(calls)), 'seconds', flush=True)
    times = take_turns(calls, options.seconds)
    for row in rows:
        for runtime in RUNTIMES:
            row[f'{runtime}_ms'] = 1e3 * times[row['config']][runtime]
        row['ratio'] = row['onnxruntime_ms'] / row['torch_ms']
    markdown = as_markdown(machine, TITLES, rows)
    write(options.out, machine, rows, markdown)
    print(markdown)


def count_nodes(path: Path) -> int:
    """Count the operators of an ONNX file."""
    import onnx

    return len(onnx.load(path, load_external_data=False).graph.node)


if __name__ == '__main__':
    main()
