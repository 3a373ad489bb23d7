"""Commands work from a folder that cannot be written to; /proc cannot, not even by root."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sasa_det.data.digits import make_digits

ROOT = Path(__file__).resolve().parents[2]
TWO_PROCESSES = ('torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m')


def run(*argv, launch=()):
    done = subprocess.run(
        [sys.executable, '-m', *launch, 'sasa_det', *map(str, argv)],
        cwd='/proc', text=True, capture_output=True,
        env=dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', PATH=''),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'digits'
    return make_digits(folder, num_train=10, num_val=10, image_size=64, quiet=True)


def test_predict(trained, images, tmp_path):
    run('predict', images, '--checkpoint', trained, '--out', tmp_path / 'found')
    assert (tmp_path / 'found/results.json').is_file()


@pytest.mark.parametrize('processes', [1, 2])
def test_test(trained, data, tmp_path, processes):
    options = [
        f'test_dataloader.dataset.data_root={data}/',
        f'test_evaluator.ann_file={data}/annotations/instances_val.json',
        'model.test_cfg.score_thr=0.0',
    ]
    more = [
        '--work-dir',
        tmp_path / 'run',
        '--out',
        tmp_path / 'found.pkl',
        '--cfg-options',
        *options,
    ]
    launch = ()
    if processes > 1:
        more, launch = ['--launcher', 'pytorch', *more], TWO_PROCESSES
    done = run('test', trained.with_name('tiny.py'), trained, *more, launch=launch)
    assert 'FutureWarning' not in done.stderr
    (numbers,) = map(json.loads, next((tmp_path / 'run').glob('*/*.json')).open())
    assert 'coco/bbox_mAP' in numbers
    assert (tmp_path / 'found.pkl').stat().st_size > 1000
    # What the processes exchanged is not left.
    assert not list((tmp_path / 'run').rglob('part_*.pkl'))


def test_train(trained, data, tmp_path):
    """In two processes, with an evaluation."""
    roots = [f'{split}_dataloader.dataset.data_root={data}/' for split in ('train', 'val')]
    run(
        'train', trained.with_name('tiny.py'), '--launcher', 'pytorch', '--work-dir', tmp_path / 'run',
        '--cfg-options', *roots, f'val_evaluator.ann_file={data}/annotations/instances_val.json',
        'train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=5',
        'model.test_cfg.score_thr=0.0',
        launch=TWO_PROCESSES,
    )  # fmt: skip
    assert (tmp_path / 'run/epoch_1.pth').is_file()
