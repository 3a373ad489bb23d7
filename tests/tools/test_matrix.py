"""tools/test_matrix.sh on a made-up repository, with stubs for Python, the set-up and the tests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USED = 'awk bash cat cp dirname env git grep mkdir mv paste realpath sed tail tr'.split()
# A Python of pyenv that says which it is and makes environments of itself.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *'import ensurepip'*) echo VERSION ;;
    '-m venv '*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *'import platform, torch'*) echo 'VERSION.1 | 2.99' ;;
    *wheel.py*) echo "checked $2" ;;
esac
"""
SET_UP = """
echo "set up $SASA_TORCH $SASA_STACK ${PIP_CONSTRAINT:+below $(cat "$PIP_CONSTRAINT")}" >>"$STATE/calls"
[[ ! -e "$STATE/no-network" ]] || { echo 'no network'; exit 1; }
"""
RUN = """#!/usr/bin/env bash
echo "test $* in $PWD with $SASA_PYTHON" >>"$STATE/calls"
cat "$STATE/pytest"
"""


class Repository:
    """A repository that has the tool, in a folder with spaces."""

    def __init__(self, folder):
        self.root, self.state = folder / 'a check out', folder / 'state'
        self.state.mkdir()
        (self.root / 'tools').mkdir(parents=True)
        shutil.copy(ROOT / 'tools' / 'test_matrix.sh', self.root / 'tools')
        (self.root / 'tools' / 'setup_env.sh').write_text(SET_UP)
        (self.root / 'tools' / 'run_tests.sh').write_text(RUN)
        (self.root / '.gitignore').write_text('/work_dirs/\n')
        for version in ('3.10', '3.11'):
            python = folder / 'pyenv' / 'versions' / f'{version}.1' / 'bin' / 'python'
            python.parent.mkdir(parents=True)
            python.write_text(PYTHON.replace('VERSION', version))
            python.chmod(0o755)
        self.env = {**os.environ, 'PYENV_ROOT': str(folder / 'pyenv'), 'STATE': str(self.state)}
        # Without the Pythons of this machine, which may be of any version.
        (folder / 'path').mkdir()
        for name in USED:
            (folder / 'path' / name).symlink_to(shutil.which(name))
        self.env['PATH'] = str(folder / 'path')
        for name in ('SASA_MATRIX', 'PIP_CONSTRAINT'):
            self.env.pop(name, None)
        self.say('12 passed, 3 skipped in 4.56s')
        self.git('init', '--quiet')
        self.commit()

    def git(self, *arguments):
        who = ('-c', 'user.name=a', '-c', 'user.email=a@b.invalid')
        subprocess.run(['git', *who, *arguments], cwd=self.root, check=True, env=self.env)

    def commit(self):
        self.git('add', '--all')
        self.git('commit', '--quiet', '--allow-empty', '--message', 'Change')

    def say(self, text):
        """Set what the tests print."""
        (self.state / 'pytest').write_text(text + '\n')

    def calls(self):
        """The calls since the last question."""
        path = self.state / 'calls'
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def run(self, *arguments):
        """Run the tool; return its status and what it printed."""
        done = subprocess.run(
            ['bash', 'tools/test_matrix.sh', *arguments], cwd=self.root, env=self.env,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


OLD = ('--cell', 'py310-torch2.2')
ROW = '| py310-torch2.2 | 3.10.1 | 2.99 | openmmlab | the whole suite | 12 passed, 3 skipped |'


def test_a_cell_is_set_up_tested_and_not_run_again(repository):
    status, printed = repository.run(*OLD)
    assert status == 0, printed
    assert ROW in printed.splitlines()
    set_up, test = repository.calls()
    assert set_up == 'set up torch==2.2.2 openmmlab below numpy<2'
    clone = repository.root / 'work_dirs/matrix/py310-torch2.2/sasa_det'
    assert test == f'test -q in {clone} with {clone}/.venv/bin/python'

    status, printed = repository.run(*OLD)
    assert (status, repository.calls()) == (0, [])
    assert ROW in printed.splitlines()
    # But other tests are, and another commit.
    assert repository.run(*OLD, '--only', 'tests/ops', 'tests/layers')[0] == 0
    assert 'test -q tests/ops tests/layers in ' in repository.calls()[1]
    repository.commit()
    assert repository.run(*OLD)[0] == 0
    assert len(repository.calls()) == 2


def test_the_fork_has_an_environment_of_its_own(repository):
    status, printed = repository.run('--cell', 'py311-onedl')
    assert status == 0, printed
    set_up, test = repository.calls()
    assert set_up == 'set up torch==2.13.0 onedl '
    assert test.endswith('/.venv-onedl/bin/python')


def test_failed_tests_are_named(repository):
    repository.say('FAILED tests/a.py::test_b[1] - AssertionError: 2\n1 failed, 2 passed in 1s')
    for _ in range(2):
        status, printed = repository.run(*OLD)
        assert status == 1
        assert '| 1 failed, 2 passed |' in printed
        assert 'py310-torch2.2:\n    FAILED tests/a.py::test_b[1]\n' in printed


def test_what_did_not_finish_is_run_again(repository):
    (repository.state / 'no-network').touch()
    status, printed = repository.run(*OLD)
    assert status == 3 and 'py310-torch2.2: the set-up failed; see ' in printed
    (repository.state / 'no-network').unlink()
    repository.say('collecting ...')
    status, printed = repository.run(*OLD)
    assert status == 3 and 'py310-torch2.2: pytest did not finish; see ' in printed
    repository.say('1 passed in 1s')
    assert repository.run(*OLD)[0] == 0


def test_a_cell_without_its_python_does_not_keep_the_others(repository):
    status, printed = repository.run('--cell', 'py313-torch2.15', *OLD)
    assert status == 3
    assert 'py313-torch2.15: no Python 3.13 with its venv module was found' in printed
    assert ROW in printed.splitlines()


def test_a_wheel_is_checked_in_each_cell(repository):
    (repository.root / 'some.whl').touch()
    status, printed = repository.run(*OLD, '--wheel', 'some.whl')
    assert status == 0 and '| wheel good, 12 passed, 3 skipped |' in printed


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['--cell', 'py39'], '--cell must be one of: py310-torch2.2 py311-torch2.13 '),
        (['--only'], '--only needs paths of tests'),
        (['--wheel', 'none.whl'], "--wheel: there is no file 'none.whl'"),
        (['tests/ops'], "unknown argument 'tests/ops'; see --help"),
    ],
)
def test_wrong_arguments_are_refused(repository, arguments, said):
    status, printed = repository.run(*arguments)
    assert status == 2
    assert said in printed and repository.calls() == []
