"""The tools of docs/reliability.md, in short."""

import subprocess
import sys
from pathlib import Path

import pytest

from sasa_det.data.digits import make_digits

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    'command, said',
    [
        ('full_disk.py --trials 1', '1 trials: 0 went wrong'),
        ('precision.py --iterations 30 --epochs 8', 'float16: 30 iterations'),
        # Memory settles only after hundreds of steps: of the short form the files and threads count.
        (
            'soak.py --iterations 20 --predictions 40 --trials 8 --most-growth 0.5',
            '4 threads, 8 images: 0 differ',
        ),
    ],
)
def test_it_holds(command, said):
    name, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tools/reliability' / name), *arguments],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert said in done.stdout


SMALL = """
_base_ = 'sasa_det::quickstart/{base}.py'
data_root = {data!r}
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
"""


def test_first_iterations_in_bfloat16(tmp_path):
    data = make_digits(tmp_path / 'digits', num_train=20, num_val=10, image_size=64, quiet=True)
    paths = []
    for base in ['retinanet_tiny_digits', 'retinanet_sasa-tiny_digits']:
        paths.append(tmp_path / f'small_{base}.py')
        paths[-1].write_text(SMALL.format(base=base, data=f'{data}/'))
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tools/reliability/first_iterations.py'), *map(str, paths),
         '--work-dir', str(tmp_path / 'runs'), '--epochs', '3'],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    for path in paths:
        assert f'{path.stem}: 15 iterations, loss ' in done.stdout
    assert (tmp_path / 'runs/training.png').stat().st_size > 10_000
