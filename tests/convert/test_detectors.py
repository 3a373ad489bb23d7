"""Detectors of mmdet: what is converted in each, by which images, and the command."""

import json
import re
import statistics

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_detectors import DETECTORS, build, inputs, read
from mmengine.config import Config

from sasa_det.checkpoints.detector import load_detector
from sasa_det.cli.main import main
from sasa_det.configs import find_config, read_config
from sasa_det.convert import convert
from sasa_det.convert.detectors import (
    MEMORY,
    bytes_per_image,
    choose_detectors_layers,
    find_images,
    load_images,
    stages_of,
)
from sasa_det.evaluation.attention_maps import attention_layers

DIGITS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')

# What becomes attention in each detector, by part; the convolutions that levels share count once.
CONVERTED = {
    'faster-rcnn_sasa-r50_sasa-fpn_1x_coco': dict(backbone=8, neck=4, rpn_head=1),
    'mask-rcnn_sasa-r50_sasa-fpn_sasa-mask-head_1x_coco': dict(
        backbone=8, neck=4, rpn_head=1, roi_head=2
    ),
    'cascade-rcnn_sasa-r50_sasa-fpn_1x_coco': dict(backbone=8, neck=4, rpn_head=1),
    'fcos_sasa-r50-caffe_sasa-fpn_gn-sasa-head_1x_coco': dict(backbone=8, neck=5, bbox_head=4),
    'atss_sasa-r50_sasa-fpn_sasa-head_1x_coco': dict(backbone=8, neck=5, bbox_head=4),
    'gfl_sasa-r50_sasa-fpn_sasa-head_1x_coco': dict(backbone=8, neck=5, bbox_head=4),
    'rtmdet_tiny_sasa-pafpn_sasa-head_8xb32-300e_coco': dict(backbone=8, neck=9, bbox_head=4),
    'detr_sasa-r50_8xb2-150e_coco': dict(backbone=8),
}


@pytest.fixture(autouse=True, scope='module')
def few_steps():
    """Refine for less time: what is tested here is not how near the fit comes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('sasa_det.convert.fit.FEWEST_STEPS', 10)
        patch.setattr('sasa_det.convert.fit.MOST_STEPS', 10)
        yield


def convolutional(name):
    """A narrowed detector of mmdet with convolutions everywhere."""
    config = read(name, DETECTORS[name][0])
    for part in (config.model.backbone, config.model.get('neck'), config.model.get('bbox_head')):
        for key in ('attn_cfg', 'conv_cfg'):
            if part and key in part:
                part[key] = None
    mask_head = config.model.get('roi_head', {}).get('mask_head')
    if mask_head:
        mask_head.conv_cfg = None
    model = build(config)
    model.init_weights()
    return model.eval()


@pytest.mark.parametrize('name', DETECTORS)
def test_other_detectors_convert_and_predict(name):
    model = convolutional(name)
    assert not attention_layers(model)
    torch.manual_seed(0)
    images = F.interpolate(torch.randn(8, 3, 16, 16), size=(128, 128), mode='bicubic')
    stages = stages_of(model)
    choices = choose_detectors_layers(model, num_heads=4, kernel_size=3)
    found = convert(model, images, stages=stages, choices=choices)
    parts = {}
    for layer in found.attention:
        part = layer.partition('.')[0]
        parts[part] = parts.get(part, 0) + 1
    assert parts == CONVERTED[name]
    assert not any(reason == 'these images do not reach it' for reason in found.kept.values())
    # Random weights ask for what a low rank cannot follow. Zeros would leave 1.
    assert statistics.fmean(fitted.unexplained for fitted in found.fitted.values()) < 0.75
    data = inputs(found.model, False, getattr(found.model, 'with_mask', False))
    with torch.no_grad():
        predictions = found.model(**data, mode='predict')
    assert len(predictions) == 2
    assert all(each.pred_instances.bboxes.isfinite().all() for each in predictions)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """A tiny detector with random weights: its config, and its checkpoint."""
    folder = tmp_path_factory.mktemp('teacher')
    config = read_config(find_config('retinanet_tiny_digits'))
    torch.manual_seed(0)
    model = build(config)
    model.init_weights()
    with torch.no_grad():
        model.bbox_head.retina_cls.bias.fill_(-2.0)  # some boxes are seen
    path = folder / 'tiny.py'
    path.write_text("_base_ = 'sasa_det::quickstart/retinanet_tiny_digits.py'\n")
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / 'tiny.pth')
    return path, folder / 'tiny.pth'


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    generator = np.random.default_rng(0)
    for number in range(5):
        pixels = generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        pixels = cv2.resize(pixels, (128, 96), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f'{number}.png'), pixels)
    return folder


def command(teacher, photos, out, *more):
    config, checkpoint = teacher
    return main(
        ['convert', str(config), str(checkpoint), '--images', str(photos), '--out', str(out), *more]
    )


@pytest.fixture(scope='module')
def converted(teacher, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp('converted')
    assert command(teacher, photos, out, '--parts', 'neck', 'head') == 0
    return out


def test_writes_a_config_that_loads_the_checkpoint(teacher, photos, converted, tmp_path):
    config = Config.fromfile(converted / 'tiny_converted.py')
    assert config.load_from == str(converted / 'tiny_converted.pth')
    student = load_detector(config, converted / 'tiny_converted.pth')
    report = json.loads((converted / 'report.json').read_text())
    assert list(attention_layers(student)) == [row['layer'] for row in report['layers']]
    assert not any(name.startswith('backbone') for name in attention_layers(student))
    assert report['kept']['backbone.layer1.0.conv2'] == 'the part backbone was not asked for'
    assert sum(p.numel() for p in student.parameters()) == report['total']['parameters_after']
    assert report['total']['parameters_after'] < 0.85 * report['total']['parameters_before']
    # The same as from Python.
    original = load_detector(Config.fromfile(teacher[0]), teacher[1])
    images = load_images(original, original.cfg, find_images(original.cfg, photos), 64)
    choices = choose_detectors_layers(original, ('neck', 'head'))
    again = convert(original, images, stages=stages_of(original), choices=choices).model
    for name, value in again.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name


def test_goes_on_after_an_interruption(teacher, photos, converted, tmp_path, capsys, monkeypatch):
    from sasa_det.convert import walk

    fit, count = walk.fit_static_attention, 0

    def stop_at_the_third(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(walk, 'fit_static_attention', stop_at_the_third)
    assert command(teacher, photos, tmp_path, '--parts', 'neck') == 130
    assert '2 of 4 layers are converted; the same command goes on' in capsys.readouterr().err
    count = 10
    assert command(teacher, photos, tmp_path, '--parts', 'neck') == 0
    assert count == 12
    ours = torch.load(tmp_path / 'tiny_converted.pth', weights_only=True)['state_dict']
    whole = torch.load(converted / 'tiny_converted.pth', weights_only=True)['state_dict']
    for name in ours:
        if name.startswith('neck'):
            assert torch.equal(ours[name], whole[name]), name
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'report.json', 'report.md', 'tiny_converted.pth', 'tiny_converted.py',
    ]  # fmt: skip


def test_fine_tunes_the_converted_detector(teacher, photos, tmp_path, capsys):
    """On data of the config's own, at a low rate; a second call goes on rather than convert again."""
    data = tmp_path / 'data'
    (data / 'annotations').mkdir(parents=True)
    names = sorted(path.name for path in photos.iterdir())
    content = dict(
        images=[
            dict(id=i, file_name=str(photos / name), width=128, height=96)
            for i, name in enumerate(names)
        ],
        annotations=[
            dict(id=i + 1, image_id=i, category_id=1, bbox=[20, 20, 30, 40], area=1200, iscrowd=0)
            for i in range(len(names))
        ],
        categories=[dict(id=i, name=name) for i, name in enumerate(DIGITS, 1)],
    )
    for split in ('train', 'val'):
        (data / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    config = tmp_path / 'own.py'
    root = f'{data.as_posix()}/'
    config.write_text(
        f'_base_ = {str(teacher[0])!r}\n'
        f'data_root = {root!r}\n'
        'train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, '
        "dataset=dict(data_root=data_root, data_prefix=dict(img='')))\n"
        'val_dataloader = dict(num_workers=0, persistent_workers=False, '
        "dataset=dict(data_root=data_root, data_prefix=dict(img='')))\n"
        'test_dataloader = val_dataloader\n'
        "val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')\n"
        'test_evaluator = val_evaluator\n'
    )
    arguments = ['convert', str(config), str(teacher[1]), '--out', str(tmp_path / 'out')]
    arguments += ['--parts', 'neck', '--finetune']
    assert main([*arguments, '1']) == 0
    out = tmp_path / 'out'
    tuned = Config.fromfile(out / 'own_finetune.py')
    base = read_config(find_config('retinanet_tiny_digits'))
    assert tuned.optim_wrapper.optimizer.lr == pytest.approx(0.2 * base.optim_wrapper.optimizer.lr)
    assert tuned.optim_wrapper.paramwise_cfg.custom_keys['.query.'].lr_mult == 0.1
    assert (out / 'finetune' / 'epoch_1.pth').is_file()
    # Training began with the converted weights.
    before = torch.load(out / 'own_converted.pth', weights_only=True)['state_dict']
    after = load_detector(tuned, out / 'finetune' / 'epoch_1.pth').state_dict()
    name = 'neck.fpn_convs.0.conv.value.weight'
    assert 0 < (before[name] - after[name]).norm() < 0.2 * before[name].norm()
    capsys.readouterr()
    assert main([*arguments, '2']) == 0
    assert f'{out / "own_converted.pth"} is there already' in capsys.readouterr().err
    assert (out / 'finetune' / 'epoch_2.pth').is_file()


def test_memory_bounds_the_number_of_images(teacher, photos, monkeypatch):
    model = load_detector(Config.fromfile(teacher[0]), teacher[1])
    files = find_images(model.cfg, photos)
    image = load_images(model, model.cfg, files, 2)[:1]
    need = bytes_per_image(model, image)
    assert need < MEMORY // 64
    monkeypatch.setattr('sasa_det.convert.detectors.MEMORY', 3 * need)
    assert len(load_images(model, model.cfg, files, 64)) == 3


@pytest.mark.parametrize(
    'change, message',
    [
        (['--images', 'nowhere'], 'nowhere: no such folder of images'),
        (['--parts', 'nose'], r"parts may hold \('backbone', .*\), but has 'nose'"),
        (['--heads', '0'], 'num_heads must be an integer of at least 1, but is 0'),
        (['--kernel-size', '4'], 'kernel_size must be an odd integer of at least 3, but is 4'),
        (['--num-images', '1'], 'at least two images, but there are 5 and 1 are asked for'),
        (['--cfg-options', 'model.neck.out_channels=32'], 'weights are not those of the model'),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(teacher, photos, tmp_path, capsys, change, message):
    assert command(teacher, photos, tmp_path, *change) == 2
    assert re.search(f'^sasa-det convert: .*{message}', capsys.readouterr().err, re.MULTILINE)


def test_images_that_do_not_load_are_named(teacher, tmp_path, capsys):
    (tmp_path / 'in').mkdir()
    for name in ('a.png', 'b.png'):
        (tmp_path / 'in' / name).write_bytes(b'no image')
    assert command(teacher, tmp_path / 'in', tmp_path / 'out') == 2
    assert 'b.png: cannot be read as an image' in capsys.readouterr().err.replace('a.png', 'b.png')


def test_a_folder_without_images_is_named(teacher, tmp_path, capsys):
    assert command(teacher, tmp_path, tmp_path / 'out') == 2
    assert f'{tmp_path}: there is no image' in capsys.readouterr().err
