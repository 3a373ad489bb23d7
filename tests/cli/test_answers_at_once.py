"""Help, and mistakes in arguments and names of files, are answered before anything slow is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
SLOW = {'torch', 'numpy', 'cv2', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'sklearn', 'gradio'}
DIGITS = 'retinanet_sasa-tiny_digits'


def run(folder, *argv):
    """Run a command; returns what it ended with, and the slow packages that it imported."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'COLUMNS': '100'}
    done = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'sasa_det', *argv],
        cwd=folder, env=env, capture_output=True, text=True,
    )  # fmt: skip
    times, said = [], []
    for line in done.stderr.splitlines():
        (times if line.startswith('import time:') else said).append(line)
    imported = {line.rpartition('|')[2].strip() for line in times}
    assert 'sasa_det.cli.main' in imported
    return done.returncode, done.stdout, '\n'.join(said), imported & SLOW


@pytest.mark.parametrize('command', [*((name,) for name in COMMANDS), ('tool', 'test')], ids=str)
def test_help(tmp_path, command):
    status, printed, _, slow = run(tmp_path, *command, '--help')
    assert (status, slow) == (0, set())
    assert f'usage: sasa-det {" ".join(command)} [-h]' in printed
    assert 'train.py [-h]' not in printed


@pytest.mark.parametrize(
    'argv, message',
    [
        (['train', DIGITS[:-1]], f'{DIGITS[:-1]}: no such config'),
        (['train', '--work-dir', 'run', 'nowhere.py'], 'nowhere.py: no such config'),
        (['train', DIGITS, '--resume', 'nowhere.pth'], 'nowhere.pth: no such checkpoint'),
        (['test', 'nowhere.py', 'nowhere.pth'], 'nowhere.py: no such config'),
        (['test', DIGITS, 'nowhere.pth'], 'nowhere.pth: no such checkpoint'),
        (['test', DIGITS], 'the following arguments are required: checkpoint'),
        (['compare', DIGITS, 'nowhere', '--work-dir', 'run'], 'nowhere: no such config'),
        (['report', DIGITS, 'nowhere.pth', '--predictions', 'a.pkl', '--work-dir', 'run'],
         'nowhere.pth: no such checkpoint'),
        (['report', 'nowhere', 'here.pth', '--predictions', 'a.pkl', '--work-dir', 'run'],
         'nowhere: no such config'),
        (['configs', 'nowhere'], 'nowhere: no such config'),
        (['configs', 'nowhere', '--flatten', 'whole.py'], 'nowhere: no such config'),
        (['check-data', 'nowhere'], 'nowhere: no such config'),
        (['coco-config', '.', '--out', 'a.py', '--base', 'nowhere'], 'nowhere: no such config'),
        (['predict', 'here.pth', '--checkpoint', 'nowhere.pth', '--out', 'found'],
         'nowhere.pth: no such checkpoint'),
        (['predict', 'here.pth', '--checkpoint', 'here.pth', '--config', 'nowhere', '--out', 'found'],
         'nowhere: no such config'),
        (['explain', 'here.pth', '--checkpoint', 'nowhere.pth'], 'nowhere.pth: no such checkpoint'),
        (['diagnose', DIGITS, 'nowhere.pth'], 'nowhere.pth: no such checkpoint'),
        (['diagnose', DIGITS, 'here.pth', '--num-images', '0'], '--num-images must be at least 1'),
        (['explore', 'nowhere.pth'], 'nowhere.pth: no such checkpoint'),
        (['explore', 'here.pth', '--config', 'nowhere'], 'nowhere: no such config'),
        (['export', DIGITS, 'nowhere.pth', '--to', 'onnx'], 'nowhere.pth: no such checkpoint'),
        (['export', 'nowhere', 'here.pth', '--to', 'onnx'], 'nowhere: no such config'),
        (['tool', 'nowhere'], "mmdet has no tool 'nowhere'"),
        (['tool', 'test', DIGITS], 'the following arguments are required: checkpoint'),
        (['demo-data', '--num-train', 'many'], "invalid int value: 'many'"),
        (['box-crops', 'data'], 'the following arguments are required: out'),
    ],
    ids=lambda value: '-'.join(value[:2]) if isinstance(value, list) else '',
)  # fmt: skip
def test_mistakes(tmp_path, argv, message):
    (tmp_path / 'here.pth').touch()
    status, printed, said, slow = run(tmp_path, *argv)
    assert (status, slow) == (2, set()), said
    last = said.splitlines()[-1]
    assert last.startswith(f'sasa-det {argv[0]}') and message in last
    assert printed == ''
    assert [path.name for path in tmp_path.iterdir()] == ['here.pth']
