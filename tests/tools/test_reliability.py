"""The tools of docs/reliability.md, in short."""

import subprocess
import sys
from pathlib import Path

import pytest

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
