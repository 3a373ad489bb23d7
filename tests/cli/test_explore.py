import functools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from sasa_det import demo
from sasa_det.cli.main import main


def refused(capsys, *args):
    assert main(['explore', *map(str, args)]) == 2
    return capsys.readouterr().err


@pytest.fixture
def gradio():
    pytest.importorskip('gradio', reason='the explorer\'s page needs gradio: the extra "demo"')


@pytest.mark.parametrize('quickstart', [False, True])
def test_the_default_detector(gradio, capsys, trained, tmp_path, monkeypatch, quickstart):
    """The quickstart's if it is there, or else the one that ships with the package."""
    from sasa_det.visualization.explorer import page

    if quickstart:
        (tmp_path / 'work_dirs').mkdir()
        folder = shutil.copytree(trained.parent, tmp_path / 'work_dirs/quickstart')
        (folder / 'epoch_1.pth').rename(folder / 'epoch_8.pth')
    checkpoint = 'work_dirs/quickstart/epoch_8.pth' if quickstart else str(demo.CHECKPOINT)
    examples = []

    def build_page(explorer, files, name):
        assert name == Path(checkpoint).name
        examples.extend(file.read_bytes() for file in files)

    monkeypatch.setattr(page, 'build_page', build_page)
    monkeypatch.setattr(page, 'serve', lambda *args, **options: None)
    monkeypatch.setattr(signal, 'signal', lambda *args: None)
    monkeypatch.setenv('GRADIO_TEMP_DIR', '')
    monkeypatch.chdir(tmp_path)
    assert main(['explore', '--device', 'cpu']) == 0
    assert f'detector: {checkpoint} with ' in capsys.readouterr().err
    assert examples == [path.read_bytes() for path in demo.images()]


def test_without_gradio_the_extra_is_named(capsys, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    assert "pip install 'sasa_det[demo]'" in refused(capsys, trained)


def test_a_checkpoint_that_runs_code_is_refused(gradio, capsys, trained, tmp_path):
    mark = tmp_path / 'was-here'

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    (tmp_path / 'tiny.py').write_bytes((trained.parent / 'tiny.py').read_bytes())
    for name, save in {
        'zip.pth': torch.save,
        'old.pth': lambda value, path: torch.save(
            value, path, _use_new_zipfile_serialization=False
        ),
        'bare.pth': lambda value, path: path.write_bytes(pickle.dumps(value)),
    }.items():
        save(dict(state_dict={}, meta=Evil()), tmp_path / name)
        error = refused(capsys, tmp_path / name)
        assert f'{name} is refused' in error or f'{name} cannot be read' in error, error
        assert not mark.exists()


@pytest.mark.parametrize('stop', [signal.SIGINT, signal.SIGTERM])
def test_it_serves_this_machine_until_it_is_stopped(gradio, trained, tmp_path, stop):
    command = [sys.executable, '-W', 'ignore', '-m', 'sasa_det', 'explore', str(trained)]
    # What a shell starts in the background ignores Ctrl-C, and so would what it starts in turn.
    heed_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    said, folder = tmp_path / 'said', tmp_path / 'files'
    folder.mkdir()
    with said.open('w') as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, preexec_fn=heed_ctrl_c,
            env={**os.environ, 'TMPDIR': str(folder)},
        )  # fmt: skip
    try:
        line = process.stdout.readline()
        while line and not line.startswith('http'):  # mmdet's fork prints when it is imported
            line = process.stdout.readline()
        assert line.startswith('http://127.0.0.1:'), said.read_text()
        steps = [
            'Loading Gradio',
            f'Loading {trained}',
            f'detector: {trained} with ',
            'Starting the page',
        ]
        lines = said.read_text().splitlines()
        assert [step for text in lines for step in steps if text.startswith(step)] == steps
        page = urllib.request.urlopen(line.split()[0], timeout=60).read().decode()
        assert 'attention explorer' in page
        time.sleep(0.5)
        assert list(folder.glob('*/gradio/*'))
        process.send_signal(stop)
        assert process.wait(60) in (0, 130)
        assert not list(folder.glob('*/gradio'))
    finally:
        process.kill()
        process.wait()
