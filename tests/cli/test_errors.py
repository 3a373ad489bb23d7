"""The last line of a command that fails is its own sentence, and no warnings of others are around it."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sasa_det.cli.main import main
from sasa_det.cli.process import hide_dependencies_warnings
from sasa_det.data.digits import make_digits

ROOT = Path(__file__).resolve().parents[2]


def fail_with(monkeypatch, error):
    def run(options):
        raise error

    monkeypatch.setattr('sasa_det.cli.hand_over.run', run)


def test_an_error_while_data_is_loaded_ends_in_its_sentence(trained, tmp_path):
    """The error is raised in another process, and mmdet has printed to stdout before."""
    data = make_digits(tmp_path / 'digits', num_train=10, num_val=10, image_size=64, quiet=True)
    image = sorted((data / 'val').iterdir())[0]
    image.write_bytes(image.read_bytes()[:200])
    root = f'{data}/'
    done = subprocess.run(
        [
            sys.executable, '-m', 'sasa_det', 'test', str(trained.with_name('tiny.py')), str(trained),
            '--work-dir', 'run', '--cfg-options', f'test_dataloader.dataset.data_root={root}',
            f'test_evaluator.ann_file={root}annotations/instances_val.json',
        ],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', PATH=''),
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert 'loading annotations into memory' in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f'sasa-det test: ValueError: image {image}'), last


@pytest.mark.parametrize(
    'error, said',
    [
        (AssertionError(), 'AssertionError without a message; `sasa-det --traceback` shows where'),
        (AssertionError('a must be b'), 'AssertionError: a must be b'),
        (KeyError('name'), "KeyError: 'name'"),
        (ValueError('a must be b'), 'a must be b'),
    ],
)
def test_each_error_has_a_sentence(monkeypatch, capsys, error, said):
    fail_with(monkeypatch, error)
    assert main(['train']) == 2
    assert capsys.readouterr().err == f'sasa-det train: {said}\n'


def test_torchrun_ends_with_the_sentence_too(monkeypatch, tmp_path):
    """It shows what its processes leave in a file; without one, how to write one."""
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / 'error.json'))
    fail_with(monkeypatch, ValueError('a must be b'))
    assert main(['train']) == 2
    left = json.loads((tmp_path / 'error.json').read_text())['message']['extraInfo']['py_callstack']
    assert left.endswith('ValueError: a must be b\n')


@pytest.mark.parametrize(
    'module, hidden',
    [
        ('mmengine.model.wrappers.distributed', True),
        ('mmdet.apis', True),
        ('mmdet_of_mine.model', False),
        ('my_model', False),
        ('sasa_det.layers', False),
    ],
)
def test_only_the_dependencies_own_warnings_are_hidden(module, hidden):
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        hide_dependencies_warnings()
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.warn_explicit('it changes', category, 'file.py', 1, module=module)
    shown = [warning.category for warning in caught]
    assert shown == [UserWarning] if hidden else len(shown) == 3


def test_what_a_user_asks_for_is_shown():
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter('error', FutureWarning)
        hide_dependencies_warnings()
        with pytest.raises(FutureWarning):
            warnings.warn_explicit('it changes', FutureWarning, 'file.py', 1, module='mmengine')
