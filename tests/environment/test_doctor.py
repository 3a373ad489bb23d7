"""The doctor in a fresh process, with stacks that are broken on purpose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sasa_det.environment import stack
from sasa_det.environment.doctor import describe_backend, examine, main
from sasa_det.ops.backends import cuda

ROOT = Path(__file__).resolve().parents[2]
MMCV = 'onedl-mmcv' if stack.is_fork() else 'mmcv'


def run(*arguments, path):
    """Run Python with a folder before all other packages."""
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join((str(path), str(ROOT)))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=path, env=env, capture_output=True, text=True
    )


def pretend(path, name, version):
    """Put a distribution's metadata into a folder."""
    info = path / f'{name.replace("-", "_")}-{version}.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')


def test_a_good_stack(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert ('the onedl fork' in printed) is stack.is_fork()
    rows, problems, backends = examine()
    assert problems == []
    for name, version, accepted, _ in rows:
        assert name in printed and version in printed and accepted in printed
    for name in ('reference', 'eager', 'native', 'triton', 'cuda'):
        assert name in backends and name in printed


@pytest.mark.parametrize(
    'outcome, said',
    [
        (None, 'it agrees with another backend'),
        ('output differs', "'auto' does not take it for the paper's layer: output differs"),
        (
            RuntimeError('out of memory'),
            'could not be compared with another backend: out of memory',
        ),
    ],
)
def test_says_whether_the_cuda_kernels_agree_with_another_backend(monkeypatch, outcome, said):
    def distrust_layer():
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(cuda, 'distrust_layer', distrust_layer)
    assert describe_backend('cuda', None).endswith(said)
    assert describe_backend('cuda', 'no GPU') == 'no: no GPU'


def test_quiet_prints_nothing_where_all_is_well(capsys):
    assert main(['--quiet']) == 0
    assert capsys.readouterr() == ('', '')


def test_a_wrong_version_stops_the_registration_but_not_the_doctor(tmp_path):
    pretend(tmp_path, MMCV, '2.2.0')
    complaint = f'{MMCV}: found 2.2.0; accepted is {stack.supported()[MMCV]}'
    assert run('-c', 'import sasa_det', path=tmp_path).returncode == 0
    imported = run('-c', 'import sasa_det; sasa_det.register()', path=tmp_path)
    assert imported.returncode == 1
    assert complaint in imported.stderr
    assert 'sasa-det doctor' in imported.stderr

    seen = run('-m', 'sasa_det', 'doctor', path=tmp_path)
    assert seen.returncode == 1
    assert complaint in seen.stdout
    assert stack.mend_command(MMCV) in seen.stdout
    assert 'All is well' not in seen.stdout


@pytest.mark.parametrize('module', ['torch', 'rich', 'cv2'])
def test_the_doctor_works_where_a_module_does_not_import(tmp_path, module):
    (tmp_path / f'{module}.py').write_text("raise ImportError('broken on purpose')\n")
    seen = run('-m', 'sasa_det', 'doctor', path=tmp_path)
    assert 'Traceback' not in seen.stderr
    assert seen.returncode == 1
    if module == 'torch':
        assert 'sasa_det.ops does not import: broken on purpose' in seen.stdout
    if module != 'rich':
        assert f'`import {module}` fails: broken on purpose' in seen.stdout


# torch 2.1 has neither function, and sasa_det.ops did not import there.
OLD = """
import sys
import torch.library
del torch.library.register_fake
vars(torch.library).pop('impl_abstract', None)
"""
NO_AUTO = """
from sasa_det.ops.backends import choice
choice._missing = 'no {} here'.format
"""


@pytest.mark.parametrize(
    ('break_it', 'said'),
    [
        (OLD, 'sasa_det.ops: found an import that fails: '),
        (
            NO_AUTO,
            "sasa_det.ops: found no backend for 'auto': "
            'no cuda here; no triton here; no native here; no eager here',
        ),
    ],
)
def test_an_operator_that_cannot_be_used_is_a_problem(tmp_path, break_it, said):
    run_doctor = (
        'import sys; from sasa_det.environment.doctor import main; sys.exit(main(sys.argv[1:]))'
    )
    code = f'{break_it}\n{run_doctor}'
    seen = run('-c', code, path=tmp_path)
    assert seen.returncode == 1, seen.stdout + seen.stderr
    assert said in seen.stdout
    assert 'Something is wrong' in seen.stdout
    quiet = run('-c', code, '--quiet', path=tmp_path)
    assert (quiet.returncode, quiet.stdout) == (1, '')
    assert said in quiet.stderr


def test_quiet_names_problems_only(tmp_path):
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text("__version__ = '2.1.0'\n")
    seen = run('-m', 'sasa_det', 'doctor', '--quiet', path=tmp_path)
    assert seen.returncode == 1
    assert seen.stdout == ''
    version = stack.installed_version(MMCV)
    assert f'{MMCV}: found {version}, but `import mmcv.ops` fails' in seen.stderr
    assert f'pip cache remove {MMCV}' in seen.stderr
