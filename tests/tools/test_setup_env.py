"""tools/setup_env.sh with stubs in the place of Python, pip and the compiler."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sasa_det.environment.stack import MINIMUM_PYTHON

ROOT = Path(__file__).resolve().parents[2]
USED = (
    'bash cat cksum grep mkdir rm tail wc tr sleep cp mktemp dirname basename date head env'.split()
)
# A Python of version VERSION. It answers the script's questions, and records its other calls.
PYTHON = r"""#!/usr/bin/env bash
state="$STATE"
case "$*" in
    -c*'version_info[:2]'*) [[ VERSION != broken ]] || exit 1; echo VERSION ;;
    -c*'import venv'*) [[ ! -e "$state/no-venv-VERSION" ]] ;;
    -c*Python.h*) [[ ! -e "$state/no-headers-VERSION" ]] ;;
    -c*mmcv.ops*) [[ -e "$state/ops" ]] ;;
    -c*'version("torch")'*) cat "$state/torch" 2>/dev/null || echo 2.13.0 ;;
    --version) echo Python VERSION.0 ;;
    '-m venv '*)
        echo "venv VERSION" >>"$state/calls"
        mkdir -p "$3/bin" "$3/lib/pythonVERSION"
        cp "$0" "$3/bin/python"
        printf '#!%s/bin/python\n' "$3" >"$3/bin/pip" ;;
    '-m pip --version') ;;
    '-m pip cache list '*) cat "$state/cache" 2>/dev/null ;;
    '-m pip cache remove '*) rm "$state/cache" ;;
    '-m pip show '*) [[ -e "$state/installed" ]] ;;
    '-m pip install '*)
        if [[ -e "$state/no-network" ]]; then
            echo "WARNING: Retrying after connection broken by 'NewConnectionError('<...>')': /simple/"
            echo 'ERROR: No matching distribution found for setuptools'
            exit 1
        fi
        printf '%s' "${*:4}" >>"$state/calls"
        if [[ -n "${MMCV_WITH_OPS:-}" ]]; then
            printf ' [jobs %s, %s]' "$MAX_JOBS" "${CXX:-no CXX}" >>"$state/calls"
            [[ "$(cat "$state/cache" 2>/dev/null)" == *broken* ]] || : >"$state/ops"
            : >"$state/installed"
        fi
        echo >>"$state/calls" ;;
    '-m sasa_det.environment.mmcv_build obstacles') cat "$state/obstacles" 2>/dev/null || true ;;
    '-m sasa_det.environment.mmcv_build jobs')
        [[ ! -e "$state/little" ]] || { cat "$state/little" >&2; exit 1; }
        echo 2 ;;
    '-m sasa_det.environment.mmcv_build source '*) echo "source" >>"$state/calls" ;;
    '-m sasa_det doctor'*) ;;
    *stack.py*) exec REAL "$@" ;;
esac
"""
GPP = '#!/usr/bin/env bash\necho "g++ 12.2.0, Copyright (C) 2022 Free Software Foundation, Inc."\n'


class Machine:
    """A checkout in a folder with spaces, and a PATH on which there are only stubs."""

    def __init__(self, folder):
        self.root = folder / 'a check out'
        self.state = folder / 'state'
        self.path = folder / 'path'
        self.temporary = folder / 'temporary'
        for made in (self.state, self.path, self.temporary, self.root / 'tools'):
            made.mkdir(parents=True)
        for name in ('setup_env.sh', 'pch_cxx.sh'):
            shutil.copy(ROOT / 'tools' / name, self.root / 'tools')
        for name in ('setup.py', 'pyproject.toml', 'sasa_det.pth', 'sasa_det.start'):
            shutil.copy(ROOT / name, self.root)
        for name in ('environment', 'ops/csrc', 'export/csrc'):
            shutil.copytree(ROOT / 'sasa_det' / name, self.root / 'sasa_det' / name)
        for name in (*USED, 'flock'):
            (self.path / name).symlink_to(shutil.which(name))
        self.add('g++', GPP)
        self.venv = self.root / '.venv'

    def add(self, name, text):
        """Put a script on the PATH."""
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755)

    def add_python(self, version, name=None):
        """Put a Python on the PATH."""
        text = PYTHON.replace('VERSION', version).replace('REAL', sys.executable)
        self.add(name or f'python{version}', text)

    def say(self, name, text=''):
        """Set what the stubs answer."""
        (self.state / name).write_text(text)

    def calls(self):
        """What was installed, in order."""
        path = self.state / 'calls'
        return path.read_text().splitlines() if path.exists() else []

    def set_up(self, **env):
        """Run the set-up as quickstart.sh does; return its status and what it printed."""
        inherited = {'PATH': str(self.path), 'STATE': str(self.state), 'HOME': str(self.root)}
        script = f'set -euo pipefail; source "{self.root}/tools/setup_env.sh"; echo "use $PYTHON"'
        done = subprocess.run(
            ['bash', '-c', script], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**inherited, 'TMPDIR': str(self.temporary), **env},
        )  # fmt: skip
        assert 'Traceback' not in done.stdout
        assert not list(self.temporary.iterdir())
        return done.returncode, done.stdout


@pytest.fixture
def machine(tmp_path):
    """A machine with Python 3.11."""
    made = Machine(tmp_path)
    made.add_python('3.11')
    return made


def refused(machine, *said, **env):
    """Check that the set-up ends with these words and has downloaded nothing."""
    status, printed = machine.set_up(**env)
    assert status == 1, printed
    for words in said:
        assert words in printed
    assert [call for call in machine.calls() if not call.startswith('venv')] == []
    assert not (machine.venv / 'setup.done').exists()


def test_a_set_up_builds_mmcv_with_the_wrapper(machine):
    status, printed = machine.set_up()
    assert status == 0, printed
    assert printed.endswith(f'use {machine.venv}/bin/python\n')
    venv, tools, torch, mmcv, sasa_det = machine.calls()
    assert venv == 'venv 3.11'
    assert tools.startswith('setuptools>=') and torch == 'torch==2.13.0'
    assert mmcv.startswith('--no-build-isolation mmcv==2.1.0 [jobs 2, ')
    assert mmcv.endswith('/g++]')
    assert sasa_det.endswith(f'--editable {machine.root}[tests]')
    # The second time there is nothing to do.
    assert machine.set_up() == (0, f'use {machine.venv}/bin/python\n')
    assert len(machine.calls()) == 5


@pytest.mark.parametrize('why', ['clang', 'own CXX', 'a folder with a space'])
def test_mmcv_is_built_plainly_where_the_wrapper_cannot_work(machine, why):
    env = {}
    if why == 'clang':
        machine.add('g++', '#!/usr/bin/env bash\necho "Apple clang version 15.0.0"\n')
    elif why == 'own CXX':
        machine.add('my-c++', GPP)
        env['CXX'] = 'my-c++'
    else:
        machine.temporary = machine.root / 'temporary files'
        machine.temporary.mkdir()
    status, printed = machine.set_up(**env)
    assert status == 0, printed
    assert machine.calls()[3].endswith(f'[jobs 2, {env.get("CXX", "no CXX")}]')


def test_a_number_of_jobs_that_the_user_sets_is_kept(machine):
    machine.say('little', '1.0 GB of memory are available')
    assert machine.set_up(MAX_JOBS='7')[0] == 0
    assert '[jobs 7, ' in machine.calls()[3]


def test_a_newer_python_is_taken_behind_an_old_python3(tmp_path):
    machine = Machine(tmp_path)
    machine.add_python('3.9', 'python3')
    machine.add_python('broken', 'python3.12')
    machine.add_python('3.13')
    status, printed = machine.set_up()
    assert status == 0, printed
    assert machine.calls()[0] == 'venv 3.13'


def test_a_python_with_its_headers_goes_before_one_without(machine):
    machine.add_python('3.12')
    machine.say('no-headers-3.11')
    assert machine.set_up()[0] == 0
    assert machine.calls()[0] == 'venv 3.12'


def test_source_that_must_be_mended_is(machine):
    """pip's cached wheel was not built from it."""
    machine.say('cache', ' - mmcv-2.1.0-cp311-cp311-linux_x86_64.whl (1.4 MB)\n')
    machine.say('obstacles', 'mmcv builds with torch <2.14, and here is 2.14.1\n')
    status, printed = machine.set_up()
    assert status == 0, printed
    assert 'mmcv builds with torch <2.14, and here is 2.14.1: its source is mended' in printed
    assert machine.calls()[3] == 'source'
    assert machine.calls()[4].startswith(f'--no-build-isolation {machine.temporary}/')


def test_a_cached_wheel_needs_no_compiler(machine):
    (machine.path / 'g++').unlink()
    machine.say('cache', ' - mmcv-2.1.0-cp311-cp311-linux_x86_64.whl (1.4 MB)\n')
    assert machine.set_up()[0] == 0


@pytest.mark.parametrize(
    'wheel', ['mmcv-2.1.0-cp312-cp312-linux_x86_64.whl', 'mmcv-2.0.1-cp311-cp311-linux_x86_64.whl']
)
def test_a_cached_wheel_of_another_version_does_not_count(machine, wheel):
    machine.say('cache', f' - {wheel} (1.4 MB)\n')
    (machine.path / 'g++').unlink()
    refused(machine, 'g++ was not found')


def test_a_cached_wheel_that_does_not_import_is_built_anew(machine):
    machine.say('cache', ' - mmcv-2.1.0-cp311-cp311-linux_x86_64.whl (broken)\n')
    status, printed = machine.set_up()
    assert status == 0, printed
    assert "pip's cached mmcv does not import" in printed
    rebuilt = '--no-build-isolation --force-reinstall --no-deps --no-binary mmcv mmcv==2.1.0'
    assert machine.calls()[4].startswith(rebuilt)


def test_the_screen_says_that_a_new_build_lacks_a_compiler(machine):
    machine.say('cache', ' - mmcv-2.1.0-cp311-cp311-linux_x86_64.whl (broken)\n')
    (machine.path / 'g++').unlink()
    status, printed = machine.set_up()
    assert status == 1
    assert 'g++ was not found; it is needed once, to build mmcv.' in printed


# --- What is refused before anything is downloaded


def test_no_compiler(machine):
    (machine.path / 'g++').unlink()
    refused(machine, 'g++ was not found', 'apt install g++ python3.11-dev')


def test_no_headers(machine):
    machine.say('no-headers-3.11')
    refused(machine, 'Python 3.11 lacks its header Python.h', 'apt install python3.11-dev')


def test_too_little_memory(machine):
    machine.say('little', '1.0 GB of memory are available, and the build of mmcv needs 2.2 GB\n')
    refused(machine, 'setup: 1.0 GB of memory are available, and the build of mmcv needs 2.2 GB.')


def test_no_python_that_can_be_used(tmp_path):
    machine = Machine(tmp_path)
    machine.add_python('3.14', 'python3')
    machine.add_python('3.12')
    machine.say('no-venv-3.12')
    refused(
        machine,
        'no Python of a version from 3.10 to 3.13',
        'python3 is Python 3.14',
        'python3.12 lacks its venv module (Debian, Ubuntu: apt install python3.12-venv)',
        'SASA_PYTHON=/path/to/python',
    )
    assert not machine.venv.exists()


@pytest.mark.parametrize(
    ('torch', 'said'),
    [
        ('torch==2.1.2', 'torch==2.1.2 is not supported; accepted is torch>=2.2.'),
        ('2.5.1', "'2.5.1' is no requirement of torch for pip; write, for example, torch=="),
    ],
)
def test_a_torch_that_is_not_supported(machine, torch, said):
    refused(machine, said, SASA_TORCH=torch)


def test_a_torch_of_a_range_is_checked_once_it_is_installed(machine):
    machine.say('torch', '2.1.2')
    status, printed = machine.set_up(SASA_TORCH='torch<2.2')
    assert status == 1
    assert 'torch==2.1.2 is not supported' in printed
    assert not [call for call in machine.calls() if 'mmcv' in call]


def test_no_network(machine):
    machine.say('no-network')
    refused(machine, 'build tools failed, as pip cannot reach its package index', 'PIP_INDEX_URL')
    (machine.state / 'no-network').unlink()
    assert machine.set_up()[0] == 0


def test_a_checkout_that_cannot_be_written(machine):
    (machine.root / '.venv.lock').mkdir()
    refused(machine, f'{machine.venv}.lock cannot be written.', 'SASA_PYTHON=/path/to/python')


def test_without_flock_the_set_up_goes_on(machine):
    (machine.path / 'flock').unlink()
    status, printed = machine.set_up()
    assert status == 0
    assert 'flock was not found: start no second set-up here' in printed


# --- A Python or an environment that is there


@pytest.mark.parametrize(
    ('version', 'said'),
    [
        ('3.9', 'is Python 3.9, and sasa_det needs 3.10 or later.'),
        ('2.7', 'is Python 2.7, and sasa_det needs 3.10 or later.'),
        ('broken', 'is not a Python that starts.'),
    ],
)
def test_a_python_of_the_user_that_cannot_be_used(machine, version, said):
    assert MINIMUM_PYTHON == (3, 10)
    machine.add_python(version, 'mine')
    for name in ('mine', str(machine.path / 'mine')):
        refused(machine, f'SASA_PYTHON={name} {said}', SASA_PYTHON=name)
    refused(machine, 'is not a Python that starts', SASA_PYTHON='/no such/python')


@pytest.mark.parametrize('version', ['3.10', '3.14'])
def test_a_python_of_the_user_is_used_as_it_is(machine, version):
    machine.add_python(version, 'mine')
    name = str(machine.path / 'mine')
    assert machine.set_up(SASA_PYTHON=name) == (0, f'use {name}\n')
    assert machine.calls() == []


def test_a_moved_environment_is_made_anew(machine):
    assert machine.set_up()[0] == 0
    elsewhere = machine.root.with_name('moved')
    machine.root.rename(elsewhere)
    machine.root, machine.venv = elsewhere, elsewhere / '.venv'
    status, printed = machine.set_up()
    assert status == 0, printed
    assert f'making {machine.venv} anew: it was moved here from another folder' in printed
    assert f'#!{machine.venv}/bin/python' in (machine.venv / 'bin' / 'pip').read_text()


def test_a_checkout_behind_a_link_keeps_its_environment(machine):
    assert machine.set_up()[0] == 0
    link = machine.root.with_name('link')
    link.symlink_to(machine.root)
    venv, machine.root = machine.venv, link
    assert machine.set_up() == (0, f'use {venv}/bin/python\n')


@pytest.mark.parametrize(
    ('version', 'why'),
    [
        ('3.12', 'its Python is now 3.12, and was another version when it was made'),
        ('3.9', 'its Python is 3.9, and 3.10 to 3.13 are supported'),
        ('broken', 'its Python does not start'),
    ],
)
def test_an_environment_of_another_python_is_made_anew(machine, version, why):
    assert machine.set_up()[0] == 0
    machine.add_python(version, 'other')
    shutil.copy(machine.path / 'other', machine.venv / 'bin' / 'python')
    status, printed = machine.set_up()
    assert status == 0, printed
    assert f'making {machine.venv} anew: {why}' in printed
    assert machine.calls()[5] == 'venv 3.11'


def test_an_environment_of_the_user_in_the_same_place_is_left_alone(machine):
    (machine.venv / 'bin').mkdir(parents=True)
    (machine.venv / 'precious').write_text('')
    refused(machine, f'{machine.venv} cannot be used, and was not made by this script')
    assert (machine.venv / 'precious').exists()
