"""Two processes on the CPU, each with the same images, train as one process does on them."""

import json
import os
import subprocess
import sys

import pytest
import torch

from sasa_det.checkpoints.types import ASKS
from sasa_det.data.digits import make_digits


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Give a folder of ten images, and an annotation file that names each of them twice in turn."""
    root = make_digits(tmp_path_factory.mktemp('digits') / 'set', num_train=10, num_val=10)
    content = json.loads((root / 'annotations' / 'instances_train.json').read_text())
    images, annotations = content['images'], content['annotations']
    content['images'] = [
        {**image, 'id': 2 * image['id'] + copy} for image in images for copy in (0, 1)
    ]
    content['annotations'] = [
        {**entry, 'id': 2 * entry['id'] + copy, 'image_id': 2 * entry['image_id'] + copy}
        for entry in annotations
        for copy in (0, 1)
    ]
    (root.parent / 'twice.json').write_text(json.dumps(content))
    return root


def train(folder, data, processes):
    """Train three iterations of two images in each process; return the losses and the weights."""
    folder.mkdir()
    ann_file = data / 'annotations' / 'instances_train.json'
    if processes > 1:
        ann_file = data.parent / 'twice.json'
    (folder / 'config.py').write_text(
        "_base_ = 'sasa_det::quickstart/retinanet_sasa-tiny_digits.py'\n"
        'train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,\n'
        '    sampler=dict(shuffle=False), batch_sampler=None,\n'
        f'    dataset=dict(data_root={str(data)!r}, ann_file={str(ann_file)!r}))\n'
        "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=3, val_interval=99)\n"
        'val_cfg = val_dataloader = val_evaluator = None\n'
        'test_cfg = test_dataloader = test_evaluator = None\n'
        "param_scheduler = [dict(type='ConstantLR', factor=0.1, by_epoch=False)]\n"
        'default_hooks = dict(logger=dict(interval=1),\n'
        '    checkpoint=dict(by_epoch=False, interval=3))\n'
        'log_processor = dict(window_size=1, by_epoch=False)\n'
    )
    command = ['-m', 'sasa_det', 'train', 'config.py', '--work-dir', 'run']
    if processes > 1:
        launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
        command = [*launch, *command, '--launcher', 'pytorch']
    # torch's convolutions sum in another order with another number of threads, and a batch of two
    # makes much of the last bit.
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # DDP warns of gradients that are not laid out as their parameters.
    assert 'Grad strides' not in done.stderr
    log = next(folder.glob('run/*/vis_data/scalars.json')).read_text().splitlines()
    losses = [entry['loss'] for entry in map(json.loads, log) if 'loss' in entry]
    weights = torch.load(folder / 'run' / 'iter_3.pth', weights_only=ASKS)['state_dict']
    return losses, weights, done.stdout


def test_two_processes_with_the_same_images_train_as_one(tmp_path, digits):
    one_losses, one, _ = train(tmp_path / 'one', digits, 1)
    two_losses, two, said = train(tmp_path / 'two', digits, 2)
    assert 'GPU number: 2' in said  # mmengine's word for processes
    assert len(one_losses) == 3
    assert two_losses == pytest.approx(one_losses, rel=1e-4)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5, msg=name)
