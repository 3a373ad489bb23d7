"""Attention in detectors that are not ours: each config trains a step and predicts; what cannot is refused."""

import copy
import math
from collections import Counter

import pytest
import torch
from foreign_detectors import CONV_CFG, DETECTORS, FOLDER, build, inputs, read
from mmcv.cnn.utils import fuse_conv_bn
from mmdet.registry import MODELS
from mmengine.optim import build_optim_wrapper

from sasa_det.evaluation.attention_maps import attention_layers


@pytest.fixture(scope='module', params=DETECTORS)
def detector(request):
    """A narrowed detector, its config, and what attends in it."""
    narrower, attending = DETECTORS[request.param]
    config = read(request.param, narrower)
    assert config.custom_imports == dict(imports=['sasa_det'])
    model = build(config)
    model.init_weights()
    return model, config, attending


def with_mask(model):
    return getattr(model, 'with_mask', False)


def test_each_config_has_its_case():
    assert {path.stem for path in FOLDER.glob('*.py')} == DETECTORS.keys()


def test_trains_a_step(detector):
    model, config, attending = detector
    attention = {
        f'{layer}.{name}': parameter
        for layer, module in attention_layers(model).items()
        for name, parameter in module.named_parameters()
    }
    assert Counter(name.split('.')[0] for name in attention_layers(model)) == attending

    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    model.train()
    total, log = model.parse_losses(model(**inputs(model, True, with_mask(model)), mode='loss'))
    assert all(math.isfinite(float(value)) for value in log.values()), log
    optimizer.backward(total)
    without = [name for name, p in attention.items() if p.grad is None or not p.grad.any()]
    assert without == []
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_predicts(detector):
    model, _, _ = detector
    model.eval()
    data = inputs(model, False, with_mask(model))
    with torch.no_grad():
        found = model(**data, mode='predict')
    assert len(found) == 2
    for sample in found:
        boxes, (height, width) = sample.pred_instances, sample.ori_shape[:2]
        assert len(boxes) > 0
        corners = boxes.bboxes
        assert corners.isfinite().all() and (corners >= 0).all()
        assert (corners[:, 0::2] <= width).all() and (corners[:, 1::2] <= height).all()
        assert ((boxes.scores >= 0) & (boxes.scores <= 1)).all()
        assert ((boxes.labels >= 0) & (boxes.labels < 3)).all()
        if with_mask(model):
            assert boxes.masks.shape == (len(boxes), height, width)
            assert boxes.masks.dtype == torch.bool


def test_batch_norms_fuse_around_attention(detector):
    """As mmdet's benchmark.py --fuse-conv-bn has them: attention has no batch norm folded into it."""
    model, _, _ = detector
    exact = copy.deepcopy(model).double().eval()
    fused = fuse_conv_bn(copy.deepcopy(exact))
    images = inputs(model, False, False)['inputs'].double()
    with torch.no_grad():
        for expected, found in zip(exact.extract_feat(images), fused.extract_feat(images)):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


class TestWhatCannotAttend:
    def test_depthwise_convolutions(self):
        """Without keep_grouped RTMDet's neck is refused."""
        name = 'rtmdet_tiny_sasa-pafpn_sasa-head_8xb32-300e_coco'
        config = read(name, dict(neck=dict(conv_cfg=dict(keep_grouped=False))))
        with pytest.raises(ValueError, match='groups must be 1 .* keep_grouped=True in conv_cfg'):
            build(config)

    def test_resnext(self):
        backbone = dict(type='ResNeXt', depth=50, groups=32, base_width=4, conv_cfg=CONV_CFG)
        with pytest.raises(ValueError, match='groups must be 1 .* but is 32'):
            MODELS.build(backbone)

    def test_heads_that_do_not_divide_the_channels(self):
        name = 'atss_sasa-r50_sasa-fpn_sasa-head_1x_coco'
        with pytest.raises(ValueError, match='num_heads must divide out_channels, 36, but is 8'):
            build(read(name, dict(bbox_head=dict(feat_channels=36))))

    def test_a_stage_with_deformable_convolution(self):
        name = 'faster-rcnn_sasa-r50_sasa-fpn_1x_coco'
        dcn = dict(dcn=dict(type='DCNv2'), stage_with_dcn=(False, True, True, True))
        with pytest.raises(ValueError, match='stage 2 can attend or be deformable'):
            build(read(name, dict(backbone=dcn)))


def test_a_deformable_last_layer_takes_the_place_of_attention():
    """mmdet's dcn_on_last_conv sets the last layer of each tower, and attention has the others."""
    narrower, _ = DETECTORS['fcos_sasa-r50-caffe_sasa-fpn_gn-sasa-head_1x_coco']
    narrower = copy.deepcopy(narrower)
    narrower['bbox_head'].update(dcn_on_last_conv=True)
    model = build(read('fcos_sasa-r50-caffe_sasa-fpn_gn-sasa-head_1x_coco', narrower))
    attending = [name for name in attention_layers(model) if name.startswith('bbox_head')]
    assert attending == ['bbox_head.cls_convs.0.conv', 'bbox_head.reg_convs.0.conv']


def test_rtmdets_levels_share_their_attention():
    name = 'rtmdet_tiny_sasa-pafpn_sasa-head_8xb32-300e_coco'
    head = build(read(name, DETECTORS[name][0])).bbox_head
    for tower in (head.cls_convs, head.reg_convs):
        assert tower[0][0].conv is tower[1][0].conv is tower[2][0].conv
        assert tower[0][0].bn is not tower[1][0].bn
