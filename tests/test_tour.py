"""The notebook docs/tour.ipynb, cell by cell, in a folder of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def test_every_cell_of_the_tour_runs(tmp_path):
    cells = json.loads((ROOT / 'docs' / 'tour.ipynb').read_text())['cells']
    code = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    # Only its text is kept: outputs are large, and soon old.
    assert not [cell for cell in cells if cell.get('outputs') or cell.get('execution_count')]
    (tmp_path / 'cells.py').write_text('\n'.join(code))
    done = subprocess.run(
        [sys.executable, 'cells.py'],
        cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'output (2, 128, 28, 28)' in done.stdout
    assert 'native: ' in done.stdout
    layers = int(re.search(r'parameters, (\d+) attention layers', done.stdout)[1])
    assert layers > 5
    # The detector is trained: it is sure of the digits that it finds.
    scores = [
        float(each) for each in re.findall(r'image \d+: a \d+ at .*, score ([\d.]+)', done.stdout)
    ]
    assert len(scores) == 5 and min(scores) > 0.5
    shown = re.findall(r'^Image\.open\((.+)\)$', '\n'.join(code), re.MULTILINE)
    assert len(shown) == 2
    for path in (
        sorted((tmp_path / 'demo/pictures').iterdir())[0],
        tmp_path / 'demo/attention.png',
    ):
        assert Image.open(path).size[0] > 50
