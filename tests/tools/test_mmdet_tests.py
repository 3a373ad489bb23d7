"""The tool that runs mmdetection's tests, on a checkout of three tests of our own."""

from pathlib import Path

import mmdet
import pytest

from tools.checks import mmdet_tests

NECKS = """
import torch
from mmdet.models.necks import FPN
from mmdet.registry import MODELS

NECK = dict(in_channels=[8, 16], out_channels=16, num_outs=3)


def test_fpn():
    assert len(FPN(**NECK)([torch.zeros(1, 8, 4, 4), torch.zeros(1, 16, 2, 2)])) == 3


def test_fpn_has_convolutions():
    neck = MODELS.build(dict(type='FPN', **NECK))
    assert neck.fpn_convs[0].conv.kernel_size == (3, 3), 'no 3x3'


def test_nothing_of_ours():
    assert True


def test_that_never_passes():
    assert False
"""
RESNET = """
import torch
from mmdet.models.backbones import ResNet


def test_depths():
    for depth in (18, 50):
        outs = ResNet(depth, base_channels=4)(torch.zeros(1, 3, 64, 64))
        assert outs[3].shape[1] == (32 if depth == 18 else 128)
    ResNet(50, dcn=dict(type='DCN'), stage_with_dcn=(False, False, True, True), base_channels=8)
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / 'mmdet').symlink_to(Path(mmdet.__file__).parent)
    for name, text in {'test_necks/test_necks.py': NECKS, 'test_resnet.py': RESNET}.items():
        file = tmp_path / mmdet_tests.PARENT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_the_table(checkout, capsys, monkeypatch):
    monkeypatch.setattr(mmdet_tests, 'find_spec', lambda name: name)  # these need no parameterized
    assert mmdet_tests.main([str(checkout), 'test_necks', 'test_resnet.py']) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:6] == [
        '| test_necks/test_necks.py | 2 | 2 of 2 | 2 of 2 | 1 of 2 |',
        '| test_resnet.py | 1 | 1 of 1 | 1 of 1 | 1 of 1 |',
        '| all | 3 | 3 of 3 | 3 of 3 | 2 of 3 |',
        '| other tests | 0 | 1 of 1 | 1 of 1 | 1 of 1 |',
    ]
    text = '\n'.join(lines)
    assert 'Without ours 1 fail and 0 are skipped' in text
    lacks = '1 ResNet of a depth that SASAResNet lacks'
    assert f'no attention: {lacks}, 2 SASAFPN, 2 SASAResNet.' in text
    assert 'attention: 1 ResNet with deformable stages, 2 SASAFPN, 2 SASAResNet.' in text
    (failed,) = (line for line in lines if line.startswith('ours, '))
    assert failed.startswith('ours, attention: ') and 'test_fpn_has_convolutions: ' in failed
    assert 'no 3x3' in failed


def test_without_attention_a_difference_is_an_error():
    from mmdet.models import FPN

    from sasa_det.models import SASAFPN

    sizes = dict(in_channels=[8, 16], out_channels=16, num_outs=2)
    build = mmdet_tests.in_place_of(FPN, SASAFPN, attention=False)
    assert isinstance(build(**sizes), SASAFPN)

    class Other(SASAFPN):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.fpn_convs[1].conv.weight.data[0, 0, 0, 0] += 1e-6

    with pytest.raises(AssertionError):
        mmdet_tests.in_place_of(FPN, Other, attention=False)(**sizes)


def test_refuses(checkout, capsys, tmp_path_factory):
    def message(*arguments):
        with pytest.raises(SystemExit) as error:
            mmdet_tests.main([*map(str, arguments)])
        assert error.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert 'mmdet/version.py does not exist' in message(checkout / 'tests')
    assert 'but test_neck is not' in message(checkout, 'test_neck')
    other = tmp_path_factory.mktemp('other')
    (other / 'mmdet').mkdir()
    (other / 'mmdet/version.py').write_text("__version__ = '3.2.0'\n")
    assert f'of the installed version, {mmdet.__version__}, but ' in message(other)
