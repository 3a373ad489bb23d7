#!/usr/bin/env python
"""Time a training iteration and an inference of RetinaNet-R50 on the CPU, for all eight mixes.

    python -m benchmarks.detector                      640 x 640, batch 1
    python -m benchmarks.detector --size 800 --configs retinanet_r50_fpn_1x_coco ...
    python -m benchmarks.detector --size 320 --batch 8 --configs configs/bccd/retinanet_*.py

An iteration is mmdet's own train_step: losses, backward, SGD; an inference is its test_step, boxes and
suppression included. Every stage and its batch norm learn in all, where mmdet's own config freezes some.
Weights and the image are random: neither changes what is computed, except that an untrained detector
has next to no boxes to suppress. Detectors take turns, round by round, in one process; figures are
medians, and ratios are against the first config. Peak memory, weights, gradients and momentum
included, is measured in a process for each. Writes OUT.json and OUT.md.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.structures import InstanceData
from rich.progress import Progress

from sasa_det.configs import CONFIGS, find_config, read_config
from sasa_det.models.gpu import prepare_for_gpu

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

TITLES = {
    'config': '{config}',
    'training ms': '{train_ms:.0f}',
    '/ first ': '{train_ratio:.2f}',
    'inference ms': '{infer_ms:.0f}',
    '/ first': '{infer_ratio:.2f}',
    'peak MB training': '{train_mb:.0f}',
    '/ first  ': '{train_mb_ratio:.2f}',
    'peak MB inference': '{infer_mb:.0f}',
    '/ first   ': '{infer_mb_ratio:.2f}',
}


def make_batch(height: int, width: int, batch: int) -> dict:
    """Make images with eight boxes each, in a dataloader's format."""
    random = np.random.RandomState(0)
    inputs, samples = [], []
    for _ in range(batch):
        inputs.append(torch.from_numpy(random.randint(0, 256, (3, height, width), dtype=np.uint8)))
        corners = random.uniform(0, (width / 2, height / 2), (8, 2))
        sizes = random.uniform(16, (width / 2, height / 2), (8, 2))
        boxes = np.concatenate([corners, corners + sizes], 1)
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width),
                batch_input_shape=(height, width), scale_factor=(1.0, 1.0), img_id=0,
            )
        )  # fmt: skip
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(boxes).float(),
            labels=torch.zeros(8, dtype=torch.long),  # a class that every config has
        )
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


class Detector:
    """A detector in training.

    Args:
        name: A config in configs/retinanet, without its suffix, or the path of any config.
        batch: The batch to train and infer on.
        device: The device; on 'cuda' prepared as our configs do it, under bfloat16 autocast.
    """

    def __init__(self, name: str, batch: dict, device: str = 'cpu') -> None:
        register_all_modules()
        import sasa_det  # noqa: F401  registers the parts

        config = read_config(find_config(name))
        config.model.backbone.init_cfg = None  # random weights: nothing to download
        config.model.backbone.update(frozen_stages=-1, norm_eval=False)
        self.model = MODELS.build(config.model)
        self.model.init_weights()
        if device == 'cuda':
            prepare_for_gpu(self.model.to(device))
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9)
        self.optimizer = OptimWrapper(optimizer=optimizer)
        if device == 'cuda':
            self.optimizer = AmpOptimWrapper(
                optimizer=optimizer, dtype='bfloat16', loss_scale=dict(enabled=False)
            )
        self.batch = batch

    def train(self) -> None:
        """Run a training step."""
        self.model.train()
        self.model.train_step(self.batch, self.optimizer)

    def infer(self) -> None:
        """Run an inference."""
        self.model.eval()
        with torch.no_grad():
            self.model.test_step(self.batch)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(
        (path.stem for path in (CONFIGS / 'retinanet').glob('*.py')), key=lambda x: x.count('sasa')
    )
    parser.add_argument(
        '--configs', nargs='+', default=names, metavar='NAME',
        help='names in configs/retinanet, or paths (all eight mixes)',
    )  # fmt: skip
    parser.add_argument(
        '--size', type=above_zero(int), default=640, help='edge of the image in pixels'
    )
    parser.add_argument('--batch', type=above_zero(int), default=1)
    parser.add_argument('--threads', type=above_zero(int), help="default: torch's")
    parser.add_argument(
        '--seconds', type=above_zero(float), default=30, help='for each (%(default)s)'
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/detector'))
    parser.add_argument('--memory-of', choices=('train', 'infer'), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.configs:
        if name not in names and not Path(name).is_file():
            parser.error(f'--configs: {name} is neither a file nor one of {", ".join(names)}')
    prepare(options.threads)
    torch.manual_seed(0)
    batch = make_batch(options.size, options.size, options.batch)
    if options.memory_of:
        print(
            peak_growth(lambda: getattr(Detector(options.configs[0], batch), options.memory_of)())
        )
        return

    machine = describe_machine()
    machine.update(size=options.size, batch=options.batch)
    memory = {}
    with Progress() as progress:
        for name in progress.track(options.configs, description='Memory'):
            memory[name] = {
                way: in_own_process(
                    '--memory-of', way, '--configs', name, '--size', options.size,
                    '--batch', options.batch, '--threads', torch.get_num_threads(),
                )
                for way in ('train', 'infer')
            }  # fmt: skip
    print('Timing, some', round(options.seconds * len(options.configs)), 'seconds', flush=True)
    detectors = {name: Detector(name, batch) for name in options.configs}
    calls = {name: dict(train=each.train, infer=each.infer) for name, each in detectors.items()}
    times = take_turns(calls, options.seconds)
    rows = []
    for name in options.configs:
        row = dict(config=Path(name).stem)
        for way in ('train', 'infer'):
            first = options.configs[0]
            row[f'{way}_ms'] = 1e3 * times[name][way]
            row[f'{way}_ratio'] = times[name][way] / times[first][way]
            row[f'{way}_mb'] = memory[name][way] / 2**20
            row[f'{way}_mb_ratio'] = memory[name][way] / memory[first][way]
        rows.append(row)
    markdown = as_markdown(machine, TITLES, rows)
    write(options.out, machine, rows, markdown)
    print(markdown)


if __name__ == '__main__':
    main()
