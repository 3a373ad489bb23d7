"""A run that was stopped anywhere goes on from the last whole checkpoint and ends the same."""

import errno
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from sasa_det.checkpoints.loading import find_damage
from sasa_det.checkpoints.types import ASKS
from sasa_det.engine.hooks.checkpoint_hook import WholeCheckpointHook

ROOT = Path(__file__).resolve().parents[3]
EPOCHS = 4


class Noisy(BaseModel):
    """A line to fit, by a step that draws from torch."""

    def __init__(self, width=1):
        super().__init__()
        self.fit = nn.Linear(1, width)

    def forward(self, x, y, mode='tensor'):
        return {'loss': (nn.functional.dropout(self.fit(x), 0.3) - y).square().mean()}


class Points(torch.utils.data.Dataset):
    """Points that are moved at random, by Python's, numpy's and torch's generators."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        x = torch.full((1,), index / 4 + random.random() + np.random.random())
        return x, 3 * x + torch.rand(1)


def make_runner(folder, *, workers=0, iters=None, stop_at=None, width=1, seed=0, **more):
    """A Runner whose checkpoints are WholeCheckpointHook's; `stop_at` epochs it is stopped."""
    train_cfg = {'by_epoch': True, 'max_epochs': EPOCHS}
    if iters:
        train_cfg = {'by_epoch': False, 'max_iters': iters}
    name = 'InfiniteSampler' if iters else 'DefaultSampler'
    checkpoint = {'type': 'WholeCheckpointHook', 'by_epoch': not iters, 'max_keep_ckpts': 2}
    checkpoint['interval'] = 3 if iters else 1
    options = {
        'work_dir': str(folder),
        'train_cfg': train_cfg,
        'train_dataloader': {
            'batch_size': 4,
            'num_workers': workers,
            'persistent_workers': workers > 0,
            'dataset': Points(),
            'sampler': {'type': name, 'shuffle': True},
            'collate_fn': {'type': 'default_collate'},
        },
        'optim_wrapper': {'optimizer': {'type': 'AdamW', 'lr': 0.05}},
        'param_scheduler': {'type': 'ExponentialLR', 'gamma': 0.7, 'by_epoch': not iters},
        'default_hooks': {'checkpoint': checkpoint, 'sampler_seed': {'type': 'EpochSeedHook'}},
        'randomness': {'seed': seed},
        'experiment_name': f'{folder.name}-{time.monotonic_ns()}',
        'log_level': 'ERROR',
        **more,
    }
    torch.manual_seed(0)  # the weights to begin with
    runner = Runner(model=Noisy(width), **options)
    if stop_at:
        runner.register_hook(StopHook(stop_at), priority='LOWEST')
    return runner


class Stopped(Exception):
    pass


class StopHook(Hook):
    """Ends a run in the middle of what follows a checkpoint."""

    def __init__(self, at):
        self.at = at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.at:
            raise Stopped


def stop(folder, at, make=make_runner, **options):
    with pytest.raises(Stopped):
        make(folder, stop_at=at, **options).train()


def weights(path):
    return torch.load(path, weights_only=ASKS)['state_dict']


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize('workers', [0, 2])
def test_epochs_resume_to_the_bit(tmp_path, workers):
    make_runner(tmp_path / 'alone', workers=workers).train()
    stop(tmp_path / 'stopped', 5, workers=workers)  # the third epoch of two iterations
    torch.rand(7)
    make_runner(tmp_path / 'stopped', workers=workers, resume=True).train()
    last = f'epoch_{EPOCHS}.pth'
    assert_same(weights(tmp_path / 'alone' / last), weights(tmp_path / 'stopped' / last))


def test_iterations_resume_to_the_bit(tmp_path):
    make_runner(tmp_path / 'alone', iters=9).train()
    stop(tmp_path / 'stopped', 8, iters=9)
    torch.rand(7)
    make_runner(tmp_path / 'stopped', iters=9, resume=True).train()
    assert_same(weights(tmp_path / 'alone/iter_9.pth'), weights(tmp_path / 'stopped/iter_9.pth'))


def test_without_a_seed_the_checkpoints_is_taken_over(tmp_path):
    folder = tmp_path / 'run'
    stop(folder, 3, seed=None)
    seed = torch.load(folder / 'epoch_1.pth')['meta']['seed']
    make_runner(folder, seed=None, resume=True).train()
    make_runner(tmp_path / 'alone', seed=seed).train()
    last = f'epoch_{EPOCHS}.pth'
    assert_same(weights(tmp_path / 'alone' / last), weights(folder / last))


def test_each_epoch_and_worker_draws_other_numbers(tmp_path):
    """mmengine seeds workers alike for each epoch."""
    runner = make_runner(tmp_path, workers=2)
    loader = runner.build_dataloader(runner._train_dataloader)
    runner._train_loop = runner.build_train_loop({'by_epoch': True, 'max_epochs': 2})
    hook = next(h for h in runner.hooks if type(h).__name__ == 'EpochSeedHook')
    del loader
    draws = []
    for epoch in range(2):
        runner.train_loop._epoch = epoch
        hook.before_train_epoch(runner)
        draws += [float(x) for batch in runner.train_dataloader for x in batch[0]]
    assert len(set(draws)) == len(draws)


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    """A run of two whole checkpoints, stopped in its third epoch."""
    folder = tmp_path_factory.mktemp('stopped') / 'run'
    stop(folder, 5)
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    copy = shutil.copytree(stopped, tmp_path / 'run')
    (copy / 'last_checkpoint').write_text(str(copy / 'epoch_2.pth'))
    return copy


def damage(path, how):
    content = path.read_bytes()
    if how == 'cut':
        path.write_bytes(content[: len(content) // 2])
    elif how == 'empty':
        path.write_bytes(b'')
    elif how == 'flipped':
        place = content.index(b'fit.weight')
        path.write_bytes(content[:place] + b'F' + content[place + 1 :])
    elif how == 'gone':
        path.unlink()


DAMAGES = {
    'cut': 'is cut short: the end of the file is not there',
    'empty': 'is empty',
    'flipped': 'is damaged: the checksum of',
    'gone': 'does not exist',
}


@pytest.mark.parametrize('how', DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(folder, how, caplog):
    damage(folder / 'epoch_2.pth', how)
    runner = make_runner(folder, resume=True)
    said = []
    runner.logger.warning = lambda text, *rest: said.append(str(text))
    runner.call_hook('before_run')
    assert runner._load_from == str(folder / 'epoch_1.pth')
    assert said == [
        f'Passed over: checkpoint {folder}/epoch_2.pth {find_damage(folder / "epoch_2.pth")}'
    ]
    assert DAMAGES[how] in said[0]


@pytest.mark.parametrize('how', DAMAGES)
def test_named_by_hand_it_is_refused(folder, how):
    path = folder / 'epoch_2.pth'
    damage(path, how)
    runner = make_runner(folder, resume=True, load_from=str(path))
    with pytest.raises((ValueError, FileNotFoundError), match=f'checkpoint {path} ') as raised:
        runner.train()
    assert DAMAGES[how] in str(raised.value)


@pytest.mark.parametrize('note', ['', None])
def test_without_its_note_the_newest_is_taken(folder, note):
    os.utime(folder / 'epoch_2.pth', (2e9, 2e9))
    (folder / 'last_checkpoint').unlink()
    if note is not None:
        (folder / 'last_checkpoint').write_text(note)
    runner = make_runner(folder, resume=True)
    runner.call_hook('before_run')
    assert runner._load_from == str(folder / 'epoch_2.pth')


def test_none_is_whole(folder):
    for number in (1, 2):
        damage(folder / f'epoch_{number}.pth', 'cut')
    with pytest.raises(ValueError, match='nothing to resume from: .*epoch_2.*cut.*epoch_1.*cut'):
        make_runner(folder, resume=True).train()


def test_a_new_run_has_nothing_to_resume_from(tmp_path):
    runner = make_runner(tmp_path / 'new', resume=True)
    runner.call_hook('before_run')
    assert runner._load_from is None


def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, 'No space left on device')

    before = {path.name: path.read_bytes() for path in folder.glob('*.pth')}
    runner = make_runner(folder, resume=True)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='could not be written .No space left on device.') as raised:
        runner.train()
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(folder / 'epoch_3.pth')
    assert '--resume' in str(raised.value)
    assert {path.name: path.read_bytes() for path in folder.glob('*.pth*')} == before
    monkeypatch.undo()
    make_runner(folder, resume=True).train()
    assert (folder / 'epoch_4.pth').exists()


def test_the_oldest_goes_when_the_new_one_is_there(folder, monkeypatch):
    there = []
    save = Runner.save_checkpoint

    def look(runner, *args, **kwargs):
        there.append(sorted(path.name for path in folder.glob('*.pth')))
        save(runner, *args, **kwargs)

    monkeypatch.setattr(Runner, 'save_checkpoint', look)
    make_runner(folder, resume=True).train()
    assert there == [['epoch_1.pth', 'epoch_2.pth'], ['epoch_2.pth', 'epoch_3.pth']]
    assert sorted(path.name for path in folder.glob('*.pth*')) == ['epoch_3.pth', 'epoch_4.pth']
    assert (folder / 'last_checkpoint').read_text() == str(folder / 'epoch_4.pth')


def test_what_was_not_removed_in_time_is_removed_later(folder, monkeypatch):
    def stop_there(hook, filename):
        raise Stopped

    monkeypatch.setattr(WholeCheckpointHook, '_remove', stop_there)
    with pytest.raises(Stopped):
        make_runner(folder, resume=True).train()
    monkeypatch.undo()
    assert len(list(folder.glob('*.pth'))) == 3
    make_runner(folder, resume=True).train()
    assert sorted(path.name for path in folder.glob('*.pth')) == ['epoch_3.pth', 'epoch_4.pth']


def test_as_many_are_kept_as_the_config_says(tmp_path):
    hooks = {'checkpoint': {'type': 'WholeCheckpointHook', 'interval': 1, 'max_keep_ckpts': 3}}
    stop(tmp_path / 'run', 7, default_hooks=hooks)  # in the fourth epoch
    names = sorted(path.name for path in (tmp_path / 'run').glob('*.pth'))
    assert names == ['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth']


def test_any_template_of_names_is_resumed_from(tmp_path):
    hook = {'type': 'WholeCheckpointHook', 'interval': 1, 'filename_tmpl': 'epoch_{:03d}.pth'}
    options = {'default_hooks': {'checkpoint': hook}}
    stop(tmp_path / 'run', 5, **options)
    (tmp_path / 'run' / 'last_checkpoint').unlink()
    runner = make_runner(tmp_path / 'run', resume=True, **options)
    runner.call_hook('before_run')
    assert runner._load_from == str(tmp_path / 'run' / 'epoch_002.pth')


def test_a_copy_resumes_from_its_own(stopped, tmp_path):
    copied = shutil.copytree(stopped, tmp_path / 'run')
    runner = make_runner(copied, resume=True)
    runner.call_hook('before_run')
    assert runner._load_from == str(copied / 'epoch_2.pth')


class Better(BaseMetric):
    """A number that rises from one validation to the next."""

    default_prefix = 'better'

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = iter(numbers)

    def process(self, data_batch, data_samples):
        self.results.append(None)

    def compute_metrics(self, results):
        return {'acc': next(self.numbers), 'mAP': 1.0}


class Validated(Noisy):
    """With something to validate."""

    def forward(self, x, y, mode='tensor'):
        return super().forward(x, y, mode) if mode == 'loss' else [{}]


class TestBest:
    @pytest.fixture(params=['better/acc', ['better/acc', 'better/mAP']], ids=['one', 'two'])
    def validated(self, monkeypatch, request):
        """Make a runner with a metric that has given values, and keeps the best."""
        monkeypatch.setitem(globals(), 'Noisy', Validated)
        hook = {'type': 'WholeCheckpointHook', 'interval': 1, 'max_keep_ckpts': 2}
        hook['save_best'] = request.param

        def make(folder, *numbers, **more):
            loader = {
                'batch_size': 8,
                'num_workers': 0,
                'dataset': Points(),
                'sampler': {'type': 'DefaultSampler', 'shuffle': False},
                'collate_fn': {'type': 'default_collate'},
            }
            return make_runner(
                folder,
                default_hooks={'checkpoint': hook},
                val_dataloader=loader,
                val_cfg={},
                val_evaluator=Evaluator(Better(*numbers)),
                **more,
            )

        return make

    def test_the_best_stays_until_a_better_one_is_there(self, validated, tmp_path, monkeypatch):
        there = []
        save = Runner.save_checkpoint

        def look(runner, out_dir, filename, *args, **kwargs):
            if 'acc' in filename:
                there.append(sorted(path.name for path in tmp_path.glob('run/best*acc*')))
            save(runner, out_dir, filename, *args, **kwargs)

        monkeypatch.setattr(Runner, 'save_checkpoint', look)
        validated(tmp_path / 'run', 0.1, 0.3, 0.2, 0.4).train()
        assert there == [[], ['best_better_acc_epoch_1.pth'], ['best_better_acc_epoch_2.pth']]
        assert [path.name for path in tmp_path.glob('run/best*acc*')] == [
            'best_better_acc_epoch_4.pth'
        ]
        names = sorted(path.name for path in tmp_path.glob('run/epoch*'))
        assert names == ['epoch_3.pth', 'epoch_4.pth']

    def test_all_that_are_to_be_kept_are(self, validated, tmp_path):
        """The best is noted by saving the epoch's checkpoint once more."""
        stop(tmp_path / 'run', 5, make=lambda folder, **more: validated(folder, 1, 2, **more))
        names = sorted(path.name for path in tmp_path.glob('run/epoch*'))
        assert names == ['epoch_1.pth', 'epoch_2.pth']

    def test_a_copy_leaves_the_first_runs_best(self, validated, tmp_path):
        stop(tmp_path / 'run', 5, make=lambda folder, **more: validated(folder, 1, 2, **more))
        before = {path.name for path in tmp_path.glob('run/*.pth')}
        copied = shutil.copytree(tmp_path / 'run', tmp_path / 'copy')
        validated(copied, 3, 4, resume=True).train()
        assert {path.name for path in tmp_path.glob('run/*.pth')} == before
        assert (copied / 'best_better_acc_epoch_4.pth').is_file()


class SpoilHook(Hook):
    """Spoils a training in an iteration."""

    def __init__(self, at, spoil):
        self.at, self.spoil = at, spoil

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.at:
            self.spoil(runner.model, outputs)


def diverge(model, outputs):
    """As a step does whose gradients are no numbers."""
    model.fit.bias.data.fill_(math.nan)
    outputs['loss'].fill_(math.nan)


def grow(model, outputs):
    """Beyond the range of numbers, and the loss has not met it yet."""
    model.fit.weight.data.fill_(math.inf)


def overflow(model, outputs):
    """As with a scaled loss: the step is left out."""
    outputs['loss'].fill_(math.inf)


def train_spoilt(folder, at, spoil, make=make_runner, **more):
    runner = make(folder, **more)
    runner.register_hook(SpoilHook(at, spoil), priority='NORMAL')
    runner.train()


@pytest.mark.parametrize(
    ('at', 'spoil', 'said'),
    [
        (5, diverge, 'iteration 5: loss is nan, and weights are not finite: fit.bias'),
        (6, diverge, 'iteration 6: loss is nan, and weights are not finite: fit.bias'),
        (6, grow, 'iteration 6: weights are not finite: fit.weight'),
    ],
)
def test_weights_that_are_no_numbers_end_the_run_and_replace_nothing(tmp_path, at, spoil, said):
    """The third epoch has the iterations 5 and 6; two checkpoints are kept."""
    with pytest.raises(RuntimeError, match=f'training ended at {said}. They .*--resume'):
        train_spoilt(tmp_path / 'run', at, spoil)
    folder = tmp_path / 'run'
    assert sorted(path.name for path in folder.glob('*.pth')) == ['epoch_1.pth', 'epoch_2.pth']
    assert (folder / 'last_checkpoint').read_text() == str(folder / 'epoch_2.pth')
    assert all(weight.isfinite().all() for weight in weights(folder / 'epoch_2.pth').values())
    make_runner(folder, resume=True).train()
    make_runner(tmp_path / 'alone').train()
    assert_same(weights(folder / 'epoch_4.pth'), weights(tmp_path / 'alone' / 'epoch_4.pth'))


def test_a_loss_that_overflows_in_one_iteration_ends_nothing(tmp_path):
    train_spoilt(tmp_path / 'run', 5, overflow)
    assert (tmp_path / 'run/epoch_4.pth').is_file()


def test_statistics_of_a_batch_norm_count_and_masks_do_not(tmp_path, monkeypatch):
    class Masked(Noisy):
        def __init__(self, width):
            super().__init__(width)
            self.register_buffer('mask', torch.tensor([0, -math.inf]))

    monkeypatch.setitem(globals(), 'Noisy', Masked)
    make_runner(tmp_path / 'run').train()
    with pytest.raises(RuntimeError, match='weights are not finite: mask. '):
        train_spoilt(tmp_path / 'nan', 5, lambda model, _: model.mask.fill_(math.nan))


def test_a_best_one_is_not_replaced_either(tmp_path, monkeypatch):
    """Where validation comes more often than checkpoints."""
    runner = make_runner(tmp_path / 'run')
    hook = WholeCheckpointHook(save_best='acc', rule='greater')
    grow(runner.model, None)
    with pytest.raises(RuntimeError, match='training ended at iteration 0: weights'):
        hook._save_best_checkpoint(runner, {'acc': 1.0})


def test_another_model_is_refused_with_what_differs(folder):
    with pytest.raises(ValueError, match="epoch_2.pth is not of this config's model") as raised:
        make_runner(folder, resume=True, width=2).train()
    assert 'fit.weight: (1, 1) in the checkpoint, (2, 1) in the model' in str(raised.value)


def test_classes_in_another_order_are_refused(tmp_path, monkeypatch):
    """Their number is the same, so that the weights fit."""
    monkeypatch.setattr(Points, 'metainfo', {'classes': ('cat', 'dog')}, raising=False)
    stop(tmp_path / 'run', 5)
    monkeypatch.setattr(Points, 'metainfo', {'classes': ('dog', 'cat')})
    with pytest.raises(
        ValueError, match=r"epoch_2.pth has the classes \['cat', 'dog'\], .*\['dog', 'cat'\]"
    ):
        make_runner(tmp_path / 'run', resume=True).train()
    monkeypatch.setattr(Points, 'metainfo', {'classes': ('kitten', 'dog')})
    make_runner(tmp_path / 'run', resume=True).train()  # other names may stand for the same


def test_another_optimizer_is_refused_with_its_groups(folder):
    optim_wrapper = {
        'optimizer': {'type': 'AdamW', 'lr': 0.1},
        'paramwise_cfg': {'custom_keys': {'fit.bias': {'lr_mult': 0.1}}},
    }
    with pytest.raises(ValueError, match='had 1 groups of 2 .* has 2 groups of 2 .*paramwise_cfg'):
        make_runner(folder, resume=True, optim_wrapper=optim_wrapper).train()


def test_weights_alone_cannot_be_resumed(folder):
    torch.save({'state_dict': weights(folder / 'epoch_2.pth')}, folder / 'bare.pth')
    with pytest.raises(ValueError, match="bare.pth has no 'meta' .* load_from="):
        make_runner(folder, resume=True, load_from=str(folder / 'bare.pth')).train()
    make_runner(folder / 'new', load_from=str(folder / 'bare.pth')).train()


def test_killed_while_it_writes(tmp_path):
    """kill -9 between the first byte and the renaming; the run goes on from the one before."""
    folder = tmp_path / 'run'
    code = (
        'import os, signal, sys\n'
        f'sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n'
        'import sasa_det\n'
        'from pathlib import Path\n'
        'import test_checkpoint_hook as here\n'
        'fsync, count = os.fsync, []\n'
        'def kill(descriptor):\n'
        '    fsync(descriptor)\n'
        '    count.append(1)\n'
        '    len(count) == 5 and os.kill(os.getpid(), signal.SIGKILL)\n'  # each has a note
        'os.fsync = kill\n'
        'here.make_runner(Path(sys.argv[1])).train()\n'
    )
    done = subprocess.run([sys.executable, '-c', code, str(folder)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    *whole, partial = sorted(path.name for path in folder.glob('epoch_*'))
    assert whole == ['epoch_1.pth', 'epoch_2.pth']
    assert re.fullmatch(r'epoch_3\.pth\.[0-9a-f]{8}\.partial', partial)
    make_runner(folder, resume=True).train()
    assert not list(folder.glob('*.partial'))
    make_runner(tmp_path / 'alone').train()
    assert_same(weights(folder / 'epoch_4.pth'), weights(tmp_path / 'alone' / 'epoch_4.pth'))


def test_a_run_in_a_folder_in_use_is_refused(folder):
    """The other run is a process that holds the folder; that is all it does here."""
    code = (
        'import sys; from sasa_det.engine.work_dir_lock import hold_work_dir\n'
        'hold_work_dir(sys.argv[1]); print(flush=True); sys.stdin.read()'
    )
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob('*.pth')}
    command = [sys.executable, '-c', code, str(folder)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    with subprocess.Popen(command, **pipes) as other:
        other.stdout.readline()
        leftover = folder / 'epoch_3.pth.0123abcd.partial'
        leftover.touch()
        with pytest.raises(RuntimeError, match=f'{folder} is in use by process {other.pid} on '):
            make_runner(folder, resume=True).train()
        assert leftover.exists()
        other.stdin.close()
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob('*.pth')}
    make_runner(folder, resume=True).train()
    assert (folder / 'epoch_4.pth').exists()
    assert not leftover.exists()


def test_where_there_are_no_locks_it_trains_and_removes_nothing(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr('fcntl.lockf', refuse)
    leftover = tmp_path / 'epoch_1.pth.0123abcd.partial'
    leftover.touch()
    make_runner(tmp_path).train()
    assert (tmp_path / 'epoch_4.pth').exists() and leftover.exists()


def test_checkpoints_in_another_folder_are_held_too(tmp_path):
    places = {}
    for name in ('a', 'b'):
        runner = make_runner(tmp_path / name / 'run')
        (hook,) = [hook for hook in runner.hooks if isinstance(hook, WholeCheckpointHook)]
        hook.out_dir = str(tmp_path / 'shared')
        runner.train()
        places[name] = hook._held
    assert places['a'] & places['b'] == {tmp_path / 'shared/run'}
    assert (tmp_path / 'shared/run/epoch_4.pth').exists()
