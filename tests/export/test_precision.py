import sys
from copy import deepcopy

import mmcv
import pytest
import torch
from foreign_detectors import ATTN_CFG, DETECTORS, inputs, read
from foreign_detectors import build as build_foreign
from mmdet.apis import inference_detector
from mmdet.structures.bbox import bbox_overlaps
from small_detectors import build
from torch import nn

from sasa_det import demo
from sasa_det.checkpoints.detector import load_detector
from sasa_det.configs import find_config, read_config
from sasa_det.evaluation.attention_maps import attention_layers
from sasa_det.export import precision
from sasa_det.export.fuse import fuse
from sasa_det.export.precision import PRECISIONS, lower_precision, why_no_bfloat16
from sasa_det.layers import LocalSelfAttention2d


@pytest.fixture
def cpu(tmp_path, monkeypatch):
    """Set the flags of this CPU."""
    path = tmp_path / 'cpuinfo'
    monkeypatch.setattr(precision, 'CPUINFO', path)
    return lambda flags: path.write_text(f'model name\t: a CPU\nflags\t\t: {flags}\n')


@pytest.fixture(autouse=True)
def any_cpu(cpu):
    cpu('fpu avx512_bf16')


@pytest.fixture(scope='module')
def digits():
    return load_detector(read_config(find_config(demo.CONFIG)), demo.CHECKPOINT)


def objects(detector, image):
    found = inference_detector(detector, image).pred_instances
    sure = found[found.scores > 0.5]
    return sure[sure.bboxes[:, 0].argsort()]


@pytest.mark.parametrize('name', PRECISIONS)
def test_a_trained_detector_finds_the_same_objects(digits, name):
    before = deepcopy(digits.state_dict())
    lower = lower_precision(fuse(digits), name)
    image = mmcv.imread(str(demo.images()[0]))
    expected, found = objects(digits, image), objects(lower, image)
    assert len(expected) > 0
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.bboxes.dtype == found.scores.dtype == torch.float32
    assert bbox_overlaps(found.bboxes, expected.bboxes, is_aligned=True).min() > 0.9
    distance = (found.scores - expected.scores).abs().max()
    assert 0 < distance < 0.05
    after = digits.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_int8_is_of_projections_alone(digits):
    lower = lower_precision(digits, 'int8')
    kinds = [type(each) for layer in attention_layers(lower).values() for each in layer.children()]
    assert set(kinds) == {torch.ao.nn.quantized.dynamic.Linear}
    assert len(kinds) == 3 * len(attention_layers(digits))
    assert {each.dtype for each in lower.parameters()} == {torch.float32}


def test_bfloat16_is_of_all_that_computes_maps(digits):
    lower = lower_precision(digits, 'bfloat16')
    assert {each.dtype for each in lower.parameters()} == {torch.bfloat16}
    assert not lower.training


@pytest.mark.parametrize('name', PRECISIONS)
@pytest.mark.parametrize(
    'kind', ['mask-rcnn_sasa-r50_sasa-fpn_sasa-mask-head_1x_coco', 'gfl_sasa-r50_sasa-fpn_sasa-head_1x_coco']
)  # fmt: skip
@torch.no_grad()
def test_other_detectors_find_boxes_in_float32(kind, name):
    detector = build_foreign(read(kind, DETECTORS[kind][0]))
    lower = lower_precision(detector, name)
    data = inputs(lower, False, detector.with_mask)
    for result in lower(**data, mode='predict'):
        assert result.pred_instances.bboxes.dtype == torch.float32
        assert result.pred_instances.bboxes.isfinite().all()
    if name == 'bfloat16' and detector.with_mask:
        assert {each.dtype for each in lower.roi_head.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    'flags, supported',
    [
        ('fpu avx512f avx512_bf16', True),
        ('amx_bf16 amx_tile', True),
        ('fp asimd bf16 i8mm', True),  # ARM
        ('fpu avx2 avx512f', False),
    ],
)
def test_a_cpu_without_bfloat16_keeps_float32(cpu, flags, supported):
    cpu(flags)
    assert (why_no_bfloat16() is None) == supported
    if not supported:
        message = (
            "this CPU has none of \\['amx_bf16', 'avx512_bf16', 'bf16'\\]: float32 is faster here"
        )
        with pytest.raises(RuntimeError, match=message):
            lower_precision(build('retina'), 'bfloat16')


def test_what_it_does_not_take_is_named():
    convolution = nn.Conv2d(3, 8, 3)
    with pytest.raises(ValueError, match="precision must be one of .*, but is 'float16'"):
        lower_precision(convolution, 'float16')
    with pytest.raises(ValueError, match='of one and two stages, but not Conv2d'):
        lower_precision(convolution, 'bfloat16')
    with pytest.raises(ValueError, match='attention layers, of which there are none'):
        lower_precision(convolution, 'int8')
    detector = build('retina')
    detector.bbox_head = LocalSelfAttention2d(16, **ATTN_CFG)
    message = 'takes a BaseDenseHead, but RetinaNet.bbox_head is a LocalSelfAttention2d'
    with pytest.raises(ValueError, match=message):
        lower_precision(detector, 'bfloat16')
    with pytest.raises(RuntimeError, match='is for CPUs'):
        lower_precision(LocalSelfAttention2d(16, **ATTN_CFG).to('meta'), 'int8')


def test_a_torch_without_quantisation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.ao.quantization', None)
    with pytest.raises(RuntimeError, match='takes torch.ao.quantization, which torch .* does not'):
        lower_precision(LocalSelfAttention2d(16, **ATTN_CFG), 'int8')
