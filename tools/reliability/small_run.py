"""A training run of seconds, which each tool here breaks in one way.

It has some dozens of 64 px images, the tiny detector with attention in all parts, and one thread.
"""

import argparse
import os
import sys
import tempfile
from contextlib import contextmanager
from multiprocessing import Process, get_context
from pathlib import Path
from subprocess import STDOUT, Popen
from typing import Iterator

os.environ['OMP_NUM_THREADS'] = '1'  # a fixed order of sums, and a process that can be forked

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sasa_det.checkpoints.types import ASKS  # noqa: E402

NAME = 'config/small.py'  # not in the run's folder itself, where the run writes its own under the same name
CONFIG = """\
_base_ = {base!r}
image_scale = (64, 64)
# Flips make training depend on random numbers; that a mirrored digit is none does not matter here.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    dataset=dict(data_root={data!r}, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root={data!r})
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={data!r} + 'annotations/instances_val.json')
test_evaluator = val_evaluator
max_epochs = {epochs}
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
default_hooks = dict(checkpoint=dict(max_keep_ckpts={keep}), logger=dict(interval=1))
log_processor = dict(window_size=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, eta_min=1e-5),
]
{more}
"""


def make_data(folder: Path, train: int = 24, val: int = 10, size: int = 64) -> Path:
    """Make the images.

    Args:
        folder: The folder to write to.
        train, val: Numbers of images.
        size: Their width and height in pixels.

    Returns:
        The data set's folder.
    """
    from sasa_det.data.digits import make_digits

    return make_digits(folder / 'digits', num_train=train, num_val=val, image_size=size, quiet=True)


def write_config(
    folder: Path,
    data: Path,
    more: str = '',
    *,
    epochs: int = 4,
    keep: int = 2,
    base: str = 'sasa_det::quickstart/retinanet_sasa-tiny_digits.py',
) -> Path:
    """Write the config of a run into its folder.

    Args:
        folder: The run's folder, made if missing.
        data: The data set.
        more: Lines to append.
        epochs: Number of epochs, each of six iterations.
        keep: Number of checkpoints to keep.
        base: The config to inherit from.
    """
    path = folder / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CONFIG.format(base=base, data=f'{data}/', epochs=epochs, keep=keep, more=more))
    return path


def import_all() -> None:
    """Import the modules of a training."""
    import mmdet.apis  # noqa: F401

    import sasa_det  # noqa: F401


def start(folder: Path, *arguments: str, tool: str = 'train') -> Process:
    """Start mmdet's own tool in a run's folder, with its output in ``said.txt`` there.

    The process is forked from this one, which has done the imports: they take longer than the training.

    Args:
        folder: The run's folder, with its config.
        arguments: Further arguments of the tool.
        tool: The tool.
    """
    import_all()
    process = get_context('fork').Process(target=_work, args=(folder, tool, arguments))
    process.start()
    return process


def _work(folder: Path, tool: str, arguments: tuple) -> None:
    from sasa_det.cli.openmmlab_tools import run_tool

    os.setsid()
    os.chdir(folder)
    said = os.open('said.txt', os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    run_tool(tool, [NAME, *arguments, '--work-dir', '.'])


def run(folder: Path, *arguments: str, tool: str = 'train') -> str:
    """Run it to its end and return its output; raises RuntimeError if it fails."""
    process = start(folder, *arguments, tool=tool)
    process.join()
    said = (folder / 'said.txt').read_text(errors='replace')
    if process.exitcode:
        raise RuntimeError(f'{folder} ended with status {process.exitcode}:\n{said[-3000:]}')
    return said


def start_in_processes(
    folder: Path, *arguments: str, tool: str = 'train', processes: int = 2
) -> Popen:
    """Start it in several processes, by torchrun, with the output in ``said.txt`` too."""
    launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    words = ['-m', 'sasa_det', tool, NAME, *arguments, '--work-dir', '.']
    with open(folder / 'said.txt', 'ab') as said:
        return Popen(
            [sys.executable, *launch, *words, '--launcher', 'pytorch'],
            cwd=folder,
            stdout=said,
            stderr=STDOUT,
            env={**os.environ, 'PYTHONPATH': str(ROOT)},
            start_new_session=True,
        )


def weights(checkpoint: Path) -> dict:
    """The weights in a checkpoint; without a list of types, torch takes none but its own."""
    return torch.load(checkpoint, weights_only=ASKS, map_location='cpu')['state_dict']


def same(one: dict, other: dict) -> bool:
    """Whether weights agree in every bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def folder_of(options: argparse.Namespace) -> Iterator[Path]:
    """The folder to work in: the named one, which is kept, or a temporary one."""
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
        yield Path(options.folder).resolve()
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def arguments_of(about: str, trials: int) -> argparse.ArgumentParser:
    """A parser with the arguments that all tools here share."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--trials', type=int, default=trials, help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='of the trials; default: %(default)s')
    parser.add_argument('--folder', help='work there and leave all for a look')
    return parser
