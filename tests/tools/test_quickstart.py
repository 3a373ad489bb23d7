"""tools/quickstart.sh with a stub in the place of Python: what it runs, and in which order."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Records the commands of sasa_det, and leaves what they leave.
PYTHON = r"""#!/usr/bin/env bash
[[ "$*" != '-m sasa_det '* ]] || head -n 1 <<<"${*:3}" >>"$STATE/calls"
folder=work_dirs/quickstart
case "$*" in
    -c*'version_info[:2]'*) echo 3.11 ;;
    '-m sasa_det demo '*) exit "$(cat "$STATE/demo" 2>/dev/null || echo 0)" ;;
    '-m sasa_det train '*)
        echo "$folder/epoch_1.pth" >"$folder/last_checkpoint"
        exit "$(cat "$STATE/train" 2>/dev/null || echo 0)" ;;
    -) echo 'AP50 = 0.900' ;;
esac
"""


class Checkout:
    """The scripts, and a Python that has everything."""

    def __init__(self, folder):
        self.root, self.state = folder / 'a check out', folder / 'state'
        self.state.mkdir()
        shutil.copytree(ROOT / 'tools', self.root / 'tools')
        self.python = folder / 'python'
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def run(self, *argv):
        """Run the quickstart; return its status, what it printed and what it called."""
        (self.state / 'calls').write_text('')
        done = subprocess.run(
            ['bash', str(self.root / 'tools/quickstart.sh'), *argv],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.root,
            env={**os.environ, 'SASA_PYTHON': str(self.python), 'STATE': str(self.state)},
        )  # fmt: skip
        calls = (self.state / 'calls').read_text().splitlines()
        return done.returncode, done.stdout, [call for call in calls if call != 'doctor --quiet']


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_pictures_come_before_training(checkout):
    status, printed, calls = checkout.run()
    assert status == 0, printed
    assert [call.split()[0] for call in calls] == ['demo', 'demo-data', 'train', 'test', 'report']
    assert calls[0] == 'demo --out work_dirs/demo'
    assert printed.splitlines()[-1].endswith('/a check out/work_dirs/quickstart/index.html')
    # The second time the result is shown.
    status, printed, calls = checkout.run()
    assert (status, calls) == (0, [])
    assert 'This run has finished before' in printed


def test_without_training_there_are_pictures_alone(checkout):
    (checkout.root / 'work_dirs/demo').mkdir(parents=True)
    (checkout.root / 'work_dirs/demo/digits.pth').write_text('of another version')
    status, printed, calls = checkout.run('--no-train')
    assert (status, calls) == (0, ['demo --out work_dirs/demo']), printed
    assert not (checkout.root / 'work_dirs/quickstart').exists()
    assert not (checkout.root / 'work_dirs/demo/digits.pth').exists()


@pytest.mark.parametrize('other', [('--fresh',), ('--epochs', '2'), ('--work-dir', 'runs')])
def test_without_training_there_is_nothing_to_set(checkout, other):
    status, printed, calls = checkout.run('--no-train', *other)
    assert (status, calls) == (2, [])
    assert printed == '--no-train goes without other arguments, which are of the training\n'


def test_what_goes_on_draws_no_first_pictures(checkout):
    (checkout.state / 'train').write_text('130')
    status, printed, calls = checkout.run()
    assert (status, calls[-1].split()[0]) == (130, 'train'), printed
    (checkout.state / 'train').unlink()
    status, printed, calls = checkout.run()
    assert status == 0, printed
    assert [call.split()[0] for call in calls] == ['demo-data', 'train', 'test', 'report']
    assert calls[1].endswith('--resume')
    assert 'Going on from work_dirs/quickstart/epoch_1.pth' in printed


def test_pictures_that_fail_end_it(checkout):
    (checkout.state / 'demo').write_text('2')
    status, _, calls = checkout.run()
    assert (status, len(calls)) == (2, 1)
    # The same command begins anew.
    (checkout.state / 'demo').unlink()
    assert checkout.run()[0] == 0
