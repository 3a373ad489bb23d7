"""Weights by a name of torchvision's or OpenMMLab's, with and without torchvision and a network."""

import socket
import sys
import urllib.request
from urllib.error import URLError

import pytest
import torch
from mmdet.models.backbones import ResNet
from mmengine.runner.checkpoint import CheckpointLoader

from sasa_det.checkpoints import safe_loading
from sasa_det.models import SASAResNet

NAMED = {
    'torchvision': 'torchvision://resnet50',
    'open-mmlab': 'open-mmlab://jhu/resnet50_gn_ws',
    'mmcls': 'mmcls://resnet50',
}


def load(name):
    with safe_loading():
        return CheckpointLoader.load_checkpoint(name, 'cpu')


@pytest.fixture
def without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)


@pytest.fixture
def table(monkeypatch):
    """torchvision's table, without torchvision."""
    urls = {'resnet50': 'https://example.invalid/models/resnet50-0676ba61.pth'}
    monkeypatch.setattr('sasa_det.checkpoints.loading.get_torchvision_models', lambda: urls)


@pytest.fixture
def without_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise URLError(socket.gaierror(-2, 'Name or service not known'))

    monkeypatch.setattr('torch.hub.urlopen', refuse)
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    return tmp_path / 'torch/hub/checkpoints'


def small(depth=50):
    return ResNet(depth, base_channels=8, stem_channels=8)


def torchvisions_file(path, backbone, **options):
    """A file as torchvision's are: the weights alone, and a classifier's last layer."""
    weights = {
        **backbone.state_dict(),
        'fc.weight': torch.zeros(10, 256),
        'fc.bias': torch.zeros(10),
    }
    torch.save(weights, path, **options)
    return path


def test_without_torchvision_the_message_says_what_to_do(without_torchvision):
    with pytest.raises(ImportError) as caught:
        load(NAMED['torchvision'])
    text = str(caught.value)
    assert text.startswith('torchvision://resnet50 needs torchvision')
    assert "-m pip install --no-deps 'torchvision==0." in text
    assert 'model.backbone.init_cfg=None' in text
    assert 'model.backbone.init_cfg.checkpoint=/path/' in text


@pytest.mark.parametrize('zoo', NAMED)
def test_without_a_network_the_message_says_where_a_file_goes(zoo, table, without_network):
    with pytest.raises(OSError, match=r'cannot be downloaded to .*Name or service') as caught:
        load(NAMED[zoo])
    assert f'{without_network}/resnet50' in str(caught.value)
    assert 'model.backbone.init_cfg.checkpoint=/path/' in str(caught.value)


def test_the_file_put_there_is_loaded(table, without_network):
    without_network.mkdir(parents=True)
    torchvisions_file(without_network / 'resnet50-0676ba61.pth', small())
    assert load(NAMED['torchvision'])['fc.bias'].shape == (10,)


def test_files_of_one_name_at_two_addresses_are_two(monkeypatch, tmp_path):
    def download(url, path, **options):
        torch.save({'from': url}, path)

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('torch.hub.download_url_to_file', download)
    for end in ('a/epoch_8.pth', 'b/epoch_8.pth', 'epoch_8.pth?run=1', 'epoch_8.pth?run=2'):
        for _ in range(2):
            assert load(f'https://example.invalid/{end}') == {
                'from': f'https://example.invalid/{end}'
            }
    assert len(list(tmp_path.rglob('*epoch_8.pth'))) == 4


def test_of_mmcls_the_backbone_is_taken(monkeypatch, tmp_path):
    weights = {'backbone.conv1.weight': torch.ones(1), 'head.fc.bias': torch.ones(2)}
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(
        'torch.hub.download_url_to_file', lambda _, path, **__: torch.save(weights, path)
    )
    assert load('mmcls://resnet50') == {'state_dict': {'conv1.weight': torch.ones(1)}}


@pytest.mark.parametrize('zoo', NAMED)
def test_a_name_that_there_is_not(zoo, table):
    with pytest.raises(ValueError, match="has no 'resnet5O'; it has .*res"):
        load(f'{zoo}://resnet5O')


@pytest.mark.parametrize('zipped', [True, False])
def test_a_local_file_starts_the_backbone_as_torchvisions_name_does(
    tmp_path, without_torchvision, without_network, zipped
):
    """By the key that the messages and docs/pretraining.md name."""
    torch.manual_seed(0)
    theirs = small()
    path = torchvisions_file(
        tmp_path / 'resnet50.pth', theirs, _use_new_zipfile_serialization=zipped
    )
    backbone = SASAResNet(
        50,
        base_channels=8,
        stem_channels=8,
        attn_stages=(False, False, True, True),
        attn_cfg=dict(kernel_size=3, num_heads=1),
        init_cfg=dict(type='Pretrained', checkpoint=str(path)),
    )
    backbone.init_weights()
    found, expected = backbone.state_dict(), theirs.state_dict()
    shared = found.keys() & expected.keys()
    # All but the 3x3 convolutions of the last two stages.
    assert len(shared) == len(expected) - 9
    assert all(torch.equal(found[name], expected[name]) for name in shared)
