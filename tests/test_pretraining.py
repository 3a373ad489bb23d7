"""A backbone trained by mmpretrain's own train.py on crops of digits starts a detector."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from sasa_det.cli.openmmlab_tools import missing_for_mmpretrain
from sasa_det.data.box_crops import crop_boxes
from sasa_det.data.digits import make_digits

ROOT = Path(__file__).resolve().parents[1]

needs_mmpretrain = pytest.mark.skipif(
    missing_for_mmpretrain() is not None, reason=str(missing_for_mmpretrain())
)


def run(*arguments, cwd):
    command = [
        sys.executable,
        '-m',
        'sasa_det',
        'tool',
        '--package',
        'mmpretrain',
        *map(str, arguments),
    ]
    return subprocess.run(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope='module')
def crops(tmp_path_factory):
    """A few digits as a classification set."""
    folder = tmp_path_factory.mktemp('crops')
    make_digits(folder / 'digits', num_train=10, num_val=10, image_size=128, quiet=True)
    crop_boxes(folder / 'digits', folder / 'digit-crops', size=32, quiet=True)
    return folder / 'digit-crops'


@needs_mmpretrain
@pytest.mark.parametrize('name', ['tiny', 'sasa-tiny'])
def test_a_checkpoint_of_mmpretrain_is_the_backbones_start(name, crops, tmp_path):
    options = [f'{split}_dataloader.dataset.data_root={crops}' for split in ('train', 'val')]
    for split in ('train', 'val'):
        options += [
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
            f'{split}_dataloader.batch_size=16',
        ]
    options += ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
    done = run(
        'train', ROOT / f'configs/pretrain/{name}_digit-crops.py', '--work-dir', tmp_path,
        '--cfg-options', *options, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert 'accuracy/top1' in done.stdout

    trained = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['state_dict']
    config = Config.fromfile(ROOT / f'configs/quickstart/retinanet_{name}_pretrained_digits.py')
    assert config.model.backbone.init_cfg.prefix == 'backbone.'
    assert Path(config.model.backbone.init_cfg.checkpoint).parent.name == f'{name}_digit-crops'
    config.model.backbone.init_cfg.checkpoint = str(tmp_path / 'epoch_1.pth')
    init_default_scope('mmdet')
    detector = MODELS.build(config.model)
    before = {key: value.clone() for key, value in detector.backbone.state_dict().items()}
    detector.init_weights()
    state = detector.backbone.state_dict()
    assert {f'backbone.{key}' for key in state} == {
        key for key in trained if key.startswith('backbone')
    }
    assert all(torch.equal(value, trained[f'backbone.{key}']) for key, value in state.items())
    assert any(not torch.equal(value, before[key]) for key, value in state.items())


@needs_mmpretrain
def test_an_imagenet_row_is_built_by_mmpretrain_as_we_cost_it():
    from mmpretrain.registry import MODELS as CLASSIFIERS

    from sasa_det.evaluation.costs import build_model

    config = Config.fromfile(ROOT / 'configs/pretrain/sasa-r26-attnstem_32xb128-130e_in1k.py')
    ours = build_model(config)
    init_default_scope('mmpretrain')
    theirs = CLASSIFIERS.build(config.model)
    init_default_scope('mmdet')
    shapes = [sorted(tuple(p.shape) for p in model.parameters()) for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    x = torch.randn(2, 3, 64, 64)
    ours.load_state_dict({k.replace('head.fc', 'fc'): v for k, v in theirs.state_dict().items()})
    ours.eval(), theirs.eval()
    # mmpretrain means in another order.
    with torch.no_grad():
        found = theirs.head(theirs.extract_feat(x))
        assert torch.allclose(ours(x), found, rtol=1e-4, atol=1e-5)


def test_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr('sasa_det.cli.openmmlab_tools.find_spec', lambda name: None)
    assert "pip install 'sasa_det[pretrain]'" in missing_for_mmpretrain()
    monkeypatch.setattr(
        'sasa_det.cli.openmmlab_tools.find_spec', lambda name: name == 'mmpretrain' or None
    )
    minor = int(torch.__version__.split('.')[1])
    assert f"pip install --no-deps 'torchvision==0.{minor + 15}.*'" in missing_for_mmpretrain()


@needs_mmpretrain
def test_torchvision_is_importable_beside_this_torch():
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    flipped = torchvision.transforms.functional.hflip(torch.arange(6.0).view(1, 2, 3))
    assert flipped.tolist() == [[[2, 1, 0], [5, 4, 3]]]
    if torch.version.cuda is None and not torchvision.extension._has_ops():
        with pytest.raises((NotImplementedError, RuntimeError)):
            torchvision.ops.nms(boxes, torch.ones(1), 0.5)
