"""mmengine's checkpoints load with weights_only on, and only they do."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

import sasa_det  # noqa: F401  (allows the types)

ROOT = Path(__file__).resolve().parents[2]

asks_for_types = pytest.mark.skipif(
    not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'),
    reason='this torch loads whole pickles unless told otherwise',
)


class Line(BaseModel):
    """A straight line to fit."""

    def __init__(self):
        super().__init__()
        self.fit = nn.Linear(1, 1)

    def forward(self, x, y, mode='tensor'):
        guess = self.fit(x)
        return {'loss': (guess - y).square().mean()} if mode == 'loss' else guess


class Score(BaseMetric):
    """A metric that puts numpy scalars into the logs."""

    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return {'ap': np.float64(0.5), 'count': np.int64(len(results)), 'time': np.float32(1.5)}


def make_runner(work_dir, epochs, **options):
    """A Runner with everything that leaves a trace in checkpoints."""
    numbers = torch.linspace(-1, 1, 8)[:, None]
    data = DataLoader(list(zip(numbers, 3 * numbers)), batch_size=4)
    return Runner(
        model=Line(),
        work_dir=str(work_dir),
        train_dataloader=data,
        val_dataloader=data,
        val_evaluator=Evaluator([Score()]),
        val_cfg={},
        train_cfg={'by_epoch': True, 'max_epochs': epochs, 'val_interval': 1},
        optim_wrapper={'optimizer': {'type': 'AdamW', 'lr': 0.1}},
        param_scheduler=[
            {'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'begin': 0, 'end': 2},
            {'type': 'MultiStepLR', 'milestones': [1, 2], 'by_epoch': True},
        ],
        default_hooks={
            'checkpoint': {
                'type': 'CheckpointHook',
                'interval': 1,
                'save_best': 'ap',
                'rule': 'greater',
            }
        },
        custom_hooks=[{'type': 'EMAHook'}],
        randomness={'seed': 0},
        experiment_name=f'{work_dir.name}-{len(list(work_dir.glob("*")))}',
        **options,
    )


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    make_runner(folder, epochs=2).train()
    return folder


@pytest.mark.parametrize('name', ['epoch_2.pth', 'best_ap_epoch_1.pth'])
def test_load_with_torchs_default(work_dir, name):
    checkpoint = torch.load(work_dir / name)
    losses = checkpoint['message_hub']['log_scalars']['train/loss']
    assert isinstance(losses, HistoryBuffer)
    assert losses.statistics('mean') == pytest.approx(np.mean(losses.data[0]))
    assert checkpoint['state_dict']['fit.weight'].shape == (1, 1)


def test_resume(work_dir):
    runner = make_runner(work_dir, epochs=3, resume=True, load_from=str(work_dir / 'epoch_2.pth'))
    runner.train()
    resumed = torch.load(work_dir / 'epoch_3.pth')
    assert resumed['meta']['epoch'] == 3
    assert resumed['meta']['iter'] == 6
    history, _ = resumed['message_hub']['log_scalars']['train/loss'].data
    before, _ = torch.load(work_dir / 'epoch_2.pth')['message_hub']['log_scalars'][
        'train/loss'
    ].data
    assert len(history) == 6
    assert history[:4].tolist() == before.tolist()


@asks_for_types
@pytest.mark.parametrize('module', [b'numpy.core.multiarray', b'numpy._core.multiarray'])
def test_numbers_written_under_either_numpy(tmp_path, module):
    """numpy 2 moved the module whose name a checkpoint holds."""
    file = tmp_path / 'numbers.pth'
    torch.save(
        {'scalar': np.float64(0.25), 'array': np.arange(3.0)},
        file,
        pickle_module=_renaming_pickle(module),
    )
    loaded = torch.load(file, weights_only=True)
    assert loaded['scalar'] == 0.25
    assert loaded['array'].tolist() == [0.0, 1.0, 2.0]


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Attribute:
    """Asks for an attribute that is none of HistoryBuffer's statistics."""

    def __init__(self, owner, name):
        self.arguments = owner, name

    def __reduce__(self):
        return getattr, self.arguments


@asks_for_types
def test_a_malicious_checkpoint_is_refused(tmp_path):
    file, target = tmp_path / 'evil.pth', tmp_path / 'ran'
    torch.save({'state_dict': {}, 'message_hub': Payload(target)}, file)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file)
    assert not target.exists()


@asks_for_types
@pytest.mark.parametrize(
    ('owner', 'name'),
    [(HistoryBuffer, '__init__'), (HistoryBuffer, '__globals__'), (np.ndarray, 'tofile')],
)
def test_getattr_reaches_no_further_than_the_statistics(tmp_path, owner, name):
    file = tmp_path / 'evil.pth'
    torch.save({'message_hub': Attribute(owner, name)}, file)
    with pytest.raises(pickle.UnpicklingError, match='only the statistics'):
        torch.load(file)


@asks_for_types
def test_without_sasa_det_the_checkpoint_does_not_load(work_dir):
    """What is allowed is allowed by importing sasa_det, and by nothing else in the stack."""
    code = 'import sys, torch, mmengine\n{}\ntorch.load(sys.argv[1])'
    results = [
        subprocess.run(
            [sys.executable, '-c', code.format(extra), str(work_dir / 'epoch_2.pth')],
            env={**os.environ, 'PYTHONPATH': str(ROOT)},
            capture_output=True,
            text=True,
        )
        for extra in ('', 'import sasa_det')
    ]
    assert results[0].returncode == 1 and 'Weights only load failed' in results[0].stderr
    assert results[1].returncode == 0, results[1].stderr


def _renaming_pickle(module):
    """A pickle module that writes numpy's module under another name."""

    class Renaming(pickle._Pickler):
        def save_global(self, obj, name=None):
            if (getattr(obj, '__module__', '') or '').endswith('core.multiarray'):
                self.write(pickle.GLOBAL + module + b'\n' + obj.__name__.encode() + b'\n')
                self.memoize(obj)
            else:
                super().save_global(obj, name)

        dispatch = {**pickle._Pickler.dispatch}

    for kind in (type, type(len), type(os.fspath), type(_renaming_pickle)):
        Renaming.dispatch[kind] = Renaming.save_global
    renaming = type(pickle)('renaming_pickle')
    vars(renaming).update(vars(pickle))
    renaming.Pickler = Renaming
    return renaming
