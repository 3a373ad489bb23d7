"""A folder is held by one process at a time, until that process ends, however it ends."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sasa_det.engine import work_dir_lock
from sasa_det.engine.work_dir_lock import hold_work_dir, release_work_dir

ROOT = Path(__file__).resolve().parents[2]
TRY = 'import sys; from sasa_det.engine.work_dir_lock import hold_work_dir; hold_work_dir(sys.argv[1])'


def last_line(folder):
    """What another process says that tries to hold the folder; nothing if it can."""
    done = subprocess.run(
        [sys.executable, '-c', TRY, str(folder)], capture_output=True, text=True, cwd=ROOT
    )
    return done.stderr.splitlines()[-1] if done.returncode else ''


def test_another_process_is_told_who_holds_it(tmp_path):
    folder = tmp_path / 'run'
    assert hold_work_dir(folder) and hold_work_dir(folder)  # again in this process
    said = last_line(folder)
    assert said.startswith(
        f'RuntimeError: work_dir {folder} is in use by process {os.getpid()} on {socket.gethostname()}, since 2'
    )
    assert said.endswith('choose another folder by --work-dir')
    # By another name, too.
    (tmp_path / 'link').symlink_to(folder)
    assert 'is in use by process' in last_line(tmp_path / 'link')
    release_work_dir(folder)
    assert not last_line(folder)


def test_a_killed_process_holds_nothing_even_if_its_workers_live(tmp_path):
    code = f"""{TRY}
import os, time
worker = os.fork()
if not worker:
    time.sleep(60)
print(worker, flush=True)
time.sleep(60)
"""
    command = [sys.executable, '-c', code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        worker = int(process.stdout.readline())
        assert f'process {process.pid} ' in last_line(tmp_path)
        process.kill()
    try:
        os.kill(worker, 0)  # it lives
        assert hold_work_dir(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
        release_work_dir(tmp_path)


def test_a_forked_process_does_not_hold_it(tmp_path):
    hold_work_dir(tmp_path)
    child = os.fork()
    if not child:
        try:
            hold_work_dir(tmp_path)
        except RuntimeError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert 'is in use' in last_line(tmp_path)
    release_work_dir(tmp_path)


def test_without_locks_it_is_logged_once(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, 'No locks available')

    logged = []
    monkeypatch.setattr('fcntl.lockf', refuse)
    monkeypatch.setattr(work_dir_lock, 'print_log', lambda text, **_: logged.append(text))
    assert not hold_work_dir(tmp_path)
    assert not hold_work_dir(tmp_path)
    release_work_dir(tmp_path)
    (text,) = logged
    assert 'cannot be locked (No locks available)' in text


@pytest.mark.parametrize(
    'command, more',
    [
        ('train', []),
        ('train', ['--launcher', 'pytorch']),
        ('compare', ['--seeds', '1']),
    ],
)
def test_commands_refuse_it_before_they_read_data(tmp_path, command, more):
    """There is no data here, and the config is not written into the folder."""
    work_dir = tmp_path / 'run'
    hold_work_dir(work_dir)
    argv = [command, 'retinanet_sasa-tiny_digits', '--work-dir', str(work_dir), *more]
    done = subprocess.run(
        [sys.executable, '-m', 'sasa_det', *argv],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', PATH='', RANK='0'),
    )  # fmt: skip
    release_work_dir(work_dir)
    assert done.returncode == 2, done.stdout
    said = f'sasa-det {command}: work_dir {work_dir} is in use by process {os.getpid()} on '
    assert done.stdout.splitlines()[-1].startswith(said)
    assert [path.name for path in work_dir.iterdir()] == ['.training']
