#!/usr/bin/env python
"""Plot loss and gradient's norm of the first iterations of configs in bfloat16, on the CPU.

    python tools/reliability/first_iterations.py configs/quickstart/retinanet_tiny_digits.py \
        configs/quickstart/retinanet_sasa-tiny_digits.py --work-dir work_dirs/first_iterations

The configs' own schedules, of which the first four epochs are run: 500 iterations on the digits. Mixed
precision is torch's autocast on the CPU, which mmengine's AmpOptimWrapper leaves out. Writes
WORK_DIR/training.png. Exit status 1 if a loss is not finite or does not fall.
"""

import argparse
import math
import sys
from contextlib import contextmanager
from pathlib import Path

from sasa_det.evaluation.training_log import read_training_log

import torch  # isort: skip
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """An optimizer wrapper with autocast to bfloat16, whose range needs no loss scaling."""

    @contextmanager
    def optim_context(self, model):
        """See mmengine."""
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


def train(path: Path, folder: Path, epochs: int) -> bool:
    """Train a config for its first epochs, and return whether the loss stays finite and falls."""
    config = Config.fromfile(path)
    config.merge_from_dict(
        {
            'work_dir': str(folder),
            # mmengine reuses a visualizer of the same name, with its folder.
            'visualizer.name': path.stem,
            'optim_wrapper.type': 'BFloat16OptimWrapper',
            'train_cfg.max_epochs': epochs,
            'train_cfg.val_interval': epochs + 1,
            'default_hooks.logger.interval': 5,
            'log_processor.window_size': 5,
        }
    )
    Runner.from_cfg(config).train()
    records = read_training_log(folder).train
    losses = [record['loss'] for record in records]
    norms = [record['grad_norm'] for record in records]
    print(
        f'{path.stem}: {records[-1]["step"]} iterations, loss {losses[0]:.2f} to {losses[-1]:.2f}, at most '
        f"{max(losses):.2f}; gradient's norm {norms[0]:.1f} to {norms[-1]:.1f}, at most {max(norms):.1f}",
        flush=True,
    )
    return all(map(math.isfinite, losses + norms)) and losses[-1] < losses[0]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', type=Path, metavar='CONFIG')
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--epochs', type=int, default=4)
    options = parser.parse_args()
    from sasa_det.experiments.compare import draw_training

    folders = {path.stem: options.work_dir / path.stem for path in options.configs}
    good = [train(path, folders[path.stem], options.epochs) for path in options.configs]
    draw_training(folders).savefig(options.work_dir / 'training.png', dpi=100)
    sys.exit(not all(good))


if __name__ == '__main__':
    main()
