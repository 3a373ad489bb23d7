#!/usr/bin/env python
"""Convert a RetinaNet-R50 at 640 px, then train a step of it, export it and time it; print time and memory.

    python tools/checks/convert_full_size.py FOLDER --work-dir work_dirs/full_size --static --budget time=0.72

``--static`` and ``--expansion`` go to the conversion. With ``--budget``, a second one has that budget; if no
choice of layers reaches it, that is told, and the rest goes on. The inference of all is timed in one process,
in turns, with boxes and suppression: as loaded, and with batch normalisation folded by
``sasa_det.export.fuse``.

FOLDER holds any images. The weights are random; the statistics of batch normalisation are those of the images.
So this shows what a conversion costs, not how well it does. Give ``--checkpoint`` for trained weights.
``--size 128 --num-images 8 --rounds 2`` tries the script itself.
"""

import argparse
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Mapping

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sasa_det.checkpoints.detector import load_detector
from sasa_det.cli.process import prepare
from sasa_det.configs import find_config, read_config
from sasa_det.convert.costs import alternate
from sasa_det.convert.detectors import find_images, load_images
from sasa_det.convert.files import converted_checkpoint, save
from sasa_det.export.check import load_images as load_items
from sasa_det.export.fuse import fuse

CONFIG = 'retinanet_r50_fpn_1x_coco'
COMMAND = [sys.executable, '-m', 'sasa_det']
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


def convert(teacher: Path, options: argparse.Namespace, scale: str, out: Path, *more: str) -> Path:
    """Convert by the command, print time and memory, and return the new checkpoint."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [
            *COMMAND, 'convert', CONFIG, str(teacher), '--images', options.folder, '--out', str(out),
            '--num-images', str(options.num_images), '--num-val-images', '0',
            '--expansion', str(options.expansion), *['--static'][: options.static], '--cfg-options', scale,
            *more,
        ],
        check=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f'{" ".join(["conversion", *more])}: {time.perf_counter() - begin:.0f} s, of the CPUs {used:.0f} s, '
        f'{after.ru_maxrss / 1e6:.1f} GB'
    )
    return converted_checkpoint(out, find_config(CONFIG))


def time_inference(detectors: Mapping[str, nn.Module], image: str, rounds: int) -> None:
    """Print the time of each detector over the first one's, as loaded and fused."""
    first = next(iter(detectors.values()))
    (item,) = load_items(first.cfg, [image])
    data = {key: [item[key]] for key in ('inputs', 'data_samples')}
    models = [*detectors.values(), *map(fuse, detectors.values())]
    seconds = alternate([partial(model.test_step, data) for model in models], 'cpu', rounds)
    count = len(detectors)
    for how, taken in (('as loaded', seconds[:count]), ('fused', seconds[count:])):
        shares = [f'{name} {each / taken[0]:.3f} of it' for name, each in zip(detectors, taken)]
        print(
            f'inference, {how}, {torch.get_num_threads()} threads: convolution {1000 * taken[0]:.0f} ms, '
            f'{", ".join(shares[1:])}'
        )


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
    parser.add_argument('--static', action='store_true')
    parser.add_argument('--expansion', type=int, default=1)
    parser.add_argument('--budget', help='of a second conversion, such as time=0.72')
    parser.add_argument(
        '--threads', type=int, default=2, help='of the timed inference (default: 2)'
    )
    parser.add_argument(
        '--rounds', type=int, default=15, help='of the timed inference, at least (default: 15)'
    )
    options = parser.parse_args()
    prepare()
    scale = f'test_dataloader.dataset.pipeline.1.scale=({options.size},{options.size})'
    config = read_config(find_config(CONFIG), [scale])
    options.work_dir.mkdir(parents=True, exist_ok=True)
    teacher = options.checkpoint or options.work_dir / 'random.pth'
    if not options.checkpoint:
        write_random(config, options.folder, teacher)

    checkpoints = dict(converted=convert(teacher, options, scale, options.work_dir))
    if options.budget:
        out = options.work_dir / options.budget
        try:
            checkpoints[options.budget] = convert(
                teacher, options, scale, out, '--budget', options.budget
            )
        except subprocess.CalledProcessError as error:
            if error.returncode != 2:  # the status of a sentence that tells why
                raise
    checkpoint = checkpoints['converted']
    converted = checkpoint.with_suffix('.py')
    train_a_step(Config.fromfile(converted), checkpoint, options.folder)
    image = find_images(Config(), options.folder)[0]
    # It compares boxes with PyTorch's. Those of random weights may differ by more than it allows.
    subprocess.run(
        [*COMMAND, 'export', str(converted), str(checkpoint), '--to', 'onnx', '--check', image]
    )
    torch.set_num_threads(options.threads)
    students = {
        name: load_detector(Config.fromfile(path.with_suffix('.py')), path)
        for name, path in checkpoints.items()
    }
    detectors = dict(convolution=load_detector(config, teacher), **students)
    time_inference(detectors, image, options.rounds)


if __name__ == '__main__':
    main()
