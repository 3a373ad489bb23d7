"""A trained checkpoint made small: its weights, and nothing of the machine or the time."""

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer

from sasa_det.checkpoints.loading import load_from_local
from sasa_det.checkpoints.written_config import written_config
from tools.shrink_checkpoint import shrink

CONFIG = """
model = dict(type='RetinaNet')
train_dataloader = dict(batch_size=4)
work_dir = '/home/somebody/run'
launcher = 'none'
"""


@pytest.fixture
def trained():
    """What training saves."""
    weights = {
        'backbone.weight': torch.tensor([[0.1, -3.0]]),
        'backbone.num_batches_tracked': torch.tensor(70_000),
    }
    meta = dict(
        cfg=CONFIG,
        experiment_name='tiny_of_2026_20260102_030405',
        time='20260102_030405',
        seed=3,
        epoch=2,
        iter=9,
        hook_msgs=dict(last_ckpt='/home/somebody/run/epoch_2.pth'),
        dataset_meta=dict(classes=('cat', 'dog')),
    )
    return dict(
        state_dict=weights,
        meta=meta,
        message_hub=dict(log_scalars={'train/loss': HistoryBuffer([1.0], [1])}),
        optimizer=dict(state={}, param_groups=[]),
    )


def test_weights_are_rounded_and_counts_kept(trained):
    weights = shrink(trained)['state_dict']
    assert torch.equal(weights['backbone.weight'], torch.tensor([[0.1, -3.0]]).half())
    assert weights['backbone.num_batches_tracked'] == 70_000


def test_it_tells_how_it_was_trained_and_nothing_else(trained, tmp_path):
    small = shrink(trained)
    assert small.keys() == {'state_dict', 'meta'}
    facts = {name: value for name, value in small['meta'].items() if name != 'cfg'}
    assert facts == dict(
        config_name='tiny_of_2026', seed=3, epochs=2, batch_size=4,
        dataset_meta=dict(classes=('cat', 'dog')),
    )  # fmt: skip
    torch.save(small, tmp_path / 'small.pth')
    read = load_from_local(str(tmp_path / 'small.pth'))
    assert written_config(read) == dict(
        model=dict(type='RetinaNet'), train_dataloader=dict(batch_size=4)
    )
    assert b'somebody' not in (tmp_path / 'small.pth').read_bytes()
    # A config that mmengine reads.
    assert Config.fromstring(read['meta']['cfg'], '.py').model.type == 'RetinaNet'


def test_a_weight_that_does_not_fit_is_named(trained):
    trained['state_dict']['backbone.weight'][0, 1] = 70_000
    with pytest.raises(ValueError, match='backbone.weight has a value that float16 cannot hold'):
        shrink(trained)


def test_weights_without_a_config_are_refused(trained):
    del trained['meta']['cfg']
    with pytest.raises(ValueError, match='it holds no config'):
        shrink(trained)
