#!/usr/bin/env python3
"""Take each RetinaNet of ``configs/retinanet`` through a training step, test.py and get_flops.py.

    python tools/checks/mixes.py DATA [CONFIG ...]

DATA holds COCO 2017, or a few images of it, in its own layout:
``annotations/instances_{train,val}2017.json``, ``train2017/``, ``val2017/``. CONFIG are the configs
to check, all eight by default. Training reads one image and testing two, at 480 px, from random
weights: this shows that each mix runs, not how well it detects. The first that fails ends the run.
The table goes to stdout, mmengine's log to stderr. Its column MACs is the multiply-adds per image.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence

import torch
from mmdet.registry import MODELS
from mmengine.runner import Runner
from torch import nn

from sasa_det.configs import CONFIGS, read_config

LEAVES = sorted((CONFIGS / 'retinanet').glob('*.py'))
IMAGE_SCALE = (480, 480)


class Step(NamedTuple):
    """The results of one training step.

    Attributes:
        losses: By name.
        gradients: Mean absolute gradient of each parameter with a gradient; nan or inf if it holds any.
        learning: Names of the trainable parameters.
        checkpoint: mmengine's checkpoint after the step.
    """

    losses: Dict[str, float]
    gradients: Dict[str, float]
    learning: List[str]
    checkpoint: Path


def smoke_options(data, backbone_checkpoint=None) -> List[str]:
    """Return ``--cfg-options`` with which a config runs for seconds, on a few images.

    Args:
        data: The folder of the data.
        backbone_checkpoint: The backbone's initial weights, in place of the download.
    """
    scale = str(IMAGE_SCALE).replace(' ', '')
    options = [
        f'train_dataloader.dataset.pipeline.2.scale={scale}',
        'train_dataloader.batch_size=1',
        'train_cfg.max_epochs=1',
        'default_hooks.logger.interval=1',
        'default_hooks.checkpoint.save_optimizer=False',
        # A low threshold, to get boxes: after one step no score is high.
        'model.test_cfg.score_thr=0.0',
        'randomness.seed=0',
    ]
    for split, images in dict(train=1, val=1, test=2).items():
        options += [
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
            f'{split}_dataloader.dataset.data_root={data}',
            f'{split}_dataloader.dataset.indices={images}',
        ]
    for split in ('val', 'test'):
        options += [
            f'{split}_dataloader.dataset.pipeline.1.scale={scale}',
            f'{split}_evaluator.ann_file={data}/annotations/instances_val2017.json',
        ]
    if backbone_checkpoint is not None:
        options.append(f'model.backbone.init_cfg.checkpoint={backbone_checkpoint}')
    return options


def write_backbone_checkpoint(path) -> Path:
    """Write mmdet's own ResNet-50 with random weights and the keys of ``torchvision://resnet50``.

    Its activations are about as large as those of the trained one: batch norm statistics fit the
    weights, and each block adds little. FPN and head have no norm to correct larger ones.
    """
    torch.manual_seed(0)
    model = MODELS.build(
        dict(type='mmdet.ResNet', depth=50, norm_eval=False, zero_init_residual=False)
    )
    model.init_weights()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            if name.endswith(('bn3', 'downsample.1')):
                nn.init.constant_(module.weight, 0.3)
    model.train()
    with torch.no_grad():
        model(torch.randn(2, 3, 128, 128))
    torch.save(model.state_dict(), path)
    return Path(path)


def train_step(config_path, options: Sequence[str], work_dir) -> Step:
    """Train for one epoch with mmengine's Runner, on the data that ``options`` select."""
    config = read_config(config_path, options)
    config.work_dir = str(work_dir)
    # mmengine keeps one visualizer per name, and with it the folder of the first run.
    config.visualizer.name = str(work_dir)
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    config.test_cfg = config.test_dataloader = config.test_evaluator = None
    runner = Runner.from_cfg(config)
    gradients = {}

    def remember(name):
        def hook(parameter):
            gradients[name] = parameter.grad.abs().mean().item()

        return hook

    learning = {n: p for n, p in runner.model.named_parameters() if p.requires_grad}
    for name, parameter in learning.items():
        # The optimizer wrapper clears them after the step.
        parameter.register_post_accumulate_grad_hook(remember(name))
    runner.train()
    losses = {
        name.split('/')[1]: float(buffer.current())
        for name, buffer in runner.message_hub.log_scalars.items()
        if name.startswith('train/loss')
    }
    return Step(losses, gradients, list(learning), Path(work_dir, 'epoch_1.pth'))


def faults(step: Step) -> List[str]:
    """List the problems of a step: non-finite losses, parameters that do not learn."""
    wrong = [f'{name} is {x}' for name, x in step.losses.items() if not 0 < x < float('inf')]
    for name in step.learning:
        gradient = step.gradients.get(name, 0.0)
        if not 0 < gradient < float('inf'):
            wrong.append(f'the mean absolute gradient of {name} is {gradient}')
    return wrong


def run_tool(name: str, *arguments, cwd) -> str:
    """Run one of mmdet's own tools and return its output.

    Raises:
        RuntimeError: It failed; holds its output.
    """
    command = [sys.executable, '-m', 'sasa_det', 'tool', name, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise RuntimeError(f'{" ".join(command)} failed with {done.returncode}:\n{done.stdout}')
    return done.stdout


def evaluate(config_path, checkpoint, options: Sequence[str], cwd) -> Dict[str, float]:
    """Run mmdet's test.py.

    Returns:
        The COCO metrics by their names in the log.
    """
    printed = run_tool('test', config_path, checkpoint, '--cfg-options', *options, cwd=cwd)
    found = re.findall(r'coco/(bbox_mAP\w*): (-?[\d.]+)', printed)
    if not found:
        raise RuntimeError(f'test.py printed no COCO numbers:\n{printed}')
    return {name: float(value) for name, value in found}


def count(config_path, options: Sequence[str], cwd) -> Dict[str, str]:
    """Run mmdet's get_flops.py on one image of val; multiply-adds count as one.

    Returns:
        'Flops', 'Params' and 'Input shape', as printed.
    """
    printed = run_tool(
        'analysis_tools/get_flops', config_path, '--num-images', 1, '--cfg-options', *options,
        cwd=cwd,
    )  # fmt: skip
    return dict(re.findall(r'^(Flops|Params|Input shape): (.+)$', printed, re.MULTILINE))


def main() -> None:
    """Check the mixes and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('data', type=Path)
    parser.add_argument('configs', type=Path, nargs='*', default=LEAVES)
    arguments = parser.parse_args()
    table = sys.stdout
    row = '{:<45}{:>8}{:>9}{:>10}{:>8}{:>9}{:>10}{:>9}{:>7}'
    titles = ('config', 'loss', 'learning', 'min |g|', 'step s', 'boxes AP', 'MACs', 'params', 's')
    print(row.format(*titles), file=table, flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        backbone = write_backbone_checkpoint(Path(folder, 'resnet50.pth'))
        options = smoke_options(arguments.data.resolve(), backbone)
        for path in map(os.path.abspath, arguments.configs):
            start = time.time()
            with tempfile.TemporaryDirectory(dir=folder) as work_dir:
                step = train_step(path, options, work_dir)
                seconds = time.time() - start
                if faults(step):
                    sys.exit(f'{path}:\n' + '\n'.join(faults(step)))
                ap = evaluate(path, step.checkpoint, options, work_dir)['bbox_mAP']
                sums = count(path, options, work_dir)
            values = (
                Path(path).stem,
                f'{step.losses["loss"]:.3f}',
                len(step.learning),
                f'{min(step.gradients.values()):.1e}',
                f'{seconds:.0f}',
                f'{ap:.3f}',
                sums['Flops'],
                sums['Params'],
                f'{time.time() - start:.0f}',
            )
            print(row.format(*values), file=table, flush=True)


if __name__ == '__main__':
    main()
