"""What the studies share: the order of steps, what is told and written, and how a study ends."""

import json
import os
import signal

import pytest

from sasa_det.engine.work_dir_lock import release_work_dir
from sasa_det.experiments.training_run import RunFailed
from tools.paper import study
from tools.paper.study import Clock, Plan, Step, claim, make_parser, run_command, run_study


def fail(tell):
    raise RunFailed('train failed with 1')


def plan_of(*steps):
    return Plan(steps, 'AP {}'.format, dict, lambda results: f'{len(results)} rows\n')


@pytest.fixture
def run(tmp_path):
    """Runs steps as a study's command line does; a process may run them again."""
    options = make_parser('tried', '').parse_args(['--work-dir', str(tmp_path)])
    handler = signal.getsignal(signal.SIGTERM)
    yield lambda *steps: run_study('tried', options, lambda: plan_of(*steps))
    signal.signal(signal.SIGTERM, handler)
    release_work_dir(tmp_path)


def test_failures_are_told_last_and_leave_out_what_needs_them(run, tmp_path, capsys):
    def train(tell):
        tell('epoch 2 of 3')
        tell('epoch 2 of 3')
        return 80.0

    steps = (
        Step('a', 3, train),
        Step('b', 1, fail),
        Step('c', 1, train, 'b'),
        Step('d', 1, train, 'a'),
    )
    assert run(*steps) == 1
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        '[1 of 4] a: epoch 2 of 3; about 0 minutes left',
        '[1 of 4] a: AP 80.0',
        '[2 of 4] b: FAILED, train failed with 1',
        '[3 of 4] c: left out, as it needs: b',
        '[4 of 4] d: epoch 2 of 3; about 0 minutes left',
        '[4 of 4] d: AP 80.0',
        '2 rows',
    ]
    assert told.err == 'tried: FAILED, [2 of 4] b: train failed with 1\n'
    assert json.loads((tmp_path / 'results.json').read_text()) == dict(a=80.0, d=80.0)
    assert (tmp_path / 'results.md').read_text() == '2 rows\n'


def test_a_signal_that_ends_a_job_leaves_the_results_so_far(run, tmp_path, capsys):
    steps = (
        Step('a', 1, lambda tell: 1.0),
        Step('b', 1, lambda tell: os.kill(os.getpid(), signal.SIGTERM)),
    )
    assert run(*steps) == 130
    assert 'The same command goes on' in capsys.readouterr().err
    assert json.loads((tmp_path / 'results.json').read_text()) == dict(a=1.0)


def test_what_prevents_a_study_is_told_without_a_traceback(run, monkeypatch, capsys):
    def hold(folder):
        raise RuntimeError('work_dir is in use by process 1')

    monkeypatch.setattr(study, 'hold_work_dir', hold)
    assert run(Step('a', 1, fail)) == 2
    assert capsys.readouterr().err == 'tried: work_dir is in use by process 1\n'


def test_the_clock_knows_only_what_it_has_seen(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(study.time, 'monotonic', lambda: now[0])
    clock = Clock(10)
    assert clock.left() == '10 epochs left'
    clock.finish(2, False)  # done before
    assert clock.left() == '8 epochs left'
    now[0] = 600.0
    assert clock.left(2) == 'about 30 minutes left'
    clock.finish(4, True)
    assert clock.left() == 'about 10 minutes left'


def test_a_folder_is_of_one_study(tmp_path):
    folder = tmp_path / 'new'
    claim(folder, dict(seeds=3))
    claim(folder, dict(seeds=3))
    with pytest.raises(ValueError, match='holds results with other settings'):
        claim(folder, dict(seeds=4))


def test_a_command_that_fails_says_how_its_output_ends(tmp_path):
    output = tmp_path / 'out'
    run_command(['--help'], output)
    with pytest.raises(
        RunFailed, match=r'no-such-command failed with 2; .*out ends in\n(.*\n)*.*no-such'
    ):
        run_command(['no-such-command'], output)
