"""The script for one run on a GPU, rehearsed on the CPU where there is only torch and Triton."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_steps
from benchmarks.measuring import Rehearsal

SCRIPT = Path(__file__).resolve().parents[2] / 'benchmarks/gpu_run.sh'
# What an environment with torch and Triton need not have; pytest would only collect.
ABSENT = ('mmcv', 'mmdet', 'mmengine', 'mmpretrain', 'rich', 'cv2', 'pycocotools', 'pytest')


@pytest.fixture
def environment(tmp_path):
    """Make those modules impossible to find."""
    folder = tmp_path / 'blocked'
    folder.mkdir()
    (folder / 'sitecustomize.py').write_text(
        'import sys\n'
        'class Absent:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        f'        if name.partition(".")[0] in {ABSENT!r}:\n'
        '            raise ModuleNotFoundError(f"No module named {name!r}", name=name)\n'
        'sys.meta_path.insert(0, Absent())\n'
    )
    return {
        **os.environ,
        'OUT': str(tmp_path / 'out'),
        'PYTHON': sys.executable,
        'PYTHONPATH': str(folder),
        'OMP_NUM_THREADS': '1',
    }


def test_rehearsal(environment, tmp_path):
    done = subprocess.run(
        ['bash', SCRIPT, '--dry-run'], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    out = tmp_path / 'out'
    texts = {path.stem: path.read_text() for path in out.glob('*.txt')}
    assert done.returncode == 0, (done.stdout, done.stderr, texts)
    said = dict(re.findall(r'^(\w+) +(?:\d+ s)? +(\w.*)$', texts['summary'], re.MULTILINE))
    assert said.pop('races', '').startswith(('not run: there is no', 'ok'))
    assert said == dict(
        numerics='ok', shapes='ok', kernels='ok', small='ok',
        detectors='not run: mmcv and mmdet are not installed',
        tests='not run: pytest is not installed',
    )  # fmt: skip
    rows = json.loads((out / 'numerics.json').read_text())['rows']
    assert {row['backend'] for row in rows} >= {'triton'} and all(row['within'] for row in rows)
    rows = json.loads((out / 'shapes.json').read_text())['rows']
    cases = {(row['shape'], row['batch']) for row in rows if row.get('subject') == 'layer'}
    assert len(cases) == 18
    assert 'triton: ran' in texts['small']


def test_its_limits_add_up_to_nine_minutes():
    seconds = re.findall(r'^\s*step \w+ (\d+) ', SCRIPT.read_text(), re.MULTILINE)
    # Where races are looked for, `small` does not run.
    assert sum(map(int, seconds)) - 30 <= 540


def test_wrong_numerics_fail(monkeypatch, tmp_path, capsys):
    """A NaN as well."""
    monkeypatch.setattr(gpu_steps, 'find_backends', lambda: {'eager': None})
    right = gpu_steps.attend
    assert gpu_steps.numerics(Rehearsal(), tmp_path) == 0
    for wrong in (1.1, float('nan')):

        def attend(on, inputs, backend, factor=wrong, **options):
            results = right(on, inputs, backend, **options)
            if backend == 'eager':
                results[2] = results[2] * factor
            return results

        monkeypatch.setattr(gpu_steps, 'attend', attend)
        assert gpu_steps.numerics(Rehearsal(), tmp_path) == len(gpu_steps.DTYPES)
        assert '| key | False |' in capsys.readouterr().out


def test_an_unknown_argument_is_refused(tmp_path):
    done = subprocess.run(['bash', SCRIPT, '--fast'], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and 'usage' in done.stderr
    assert not list(tmp_path.iterdir())
