#!/usr/bin/env python
"""Convert a RetinaNet-R50 at 640 px, then train a step of it and export it; print time and memory.

    python tools/checks/convert_full_size.py FOLDER --work-dir work_dirs/full_size

FOLDER holds any images. The weights are random; the statistics of batch normalisation are those of the images.
So this shows what a conversion costs, not how well it does. Give ``--checkpoint`` for trained weights.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sasa_det.checkpoints.detector import load_detector
from sasa_det.cli.process import prepare
from sasa_det.configs import find_config, read_config
from sasa_det.convert.detectors import find_images, load_images
from sasa_det.convert.files import converted_checkpoint, save

CONFIG = 'retinanet_r50_fpn_1x_coco'
# Images that give the statistics of batch normalisation.
IMAGES = 4


@torch.no_grad()
def write_random(config: Config, folder: Path, checkpoint: Path) -> None:
    """Write a detector of random weights whose maps are of about unit variance everywhere."""
    from mmdet.registry import MODELS

    init_default_scope('mmdet')
    torch.manual_seed(0)
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    model.init_weights()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        nn.init.ones_(norm.weight)  # the last of a block starts at 0
        norm.reset_running_stats()
        norm.momentum = None
    for name, module in model.bbox_head.named_modules():
        if name.endswith('.conv'):
            nn.init.kaiming_normal_(module.weight, nonlinearity='relu')
    images = load_images(model, config, find_images(config, folder), IMAGES)
    model.eval()
    for norm in norms:
        norm.train()
    model.extract_feat(images)
    save(dict(state_dict=model.state_dict(), meta={}), checkpoint)


def train_a_step(config: Config, checkpoint: Path, folder: Path) -> None:
    """Train on one image with one box, and print the losses."""
    model = load_detector(config, str(checkpoint)).train()
    images = load_images(model, config, find_images(config, folder), 2)[:1]
    from mmdet.structures import DetDataSample

    size = tuple(images.shape[2:])
    sample = DetDataSample(metainfo=dict(img_shape=size, batch_input_shape=size, pad_shape=size))
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[100.0, 100.0, 300.0, 200.0]]), labels=torch.tensor([0])
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = {name: sum(each) for name, each in model.loss(images, [sample]).items()}
    sum(losses.values()).backward()
    optimizer.step()
    finite = all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    text = ', '.join(f'{name} {value.item():.3f}' for name, value in losses.items())
    print(f'training step: {text}; gradients are {"finite" if finite else "NOT finite"}')


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', help='images')
    parser.add_argument('--work-dir', type=Path, required=True, help='folder to write to')
    parser.add_argument('--checkpoint', help='trained weights')
    parser.add_argument(
        '--size', type=int, default=640, help='longest edge of the images, in pixels'
    )
    parser.add_argument('--num-images', type=int, default=64)
    options = parser.parse_args()
    prepare()
    scale = f'test_dataloader.dataset.pipeline.1.scale=({options.size},{options.size})'
    path = find_config(CONFIG)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    teacher = options.checkpoint or options.work_dir / 'random.pth'
    if not options.checkpoint:
        write_random(read_config(path, [scale]), options.folder, teacher)

    command = [sys.executable, '-m', 'sasa_det']
    begin = time.perf_counter()
    subprocess.run(
        [
            *command, 'convert', CONFIG, str(teacher), '--images', options.folder, '--out',
            str(options.work_dir), '--num-images', str(options.num_images), '--num-val-images', '0',
            '--cfg-options', scale,
        ],
        check=True,
    )  # fmt: skip
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f'conversion: {time.perf_counter() - begin:.0f} s, of the CPUs {used.ru_utime + used.ru_stime:.0f} s, '
        f'{used.ru_maxrss / 1e6:.1f} GB'
    )
    checkpoint = converted_checkpoint(options.work_dir, path)
    converted = checkpoint.with_suffix('.py')
    train_a_step(Config.fromfile(converted), checkpoint, options.folder)
    image = find_images(Config(), options.folder)[0]
    # It compares boxes with PyTorch's. Those of random weights may differ by more than it allows.
    subprocess.run(
        [*command, 'export', str(converted), str(checkpoint), '--to', 'onnx', '--check', image]
    )


if __name__ == '__main__':
    main()
