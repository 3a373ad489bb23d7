"""The configs: named for what attends, mmdet's without it, switched by part; each runs and learns."""

import copy
import os
import re
from itertools import product
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.analysis import get_model_complexity_info
from mmengine.analysis.print_helper import _format_size
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings
from torch import nn

from sasa_det.configs import find_config, read_config
from sasa_det.convert.files import _as_base
from sasa_det.evaluation.costs import Classifier, build_model, count_costs
from sasa_det.layers import AttentionStem, DepthwiseSeparableConv2d, LocalSelfAttention2d
from sasa_det.models import SASAFPN, SASAResNet
from tests.outside import outside, why_not
from tools.checks import mixes as check_mixes

ROOT = Path(__file__).resolve().parents[1]
COCO = outside('coco_cc')
MIXES = check_mixes.LEAVES
TWINS = sorted((ROOT / 'configs/ablations').glob('*_bccd.py'))
# Those of RetinaNet; test_other_detectors.py has the others. The twins are compared with their originals.
LEAVES = sorted(
    path
    for path in (ROOT / 'configs').rglob('*.py')
    if not {'_base_', 'other_detectors'}.intersection(path.parts) and path not in TWINS
)
CONV = ROOT / 'configs/retinanet/retinanet_r50_fpn_1x_coco.py'
SASA = ROOT / 'configs/retinanet/retinanet_sasa-r50_sasa-fpn_sasa-head_1x_coco.py'
PARTS = ('backbone', 'neck', 'bbox_head')

needs_coco = pytest.mark.skipif(not COCO.is_dir(), reason=why_not('coco_cc'))


def leaf_name(path):
    return path.stem


def build(config):
    """Build the model as a Runner does, but without its weights' download."""
    import_modules_from_strings(**config.custom_imports)
    return build_model(config)


def attention_layers(module):
    return {n: m for n, m in module.named_modules() if isinstance(m, LocalSelfAttention2d)}


def spatial_convs(module):
    return {
        n for n, m in module.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)
    }


def attending_parts(model):
    return {
        part for part in PARTS if hasattr(model, part) and attention_layers(getattr(model, part))
    }


def read_name(name):
    """Take a config's name apart by the rule in configs/README.md."""
    rule = re.search(r'```regex\n(.+?)\n```', (ROOT / 'configs/README.md').read_text(), re.DOTALL)[
        1
    ]
    found = re.fullmatch(rule, name, re.VERBOSE)
    assert found, f'{name} does not follow the naming rule of configs/README.md'
    return found.groupdict()


def parts_in_name(name):
    """Which parts a config's name says attend."""
    said = read_name(name)
    backbone = said['sasa'] is not None
    if said['detector'] is None:
        return {'backbone'} if backbone else set()
    if said['neck'] is None:  # what is said of the backbone holds for all
        return set(PARTS) if backbone else set()
    marks = (backbone, 'sasa' in said['neck'], said['head'])
    return {part for part, mark in zip(PARTS, marks) if mark}


STARTS = dict(randinit='random', centreinit='centre', nopos='random', abspos='random')


def variants_in_name(name):
    """What a config's name says of its backbone's attention, beside that there is some."""
    tokens = read_name(name)['variants'].split('-')[1:]
    stems = dict(attnstem='mixtures', plainstem='plain', convvaluestem='conv')
    stages = next((each[1:] for each in tokens if re.fullmatch('s[1-4]+', each)), '1234')
    sizes = [int(each[1:]) for each in tokens if re.fullmatch(r'k\d+', each)]
    return dict(
        stages={int(stage) for stage in stages},
        kernel_size=sizes[0] if sizes else None,
        position=next(
            (x for each, x in (('nopos', 'none'), ('abspos', 'absolute')) if each in tokens),
            'relative',
        ),
        logits='qr' if {'qr', 'static'}.intersection(tokens) else None,
        constant_query='static' in tokens,
        init=next((start for each, start in STARTS.items() if each in tokens), 'neighbours'),
        lead=float(next((each[4:] for each in tokens if each.startswith('lead')), 8)),
        stem=next((stems[each] for each in tokens if each in stems), None),
    )


@pytest.fixture(scope='module', params=LEAVES, ids=leaf_name)
def leaf(request):
    """A leaf's path and its detector."""
    return request.param, build(read_config(request.param))


def test_the_eight_mixes_are_there():
    names = {
        f'retinanet_{backbone}r50_{neck}fpn{head}_1x_coco'
        for backbone, neck, head in product(('', 'sasa-'), ('', 'sasa-'), ('', '_sasa-head'))
    }
    assert {path.stem for path in MIXES} == names


BLOCKS = {name: SASAResNet.arch_settings[name][1] for name in SASAResNet.arch_settings}


class TestEachLeaf:
    def test_is_named_for_what_attends(self, leaf):
        path, model = leaf
        assert attending_parts(model) == parts_in_name(path.stem)
        said = variants_in_name(path.stem)
        layers = attention_layers(model.backbone)
        if layers:
            assert {int(re.match(r'layer(\d)', name)[1]) for name in layers} == said['stages']
        if read_name(path.stem)['neck'] is None:
            layers = attention_layers(model)  # what is said of the backbone holds for all
        kinds = {
            (m.kernel_size, m.position, m.logits, m.constant_query, m.init, m.init_lead)
            for m in layers.values()
        }
        size = said['kernel_size'] or (5 if 'tiny' in path.stem else 7)
        logits = said['logits'] or ('qk+qr' if said['position'] == 'relative' else 'qk')
        expected = (size, said['position'], logits, said['constant_query'])
        assert kinds <= {(*expected, said['init'], said['lead'])}
        stem = getattr(model.backbone, 'stem', None)
        assert (stem.values if isinstance(stem, AttentionStem) else None) == said['stem']
        depth = read_name(path.stem)['depth']
        assert model.backbone.depth == (int(depth) if depth else 26)

    def test_leaves_no_spatial_convolution_where_it_attends(self, leaf):
        path, model = leaf
        tiny, paper = 'tiny' in path.stem, 'paper' in path.stem
        said = variants_in_name(path.stem)
        blocks = BLOCKS[model.backbone.depth]
        layers = dict(
            backbone=sum(blocks[stage - 1] for stage in said['stages']),
            neck=4 if tiny else 5,
            bbox_head=8 if tiny or paper else 10,
        )
        stem = {'stem.0', 'stem.3', 'stem.6'} if tiny else {'conv1'}
        stays = dict(
            backbone=(
                stem if said['stem'] is None else {'stem.value'} & spatial_convs(model.backbone)
            )
            | {
                f'layer{stage + 1}.{block}.conv2'
                for stage, count in enumerate(blocks)
                for block in range(count)
                if stage + 1 not in said['stages']
            },
            neck=set(),
            bbox_head={'retina_cls', 'retina_reg'} if tiny else set(),
        )
        for part in attending_parts(model):
            module = getattr(model, part)
            assert spatial_convs(module) == stays[part]
            attention = attention_layers(module).values()
            assert len(attention) == layers[part]
            assert {m.num_heads for m in attention} == {4 if tiny else 8}

    def test_runs_forward_and_backward(self, leaf):
        """Batch norm in the mode that the config trains in; every parameter that is to learn does."""
        model = leaf[1].train()
        model.zero_grad()
        torch.manual_seed(0)
        if isinstance(model, Classifier):
            losses = [
                nn.functional.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.arange(2))
            ]
        else:
            classes = model.bbox_head.num_classes
            batch = demo_mm_inputs(1, [[3, 128, 96]], num_items=[3], num_classes=classes)
            model.data_preprocessor.batch_augments = None  # the paper's pads to 640 px
            data = model.data_preprocessor(batch, True)
            found = model(**data, mode='loss')
            losses = [
                x for each in found.values() for x in (each if type(each) is list else [each])
            ]
        sum(losses).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        model.zero_grad()


def test_the_ablations_on_bccd_are_those_on_the_digits():
    names = {path.stem.removesuffix('_bccd') for path in TWINS}
    of_the_start = {'retinanet_sasa-tiny-lead2', 'retinanet_sasa-tiny-lead4'}
    of_the_start |= {'retinanet_sasa-tiny-centreinit'}
    digits = {path.stem for path in TWINS[0].parent.glob('*_digits.py')}
    assert {f'{name}_digits' for name in names | of_the_start} == digits
    trained = read_config(find_config('retinanet_sasa-tiny_bccd'))
    for name in names:
        models = []
        for data in ('digits', 'bccd'):
            config = read_config(find_config(f'{name}_{data}'))
            models.append(config.model.to_dict())
            for key in ('num_classes', 'anchor_generator'):  # the data's
                models[-1]['bbox_head'].pop(key)
        assert models[0] == models[1], name
        # The last is BCCD's: the recipe is that of its other rows.
        for key in ('optim_wrapper', 'train_cfg', 'param_scheduler', 'train_dataloader'):
            assert config[key] == trained[key], (name, key)


@pytest.mark.parametrize('data', ['digits', 'bccd'])
def test_depthwise_separable_convolutions_have_the_parameters_of_attention(data):
    model = build(read_config(find_config(f'retinanet_dwconv-tiny_{data}')))
    found = [m for m in model.modules() if isinstance(m, DepthwiseSeparableConv2d)]
    assert len(found) == sum(BLOCKS[26]) + 4 + 8
    assert {m.kernel_size for m in found} == {5}
    dense = {n for n in spatial_convs(model) if not re.search(r'conv2?\.0$', n)}
    stem = {f'backbone.stem.{i}' for i in (0, 3, 6)}
    assert dense == stem | {'bbox_head.retina_cls', 'bbox_head.retina_reg'}
    peer = build(read_config(find_config(f'retinanet_sasa-tiny_{data}')))
    sizes = [sum(p.numel() for p in each.parameters()) for each in (model, peer)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_the_head_of_depthwise_separable_convolutions_starts_at_a_scale():
    """RetinaNet's own start would shrink a map by 300 in each layer, near the eps of its norm."""
    model = build(read_config(find_config('retinanet_dwconv-tiny_digits')))
    torch.manual_seed(0)
    model.bbox_head.init_weights()
    x = torch.randn(1, 72, 16, 16)
    with torch.no_grad():
        assert 0.1 < model.bbox_head.cls_convs[0].conv(x).std() < 3
    assert 0.008 < model.bbox_head.retina_reg.weight.std() < 0.012


@pytest.mark.parametrize(
    'name',
    [
        'quickstart/retinanet_sasa-tiny_digits',
        'retinanet/retinanet_sasa-r50_sasa-fpn_sasa-head_1x_coco',
        'paper/retinanet_sasa-r50-attnstem_sasa-fpn_sasa-head_paper-1x_coco',
        'pretrain/sasa-r50-qr_32xb128-130e_in1k',
    ],
)
def test_mmengine_counts_attention(name, size=(64, 96)):
    """Between them these hold all that we compute; tracing every leaf would take minutes."""
    model = build(read_config(ROOT / f'configs/{name}.py')).eval()
    assert count_by_mmengine(model, size) == count_by_hand(model, size)


def count_by_hand(model, size):
    """Count what mmengine counts, a multiply-add as one: ours, and norms and the FPN's upsampling."""
    macs = []

    def norm(cost):
        return lambda module, inputs, output: macs.append(cost * output.numel())

    def fpn(module, inputs, outputs):
        # The top-down path makes a map for each level but the top one.
        macs.extend(out.numel() for out in outputs[: len(module.lateral_convs) - 1])

    # The costs of norms are mmengine's own estimates.
    kinds = {nn.BatchNorm2d: norm(2), nn.GroupNorm: norm(5), SASAFPN: fpn}
    hooks = [
        module.register_forward_hook(kinds[type(module)])
        for module in model.modules()
        if type(module) in kinds
    ]
    costs = count_costs(model, torch.zeros(1, 3, *size))
    for hook in hooks:
        hook.remove()
    return costs.flops // 2 + sum(macs)


def count_by_mmengine(model, size):
    return get_model_complexity_info(model, (3, *size), show_table=False, show_arch=False)['flops']


@needs_coco
def test_mmdets_get_flops_counts_what_we_count(tmp_path):
    options = check_mixes.smoke_options(COCO)
    options.append('val_dataloader.dataset.pipeline.1.scale=(128,128)')
    printed = check_mixes.count(SASA, options, tmp_path)
    size = tuple(int(edge) for edge in re.findall(r'\d+', printed['Input shape']))
    assert max(size) == 128
    model = build(read_config(SASA)).eval()
    assert printed['Flops'] == _format_size(count_by_mmengine(model, size))
    assert printed['Params'] == _format_size(sum(p.numel() for p in model.parameters()))


def attention_parameters(in_channels, out_channels):
    """Query, key and value; the biases of query and value; 7 row and 7 column offsets, each of half
    the depth of one of 8 heads, which share them."""
    return 3 * in_channels * out_channels + 2 * out_channels + 7 * out_channels // 8


@pytest.mark.parametrize('path', MIXES, ids=leaf_name)
def test_parameters_of_the_mixes(path):
    # ResNet-50's without its classifier; the 3x3s of (channels, blocks) have no bias.
    stages = ((64, 3), (128, 4), (256, 6), (512, 3))
    resnet = 25_557_032 - (2048 * 1000 + 1000)
    attention = sum(n * (attention_parameters(c, c) - 9 * c * c) for c, n in stages)
    laterals = sum(c * 256 + 256 for c in (512, 1024, 2048))
    # P3 to P5 and P7; P6 comes from C5.
    inputs = (256, 256, 256, 256, 2048)
    expected = {
        ('backbone', False): resnet,
        ('backbone', True): resnet + attention,
        ('neck', False): laterals + sum(9 * c * 256 + 256 for c in inputs),
        ('neck', True): laterals + sum(attention_parameters(c, 256) for c in inputs),
        # 9 anchors with 80 classes and 4 edges; one more attention a tower in a predictor's place.
        ('bbox_head', False): 8 * (9 * 256 * 256 + 256) + (9 * 256 + 1) * 9 * (80 + 4),
        ('bbox_head', True): 10 * attention_parameters(256, 256) + (256 + 1) * 9 * (80 + 4),
    }
    model = build(read_config(path))
    for part in PARTS:
        count = sum(p.numel() for p in getattr(model, part).parameters())
        assert count == expected[part, part in parts_in_name(path.stem)], part


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    """Ours, and mmdet's through a base as ours has it, which marks types with their scope."""
    path = tmp_path_factory.mktemp('mmdet') / 'mmdets.py'
    path.write_text("_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n")
    return Config.fromfile(CONV), Config.fromfile(path)


class TestWithoutAttentionItIsMmdets:
    def test_config(self, configs):
        ours, theirs = (config.to_dict() for config in configs)
        assert ours.pop('custom_imports') == dict(imports=['sasa_det'])
        types = {part: ours['model'][part].pop('type') for part in PARTS}
        assert types == dict(backbone='SASAResNet', neck='SASAFPN', bbox_head='SASARetinaHead')
        types = {part: theirs['model'][part].pop('type') for part in PARTS}
        assert types == dict(backbone='ResNet', neck='FPN', bbox_head='RetinaHead')
        hooks = ours.pop('resumable_hooks')
        for added in ('collect_dir', 'gpu'):
            assert hooks.pop(added) == ours['default_hooks'].pop(added)
        types = [ours['default_hooks'][hook].pop('type') for hook in hooks]
        assert types == ['WholeCheckpointHook', 'EpochSeedHook']
        types = [theirs['default_hooks'][hook].pop('type') for hook in hooks]
        assert types == ['CheckpointHook', 'DistSamplerSeedHook']
        assert ours == theirs

    def test_weights_and_outputs(self, configs):
        models = [self.build_with_seed(config, 0) for config in configs]
        states = [model.state_dict() for model in models]
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

        ours, theirs = self.build_with_seed(configs[0], 1), models[1]
        other, same = (model.neck.fpn_convs[0].conv.weight for model in (ours, theirs))
        assert not torch.equal(other, same)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert self.run(ours) == self.run(theirs)

    @staticmethod
    def build_with_seed(config, seed):
        config = copy.deepcopy(config)
        config.custom_imports = dict(imports=['sasa_det'])
        config.model.test_cfg.score_thr = 0.0
        torch.manual_seed(seed)
        model = build(config)
        model.init_weights()
        return model

    @staticmethod
    def run(model):
        """The bytes of a detector's losses, raw outputs and boxes for two small images."""
        results = []
        batch = demo_mm_inputs(2, [[3, 64, 96], [3, 60, 90]], num_classes=80)
        model.train()
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        results += [x for losses in model(**data, mode='loss').values() for x in losses]
        model.eval()
        data = model.data_preprocessor(batch, False)
        with torch.no_grad():
            results += [x for level in model(data['inputs'], mode='tensor') for x in level]
            boxes = [sample.pred_instances for sample in model(**data, mode='predict')]
        assert all(len(found) == 100 for found in boxes)
        results += [x for found in boxes for x in (found.bboxes, found.scores, found.labels)]
        assert all(x.isfinite().all() for x in results)
        return [x.detach().numpy().tobytes() for x in results]


class TestPartsAreSwitched:
    @pytest.mark.parametrize(
        'path, options, expected',
        [
            (
                SASA,
                ['model.backbone.attn_stages=(False,False,True,True)'],
                dict(backbone=r'layer[34]\.\d\.conv2', neck=r'.+', bbox_head=r'.+'),
            ),
            (SASA, ['model.neck.attn_cfg=None'], dict(backbone=r'.+', bbox_head=r'.+')),
            (
                SASA,
                ["model.bbox_head.attn_parts=('cls','reg')", 'model.backbone.attn_cfg=None'],
                dict(neck=r'.+', bbox_head=r'(cls|reg)_convs\.[0-3]\.conv'),
            ),
            (
                CONV,
                ['model.neck.attn_cfg.kernel_size=5', 'model.neck.attn_parts=extras'],
                dict(neck=r'fpn_convs\.[34]\.conv'),
            ),
        ],
        ids=['two stages', 'no FPN', 'towers only', 'P6 and P7 of the plain one'],
    )
    def test_by_cfg_options(self, path, options, expected):
        model = build(read_config(path, options))
        assert attending_parts(model) == expected.keys()
        for part, pattern in expected.items():
            layers = attention_layers(getattr(model, part))
            assert all(re.fullmatch(pattern, name) for name in layers)
            if pattern != r'.+':
                others = spatial_convs(getattr(model, part))
                assert others and not any(re.fullmatch(pattern, name) for name in others)

    @pytest.mark.parametrize('relative', [True, False], ids=['relative', 'absolute'])
    def test_by_a_config_of_ones_own(self, tmp_path, relative):
        base = os.path.relpath(SASA, tmp_path) if relative else str(SASA)
        mine = tmp_path / 'mine.py'
        mine.write_text(
            f'_base_ = {base!r}\n'
            'model = dict(\n'
            '    backbone=dict(depth=26, attn_cfg=dict(kernel_size=3, position_per_head=True)),\n'
            "    neck=dict(_delete_=True, type='PAFPN', in_channels=[256, 512, 1024, 2048],\n"
            '              out_channels=256, start_level=1, num_outs=5),\n'
            ')\n'
        )
        model = build(read_config(mine))
        assert type(model.neck).__name__ == 'PAFPN'
        assert attending_parts(model) == {'backbone', 'bbox_head'}
        layers = attention_layers(model.backbone)
        assert len(layers) == 8
        assert {(m.kernel_size, m.num_heads, len(m.rel_row)) for m in layers.values()} == {
            (3, 8, 8)
        }

    def test_by_another_base(self, tmp_path):
        """A leaf of one's own, put together of the parts as the eight are."""
        bases = [str(ROOT / 'configs/_base_' / name) for name in (CONV.name, 'attention.py')]
        mine = tmp_path / 'mine.py'
        mine.write_text(f'_base_ = {bases!r}\nmodel = dict(bbox_head={{{{_base_.attn_head}}}})\n')
        assert attending_parts(build(read_config(mine))) == {'bbox_head'}


@pytest.fixture(scope='module')
def resnet50(tmp_path_factory):
    """The weights of a plain ResNet-50 in a file, in the place of the download."""
    init_default_scope('mmdet')
    path = tmp_path_factory.mktemp('weights') / 'resnet50.pth'
    yield check_mixes.write_backbone_checkpoint(path)
    path.unlink()


STAGES = ('layer1', 'layer2', 'layer3', 'layer4')


@pytest.mark.parametrize(
    'options, anew, left_over',
    [
        ([], [f'{stage}.*.conv2' for stage in STAGES], [f'{stage}.*.conv2' for stage in STAGES]),
        (
            [
                'model.backbone.stem=attention',
                'model.backbone.attn_stages=(False,False,False,True)',
            ],
            ['stem', 'layer4.*.conv2'],
            ['conv1', 'bn1', 'layer4.*.conv2'],
        ),
    ],
    ids=['all stages', 'stem and a stage'],
)
def test_weights_of_a_plain_resnet_load_into_what_is_common(
    options, anew, left_over, resnet50, tmp_path
):
    logger = MMLogger.get_instance(str(tmp_path), log_file=str(tmp_path / 'log.txt'))
    assert MMLogger.get_current_instance() is logger
    config = read_config(SASA, [f'model.backbone.init_cfg.checkpoint={resnet50}', *options])
    assert config.model.backbone.init_cfg.type == 'Pretrained'
    backbone = MODELS.build(config.model.backbone)
    torch.manual_seed(0)
    backbone.init_weights()

    plain = torch.load(resnet50, weights_only=True)
    state = backbone.state_dict()
    common = plain.keys() & state.keys()
    attending = attention_layers(backbone)
    expected = {f'{name}.weight' for name in attending}
    if 'stem' in anew:
        expected |= {key for key in plain if key.startswith(('conv1.', 'bn1.'))}
    assert plain.keys() - state.keys() == expected
    assert all(torch.equal(plain[key], state[key]) for key in common)

    log = (tmp_path / 'log.txt').read_text()
    assert f'SASAResNet starts from {resnet50}' in log
    said = {
        title: re.search(rf'^{title}: (.+)$', log, re.MULTILINE)[1].split(', ')
        for title in ('taken as they are', 'initialised anew', 'left over')
    }
    assert said['initialised anew'] == anew and said['left over'] == left_over
    layers = {re.sub(r'(layer\d)\.\d+', r'\1.*', key.rpartition('.')[0]) for key in common}
    assert set(said['taken as they are']) == layers and 'layer2.*.downsample.0' in layers


def test_a_backbone_that_fits_says_nothing_of_its_start(resnet50, tmp_path):
    MMLogger.get_instance(str(tmp_path), log_file=str(tmp_path / 'log.txt'))
    config = read_config(CONV, [f'model.backbone.init_cfg.checkpoint={resnet50}'])
    MODELS.build(config.model.backbone).init_weights()
    assert 'starts from' not in (tmp_path / 'log.txt').read_text()


@needs_coco
@pytest.mark.parametrize('path', MIXES, ids=leaf_name)
def test_each_mix_trains_a_step_and_the_extreme_ones_are_evaluated(path, resnet50, tmp_path):
    """All eight are evaluated and counted by ``tools/checks/mixes.py``, which takes longer."""
    options = check_mixes.smoke_options(COCO, resnet50)
    step = check_mixes.train_step(path, options, tmp_path)
    assert step.losses.keys() == {'loss', 'loss_cls', 'loss_bbox'}
    assert check_mixes.faults(step) == []

    # mmdet freezes stem and first stage of the plain backbone; all else gets a gradient.
    parameters = {name for name, _ in build(read_config(path)).named_parameters()}
    frozen = parameters - set(step.learning)
    expected = set()
    if 'backbone' not in parts_in_name(path.stem):
        expected = {n for n in parameters if re.match(r'backbone\.(conv1|bn1|layer1)\.', n)}
    assert frozen == expected

    if path in (CONV, SASA):
        numbers = check_mixes.evaluate(path, step.checkpoint, options, tmp_path)
        assert len(numbers) == 6 and all(0 <= number <= 1 for number in numbers.values())
    # 150 MB each, which pytest would keep for three runs.
    step.checkpoint.unlink()


def test_configs_of_mmdet_are_found_by_name():
    name = 'retinanet/retinanet_r50_fpn_1x_coco.py'
    found = find_config(f'mmdet::{name}')
    assert found == Path(mmdet.__file__).parent / '.mim' / 'configs' / name
    assert _as_base(found, found.parent) == f'mmdet::{name}'
    for wrong in ('mmdet::retinanet/nothing.py', 'no_such_package::a.py', 'os::a.py', 'a b::c.py'):
        with pytest.raises(FileNotFoundError, match=f'{wrong}: no such config'):
            find_config(wrong)
