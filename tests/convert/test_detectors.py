"""Detectors of mmdet: what is converted in each, by which images, and the command."""

import json
import math
import re
import statistics

import cv2
import mmcv.cnn.bricks.wrappers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_detectors import DETECTORS, build, inputs, read
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import nn

from sasa_det.checkpoints.detector import load_detector
from sasa_det.cli.main import main
from sasa_det.configs import find_config, read_config
from sasa_det.convert import convert
from sasa_det.convert.accuracy import LabelledImages
from sasa_det.convert.budget import errors_alone
from sasa_det.convert.detector_conversion import DetectorConversion, Settings
from sasa_det.convert.detectors import (
    MEMORY,
    bytes_per_image,
    choose_detectors_layers,
    find_images,
    load_images,
    stages_of,
)
from sasa_det.convert.files import Progress
from sasa_det.convert.walk import watch_calls
from sasa_det.evaluation.attention_maps import attention_layers
from sasa_det.evaluation.costs import count_costs

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


def test_a_stage_runs_its_part_alone():
    model = convolutional('mask-rcnn_sasa-r50_sasa-fpn_sasa-mask-head_1x_coco')
    names = ['backbone.conv1', 'rpn_head.rpn_conv', 'roi_head.mask_head.convs.0.conv']
    calls = watch_calls(model, names, stages_of(model), torch.randn(1, 3, 128, 128))
    assert [len(calls[name]) for name in names] == [1, 5, 1]  # an RPN has five levels


def test_errors_of_an_rpn_are_seen_at_the_outputs():
    model = convolutional('faster-rcnn_sasa-r50_sasa-fpn_1x_coco')
    attention = {
        name: choice.attn_cfg
        for name, choice in choose_detectors_layers(model, ('head',), 4, 3).items()
        if choice.attn_cfg
    }
    errors, _ = errors_alone(model, attention, stages_of(model), torch.randn(4, 3, 64, 64), 1)
    assert list(errors) == ['rpn_head.rpn_conv'] and errors['rpn_head.rpn_conv'] > 0.01


def test_errors_before_a_mask_head_are_of_the_same_regions():
    """Another RPN proposes other regions, but changes nothing in the mask head."""
    model = convolutional('mask-rcnn_sasa-r50_sasa-fpn_sasa-mask-head_1x_coco')
    name = 'rpn_head.rpn_conv'
    attention = {name: dict(kernel_size=3, num_heads=8, bias=True, out_proj=True)}
    stages = stages_of(model)
    stages.append(lambda model, outputs: outputs[-1])  # the masks
    errors, _ = errors_alone(model, attention, stages, torch.randn(4, 3, 128, 128), 1)
    assert errors[name] == 0


@pytest.mark.parametrize(
    'name, reached',
    [
        (
            'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco',
            ['rpn_head.rpn_conv', 'roi_head.mask_head.2.convs.3.conv'],
        ),
        ('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco', ['neck.fpn_convs.0.conv']),
        ('solo/solo_r50_fpn_1x_coco', ['neck.fpn_convs.0.conv']),
    ],
)
def test_stages_run_what_they_can(name, reached):
    config = read_config(Config._get_cfg_path(f'mmdet::{name}.py', '')[0])
    config.model.backbone.init_cfg = None
    model = build(config).eval()
    calls = watch_calls(model, reached, stages_of(model), torch.randn(1, 3, 64, 64))
    assert list(calls) == reached


def test_offsets_of_deformable_convolutions_stay():
    class Deformable(nn.Module):
        deform_groups = 1

        def __init__(self):
            super().__init__()
            self.conv_offset = nn.Conv2d(16, 18, 3, padding=1)

    model = nn.ModuleDict(dict(backbone=nn.ModuleDict(dict(conv2=Deformable()))))
    choices = choose_detectors_layers(model)
    assert choices['backbone.conv2.conv_offset'].reason.startswith('it computes the offsets of a')


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
    arguments = [str(config), str(checkpoint), '--images', str(photos), '--out', str(out)]
    return main(['convert', *arguments, '--num-val-images', '0', *more])


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
    reports = [json.loads((each / 'report.json').read_text()) for each in (tmp_path, converted)]
    for ours, whole in zip(*(report['layers'] for report in reports)):
        for name in ('layer', 'unavoidable', 'unexplained'):
            assert ours[name] == whole[name]
        assert ours['seconds'] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'index.html', 'report.json', 'tiny_converted.pth', 'tiny_converted.py',
    ]  # fmt: skip


def test_layers_of_images_of_another_size_are_not_gone_on_with(
    teacher, photos, tmp_path, capsys, monkeypatch
):
    from sasa_det.convert import walk

    fit, left = walk.fit_static_attention, 1

    def stop(*args, **kwargs):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return fit(*args, **kwargs)

    monkeypatch.setattr(walk, 'fit_static_attention', stop)
    assert command(teacher, photos, tmp_path, '--parts', 'neck') == 130
    assert '1 of 4 layers are converted' in capsys.readouterr().err
    smaller = ['--cfg-options', 'test_dataloader.dataset.pipeline.1.scale=(96,96)']
    assert command(teacher, photos, tmp_path, '--parts', 'neck', *smaller) == 130
    assert '0 of 4 layers are converted' in capsys.readouterr().err


def test_options_and_imports_of_the_config_hold_for_the_converted_one(teacher, photos, tmp_path):
    config = tmp_path / 'own.py'
    config.write_text(
        f'_base_ = {str(teacher[0])!r}\n'
        "custom_imports = dict(imports='sasa_det', allow_failed_imports=False)\n"
    )
    options = ['--parts', 'neck', '--cfg-options', 'model.test_cfg.score_thr=0.25']
    assert command((config, teacher[1]), photos, tmp_path / 'out', *options) == 0
    converted = Config.fromfile(tmp_path / 'out' / 'own_converted.py')
    assert converted.model.test_cfg.score_thr == 0.25
    assert converted.custom_imports.imports == ['sasa_det']
    load_detector(converted, converted.load_from)


def test_what_was_measured_is_not_measured_again(tmp_path):
    settings = dict(seed=0)
    assert Progress(tmp_path, settings).once('time', lambda: [1.0, {'a': 2.0}]) == [1.0, {'a': 2.0}]
    assert Progress(tmp_path, settings).once('time', lambda: [5.0]) == [1.0, {'a': 2.0}]
    assert Progress(tmp_path, dict(seed=1)).once('time', lambda: [5.0]) == [5.0]


def test_static_attention_has_no_queries_and_wider_ones_fit_better(
    teacher, photos, converted, tmp_path
):
    assert command(
        teacher, photos, tmp_path, '--parts', 'neck', 'head', '--static', '--expansion', '2'
    ) == 0  # fmt: skip
    student = load_detector(
        Config.fromfile(tmp_path / 'tiny_converted.py'), tmp_path / 'tiny_converted.pth'
    )
    for layer in attention_layers(student).values():
        assert layer.constant_query and layer.logits == 'qr'
        assert layer.hidden_channels == 2 * layer.out_channels
    plain, wide = (
        json.loads((folder / 'report.json').read_text()) for folder in (converted, tmp_path)
    )
    left = [sum(row['unexplained'] for row in report['layers']) for report in (plain, wide)]
    assert left[1] < 0.9 * left[0]
    # Twice as many values and outputs take the place of queries and keys.
    sizes = [report['total']['parameters_after'] for report in (plain, wide)]
    assert abs(sizes[1] - sizes[0]) < 0.01 * sizes[0]
    assert '--static --expansion 2' in (tmp_path / 'index.html').read_text()


def test_the_page_shows_the_report_and_needs_no_other_file(teacher, photos, converted):
    page = (converted / 'index.html').read_text()
    report = json.loads((converted / 'report.json').read_text())
    for row in report['layers']:
        found = re.search(rf'<tr><td>{re.escape(row["layer"])}</td><td>([\d.]+)</td>', page)
        assert float(found[1]) == pytest.approx(row['unexplained'], abs=6e-4)
    for name, reason in report['kept'].items():
        assert f'<td>{name}</td><td>{reason}</td>' in page
    assert 'AP was not measured: num_val_images must be at least 1' in page
    config, checkpoint = teacher
    repeat = re.search(r'<pre><code>(.*)</code></pre>', page)[1]
    assert repeat == (
        f'sasa-det convert {config} {checkpoint} --out {converted} --images {photos} --parts neck head '
        '--num-val-images 0'
    )
    assert f'{repeat} --finetune 2' in page
    beside = converted / 'tiny_converted.py'
    assert f'predict IMAGES --config {beside} --checkpoint {converted}/tiny_converted.pth' in page
    assert f'explore {converted}/tiny_converted.pth --config {beside}' in page
    assert re.findall(r'(?:src|href)="(?!report.json)', page) == []


def test_a_budget_of_ap_measures_what_it_tries(teacher, photos, tmp_path, monkeypatch):
    """Each converted layer loses 0.6 AP here, and gains time."""

    class Labels:
        indices = [0]

        def __init__(self, config, most):
            pass

        def ap(self, model):
            return 50.0 - 0.6 * len(attention_layers(model))

    def costs(teacher, student, calls, stages, image):
        kinds = ('parameters', 'gflops', 'ms')
        before, after = (
            {f'{kind}_{when}': x for kind in kinds} for when, x in (('before', 2), ('after', 1))
        )
        return {name: {**before, **after} for name in calls}

    monkeypatch.setattr('sasa_det.convert.detector_conversion.LabelledImages', Labels)
    monkeypatch.setattr('sasa_det.convert.budget.compare_layers', costs)
    options = ['--parts', 'neck', '--num-val-images', '1', '--budget', 'ap=-1.9']
    assert command(teacher, photos, tmp_path, *options) == 0
    report = json.loads((tmp_path / 'report.json').read_text())
    assert len(report['layers']) == 3 and report['ap'] == dict(images=1, before=50.0, after=48.2)
    tried = dict(map(tuple, report['tradeoff']['measured']))
    assert pytest.approx(-1.8) in tried.values() and pytest.approx(-2.4) in tried.values()
    assert report['tradeoff']['mixes']['neck'] == report['tradeoff']['mixes']['all']
    assert '<img src="data:image/png;base64,' in (tmp_path / 'index.html').read_text()


def test_a_budget_of_all_the_time_leaves_the_detector_as_it_is(teacher, photos, tmp_path):
    assert command(teacher, photos, tmp_path, '--parts', 'neck', '--budget', 'time=1.0') == 0
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['layers'] == [] and report['tradeoff']['mixes']['chosen'] == [1.0, 0.0]
    reasons = {report['kept'][f'neck.fpn_convs.{level}.conv'] for level in range(4)}
    assert reasons <= {'it gains no time', 'the budget is met without it'}
    same = load_detector(
        Config.fromfile(tmp_path / 'tiny_converted.py'), tmp_path / 'tiny_converted.pth'
    ).state_dict()
    original = load_detector(Config.fromfile(teacher[0]), teacher[1]).state_dict()
    assert list(same) == list(original)
    assert all(torch.equal(value, same[name]) for name, value in original.items())


def test_a_budget_of_time_is_that_of_the_whole_detector(teacher, photos, tmp_path, monkeypatch):
    """By itself a layer gains a tenth of a second, and in the detector a twentieth of the time."""

    def costs(teacher, student, calls, stages, image):
        both = dict(ms_before=200.0, ms_after=100.0)
        return {name: dict(parameters_before=1, parameters_after=1, **both) for name in calls}

    def share(teacher, student, stages, image):
        assert not student.training and not attention_layers(teacher)
        tried.append(len(attention_layers(student)))
        return 1 - 0.05 * tried[-1]

    tried = []
    monkeypatch.setattr('sasa_det.convert.budget.compare_layers', costs)
    monkeypatch.setattr('sasa_det.convert.detector_conversion.share_of_time', share)
    options = ['--parts', 'neck', '--budget', 'time=0.88']
    assert command(teacher, photos, tmp_path, *options) == 0
    assert tried == [4, 3, 2]  # all, what the sum says, and fewer, which is too few
    assert len(json.loads((tmp_path / 'report.json').read_text())['layers']) == 3


@pytest.fixture
def labelled(photos, tmp_path, teacher):
    """A config with five labelled images."""
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
    return config


@pytest.mark.parametrize('most', [2, 10])
def test_ap_is_that_of_the_images_that_were_taken(labelled, most):
    class Knows(nn.Module):
        def val_step(self, data):
            for sample in data['data_samples']:
                box = torch.tensor([[20.0, 20.0, 50.0, 60.0]])
                sample.pred_instances = InstanceData(
                    bboxes=box, scores=torch.ones(1), labels=torch.zeros(1, dtype=torch.long)
                )
            return data['data_samples']

    class FindsNothing(nn.Module):
        def val_step(self, data):
            for sample in data['data_samples']:
                sample.pred_instances = InstanceData(
                    bboxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0).long()
                )
            return data['data_samples']

    images = LabelledImages(Config.fromfile(labelled), most)
    assert len(images.indices) == min(5, most)
    assert images.ap(Knows()) == pytest.approx(100)
    assert images.ap(FindsNothing()) == 0


def test_a_budget_of_ap_needs_labels(teacher, photos, labelled, tmp_path, capsys):
    (tmp_path / 'data/annotations/instances_val.json').unlink()
    options = ['--num-val-images', '5', '--budget', 'ap=-1']
    assert command((labelled, teacher[1]), photos, tmp_path / 'out', *options) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f'{labelled}: val_dataloader.dataset cannot be read (' in message
    assert 'instances_val.json' in message
    assert command((labelled, teacher[1]), photos, tmp_path / 'out', *options[2:]) == 2
    assert 'num_val_images must be at least 1 to measure AP' in capsys.readouterr().err


def test_mmcvs_own_class_of_convolutions_is_converted():
    model = nn.Sequential(mmcv.cnn.bricks.wrappers.Conv2d(16, 16, 3, padding=1), nn.ReLU()).eval()
    assert count_costs(model, torch.zeros(1, 16, 5, 5)).flops == 2 * 9 * 16 * 16 * 25
    found = convert(model, torch.randn(4, 16, 12, 12))
    assert list(found.attention) == ['0'] and found.fitted['0'].unexplained < 0.9


def test_fine_tuning_by_iterations_is_refused_at_once(teacher, photos, tmp_path, capsys):
    config = tmp_path / 'own.py'
    config.write_text(
        f'_base_ = {str(teacher[0])!r}\n'
        "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=5)\n"
    )
    out = tmp_path / 'out'
    assert command((config, teacher[1]), photos, out, '--finetune', '1') == 2
    assert f'{config}: train_cfg.max_epochs is not set' in capsys.readouterr().err
    assert not out.exists()


def test_finds_the_images_of_joined_data_sets(photos, tmp_path):
    content = dict(
        images=[dict(id=0, file_name='0.png', width=128, height=96)],
        annotations=[],
        categories=[dict(id=1, name='zero')],
    )
    (tmp_path / 'coco.json').write_text(json.dumps(content))
    one = dict(
        type='CocoDataset', ann_file=str(tmp_path / 'coco.json'), data_prefix=dict(img=str(photos))
    )
    joined = dict(
        type='ConcatDataset', datasets=[one, dict(type='RepeatDataset', times=2, dataset=one)]
    )
    config = Config(dict(train_dataloader=dict(dataset=joined)))
    assert find_images(config) == [str(photos / '0.png')] * 2


def test_memory_is_that_of_images_padded_to_one_size(teacher, tmp_path, monkeypatch):
    files = [str(tmp_path / name) for name in ('wide.png', 'high.png', 'other.png')]
    for file, size in zip(files, ((64, 128), (128, 64), (64, 128))):
        cv2.imwrite(file, np.zeros((*size, 3), np.uint8))
    model = load_detector(Config.fromfile(teacher[0]), teacher[1])
    model.cfg.test_dataloader.dataset.pipeline.pop(1)  # which resizes
    alone = load_images(model, model.cfg, [files[0], files[2]], 2)[:1]
    monkeypatch.setattr('sasa_det.convert.detectors.MEMORY', 4.5 * bytes_per_image(model, alone))
    # Padded to 128 x 128 an image takes twice as much.
    assert len(load_images(model, model.cfg, files, 3)) == 2


def test_a_detector_that_cannot_be_run_is_named(teacher, monkeypatch):
    model = load_detector(Config.fromfile(teacher[0]), teacher[1])
    monkeypatch.setattr(model.bbox_head, 'forward', lambda: None)
    with pytest.raises(ValueError, match=r'RetinaNet cannot be converted: .* \(TypeError: .*given'):
        bytes_per_image(model, torch.zeros(1, 3, 64, 64))


def test_fine_tunes_the_converted_detector(teacher, labelled, tmp_path, capsys):
    """On data of the config's own, at a low rate; a second call goes on rather than convert again."""
    arguments = ['convert', str(labelled), str(teacher[1]), '--out', str(tmp_path / 'out')]
    arguments += ['--parts', 'neck', '--finetune']
    assert main([*arguments, '1']) == 0
    out = tmp_path / 'out'
    assert json.loads((out / 'report.json').read_text())['ap']['images'] == 5
    tuned = Config.fromfile(out / 'own_finetune.py')
    base = read_config(find_config('retinanet_tiny_digits'))
    assert base.train_cfg.max_epochs == 8
    share = math.sin(math.pi / 16) ** 2  # what a cosine has left an epoch before its end
    assert tuned.optim_wrapper.optimizer.lr == pytest.approx(
        share * base.optim_wrapper.optimizer.lr
    )
    assert tuned.optim_wrapper.paramwise_cfg.custom_keys['.query.'].lr_mult == 1
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
    # With other settings it would be another one.
    report = out / 'report.json'
    report.write_text(report.read_text().replace('"settings": "', '"settings": "0'))
    settings = Settings(
        labelled, str(teacher[1]), [], None, 64, 200, ['neck'], 8, 5, False, 1, None, 0, 'cpu'
    )
    with pytest.raises(
        ValueError, match='own_converted.pth, which was converted with other settings'
    ):
        _ = DetectorConversion(settings, out).is_made


def test_an_unknown_part_is_refused_at_once(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(['convert', 'any.py', 'any.pth', '--out', str(tmp_path / 'out'), '--parts', 'nose'])
    assert end.value.code == 2
    assert "invalid choice: 'nose' (choose from" in capsys.readouterr().err


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
        (['--heads', '0'], 'num_heads must be an integer of at least 1, but is 0'),
        (['--expansion', '0'], 'expansion must be an integer of at least 1, but is 0'),
        (['--kernel-size', '4'], 'kernel_size must be an odd integer of at least 3, but is 4'),
        (['--finetune', '-1'], 'epochs of fine-tuning must be at least 0, but is -1'),
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
    message = 'b.png: cannot be loaded by the test pipeline'
    assert message in capsys.readouterr().err.replace('a.png', 'b.png')


def test_a_folder_without_images_is_named(teacher, tmp_path, capsys):
    assert command(teacher, tmp_path, tmp_path / 'out') == 2
    assert f'{tmp_path}: there is no image' in capsys.readouterr().err
