import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from small_detectors import build
from torch import nn

from sasa_det.configs import find_config, read_config
from sasa_det.export.fuse import Shift, fuse
from sasa_det.layers import AttentionStem, LocalSelfAttention2d

ATTENTION = dict(kernel_size=5, num_heads=2)


def spread_norms(model):
    """Give norms the statistics and weights of a trained model, each channel others."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(norm.running_mean, std=0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight, 1, 0.3)
                nn.init.normal_(norm.bias, std=0.5)
    return model.eval()


def build_tiny(name, **head):
    build('retina')  # registers all
    model = read_config(find_config(name)).model
    model.bbox_head.update(head)
    torch.manual_seed(0)
    return MODELS.build(model)


def kinds(model):
    return [type(each) for each in model.modules()]


@torch.no_grad()
def distance(model, fused, x):
    """By how much the outputs differ, as a share of the largest."""
    expected, got = ([each for level in zip(*m(x)) for each in level] for m in (model, fused))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, got))


def network(detector):
    return lambda x: detector.bbox_head(detector.extract_feat(x))


@pytest.mark.parametrize(
    'name, head, size',
    [
        ('retinanet_tiny_digits', {}, (96, 64)),
        ('retinanet_sasa-tiny_digits', dict(attn_parts=('cls', 'reg', 'predictors')), (96, 64)),
        ('retinanet_sasa-tiny-attnstem_bccd', {}, (94, 65)),
    ],
)
def test_a_detector_without_batch_norms_computes_the_same(name, head, size):
    detector = spread_norms(build_tiny(name, **head))
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    fused = fuse(detector)
    assert nn.BatchNorm2d not in kinds(fused)
    assert kinds(fused).count(nn.GroupNorm) == kinds(detector).count(nn.GroupNorm) >= 8
    assert distance(network(detector), network(fused), torch.randn(2, 3, *size)) < 1e-5
    after = detector.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@torch.no_grad()
def test_a_program_of_it_computes_the_same():
    model = nn.Sequential(LocalSelfAttention2d(4, **ATTENTION), nn.BatchNorm2d(4))
    fused = fuse(spread_norms(model))
    x = torch.randn(2, 4, 6, 7)
    program = torch.export.export(fused, (x,)).module()
    assert torch.allclose(program(x), fused(x), rtol=1e-5, atol=1e-5)


def test_frozen_norms_are_folded_as_others():
    detector = build_tiny('retinanet_sasa-tiny_digits')
    for norm in spread_norms(detector).modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.requires_grad_(False)
    fused = fuse(detector)
    assert nn.BatchNorm2d not in kinds(fused)
    assert distance(network(detector), network(fused), torch.randn(1, 3, 64, 64)) < 1e-5


@pytest.mark.parametrize('downsample, stride', [('pool', 1), ('pool', 2), ('query', 2)])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize(
    'border, out_proj, rest',
    [
        ('zeros', False, Shift),
        ('mask', False, nn.Identity),
        ('zeros', True, nn.Identity),
        ('mask', True, nn.Identity),
    ],
)
@torch.no_grad()
def test_attention_computes_the_same_at_borders_too(
    border, out_proj, rest, bias, downsample, stride
):
    torch.manual_seed(0)
    options = dict(border=border, out_proj=out_proj, bias=bias, stride=stride)
    layer = LocalSelfAttention2d(6, 8, downsample=downsample, **options, **ATTENTION)
    for projection in (layer.value, layer.out_proj):
        if projection is not None and bias:
            nn.init.normal_(projection.bias)
    model = spread_norms(nn.Sequential(layer, nn.BatchNorm2d(8)))
    fused = fuse(model)
    assert type(fused[1]) is rest
    x = torch.randn(2, 6, 7, 9)  # a window reaches beyond the map from most pixels
    assert torch.allclose(fused(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('values', ['mixtures', 'plain', 'conv'])
@torch.no_grad()
def test_a_stem_computes_the_same_at_borders_too(values, bias):
    torch.manual_seed(0)
    stem = spread_norms(AttentionStem(3, 8, values=values, bias=bias))
    fused = fuse(stem)
    assert type(fused.norm) is (Shift if values == 'mixtures' else nn.Identity)
    x = torch.randn(2, 3, 10, 15)
    assert torch.allclose(fused(x), stem(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_layer_before_several_norms_is_folded_with_each():
    build('retina')
    torch.manual_seed(0)
    options = dict(norm_cfg=dict(type='BN'), padding=1)
    model = nn.ModuleList(
        [
            ConvModule(8, 8, 3, conv_cfg=dict(type='SASA', **ATTENTION), **options),
            ConvModule(8, 8, 3, conv_cfg=dict(type='SASA', **ATTENTION), **options),
            ConvModule(8, 8, 3, **options),
            ConvModule(8, 8, 3, **options),
        ]
    )
    model[1].conv, model[3].conv = model[0].conv, model[2].conv
    fused = fuse(spread_norms(model))
    assert nn.BatchNorm2d not in kinds(fused)
    x = torch.randn(1, 8, 6, 7)
    for one, other in zip(model, fused):
        assert torch.allclose(one(x), other(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_norm_without_weights_is_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    attention = nn.Sequential(LocalSelfAttention2d(4, **ATTENTION), nn.BatchNorm2d(4, affine=False))
    model = spread_norms(nn.Sequential(model, attention))
    x = torch.randn(1, 3, 8, 8)
    assert nn.BatchNorm2d not in kinds(fuse(model))
    assert torch.allclose(fuse(model)(x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_mmcvs_own_way_to_fold_is_switched_off():
    norm = dict(norm_cfg=dict(type='BN'), efficient_conv_bn_eval=True)
    model = spread_norms(nn.Sequential(ConvModule(3, 4, 3, **norm)))
    x = torch.randn(1, 3, 8, 8)
    assert torch.allclose(fuse(model)(x), model(x), rtol=1e-5, atol=1e-5)


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.conv1(self.bn1(x))


def hooked(attribute, module):
    getattr(module, attribute)(lambda *_: None)
    return module


@pytest.mark.parametrize(
    'model',
    [
        OwnBlock(),
        ConvModule(4, 4, 1, norm_cfg=dict(type='BN'), order=('norm', 'conv', 'act')),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(hooked('register_forward_hook', nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), hooked('register_forward_pre_hook', nn.BatchNorm2d(4))),
        nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)
        ),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Sequential(nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4)),
    ],
)  # fmt: skip
@torch.no_grad()
def test_what_is_not_known_to_follow_stays(model):
    spread = model.eval()
    fused = fuse(spread)
    assert nn.BatchNorm2d in kinds(fused)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(fused(x), spread(x))
