"""The layer: its formula, its options, its place in a ConvModule."""

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.layers.local_self_attention import NEIGHBOURS
from sasa_det.layers.position import sinusoidal_positions
from sasa_det.layers.projection import project_by
from sasa_det.ops import local_attention
from sasa_det.ops.flop_counters import count_layer_macs


def small(**kwargs):
    torch.manual_seed(0)
    options = dict(kernel_size=3, num_heads=4, out_channels=24)
    return LocalSelfAttention2d(16, **{**options, **kwargs}).double()


X = torch.randn(2, 16, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def conv(x, projection):
    return F.conv2d(x, projection.weight[:, :, None, None], projection.bias)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_is_projections_then_attention(layout):
    layer = small(border='mask', scale=0.5, dilation=2, bias=True)
    nn.init.normal_(layer.value.bias)
    expected = local_attention(
        conv(X, layer.query), conv(X, layer.key), conv(X, layer.value), layer.rel_row, layer.rel_col,
        kernel_size=3, num_heads=4, border='mask', scale=0.5, dilation=2, backend='reference',
    )  # fmt: skip
    output = layer(X.contiguous(memory_format=layout))
    assert torch.allclose(output, expected, atol=1e-12)
    assert output.is_contiguous(memory_format=layout)


def test_projections_are_full_and_the_parameters_those_of_table_1():
    """Full d x d projections and shared offsets: what the counts of Table 1 take."""
    layer = LocalSelfAttention2d(64, kernel_size=7, num_heads=8)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 64 * 64 + 2 * 4 * 7
    layer = LocalSelfAttention2d(64, kernel_size=7, num_heads=8, position_per_head=True)
    assert layer.rel_row.shape == (8, 4, 7)


@pytest.mark.parametrize(
    'position, logits, names',
    [
        ('relative', None, {'query', 'key', 'value', 'rel_row', 'rel_col'}),
        ('relative', 'qr', {'query', 'value', 'rel_row', 'rel_col'}),
        ('absolute', None, {'query', 'key', 'value'}),
        ('none', 'qk', {'query', 'key', 'value'}),
    ],
)
def test_has_the_parameters_of_its_logits(position, logits, names):
    layer = small(position=position, logits=logits)
    assert {name.split('.')[0] for name, _ in layer.named_parameters()} == names
    layer(X).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize('init', ['neighbours', 'random'])
def test_with_a_constant_query_of_positions_alone_all_pixels_share_their_weights(init):
    layer = small(logits='qr', bias=True, init=init, constant_query=True)
    names = {name for name, _ in layer.named_parameters()}
    assert names == {'query.bias', 'value.weight', 'value.bias', 'rel_row', 'rel_col'}
    # As of a projection, the logits differ from the start.
    weights = layer.attention_weights(X[:1], torch.tensor([[0, 0], [4, 3], [8, 6]]))
    assert weights.std((2, 3)).min() > 0.02
    assert torch.equal(weights, weights[:1].expand_as(weights))
    # So the layer is a projection, then the same weighted sum for all channels of a head.
    output = layer(X)
    kernel = weights[0].repeat_interleave(6, 0)[:, None]
    expected = F.conv2d(conv(X, layer.value), kernel, padding=1, groups=24)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    # Neither q nor k is projected.
    plain = small(logits='qr', bias=True)
    assert count_layer_macs(plain, X.shape) - count_layer_macs(layer, X.shape) == 2 * 63 * 16 * 24


def test_a_hook_of_a_constant_query_is_heard():
    layer = small(logits='qr', bias=True, constant_query=True)
    layer.query.register_forward_hook(lambda module, args, output: 0 * output)
    mean = F.avg_pool2d(conv(X, layer.value), 3, 1, 1)
    torch.testing.assert_close(layer(X), mean)


@pytest.mark.parametrize('options', [dict(), dict(logits='qr'), dict(position='absolute')], ids=str)
def test_hidden_channels(options):
    layer = small(hidden_channels=40, out_proj=True, **options)
    parts = [each for each in (layer.query, layer.key, layer.value) if each is not None]
    assert {each.weight.shape for each in parts} == {(40, 16)}
    assert layer.out_proj.weight.shape == (24, 40)
    x = X + sinusoidal_positions(X) if layer.position == 'absolute' else X
    maps = [
        None if each is None else conv(x, each) for each in (layer.query, layer.key, layer.value)
    ]
    attended = local_attention(
        *maps, layer.rel_row, layer.rel_col, kernel_size=3, num_heads=4, backend='reference'
    )
    torch.testing.assert_close(layer(X), conv(attended, layer.out_proj))
    with FlopCounterMode(display=False) as counter:
        layer(X)
    assert counter.get_total_flops() == 2 * count_layer_macs(layer, X.shape)
    weights = layer.attention_weights(X[:1], torch.tensor([[4, 3]]))
    assert weights.shape == (1, 4, 3, 3)


def test_a_constant_query_is_counted_with_and_without_gradients():
    layer = small(logits='qr', constant_query=True)
    counts = []
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, layer.in_channels, 6, 5, dtype=torch.float64))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_constant_query_may_look_at_keys():
    layer = small(position='none', constant_query=True)
    weights = layer.attention_weights(X[:1], torch.tensor([[4, 3], [5, 3]]))
    keys = conv(X[:1], layer.key)[0].view(4, 6, 9, 7)
    logits = torch.einsum('hd,hdij->hij', layer.query.bias.view(4, 6), keys[..., 3:6, 2:5])
    torch.testing.assert_close(weights[0], logits.flatten(1).softmax(1).view(4, 3, 3))


def test_without_positions_does_not_know_order_and_with_them_does():
    """Swapping two keys within all windows that hold both changes nothing without positions."""
    x = torch.randn(1, 16, 1, 3, dtype=torch.float64)
    swapped = x[..., [2, 1, 0]]
    for position, same in (('none', True), ('relative', False), ('absolute', False)):
        layer = small(position=position)
        middle, other = layer(x)[..., 1], layer(swapped)[..., 1]
        assert torch.allclose(middle, other) == same


def test_absolute_positions_are_added_to_the_input():
    layer = small(position='absolute')
    plain = small(position='none')
    plain.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(X), plain(X + sinusoidal_positions(X)))


def test_sinusoids():
    positions = sinusoidal_positions(torch.zeros(1, 8, 4, 5, dtype=torch.float64))
    for y in range(4):
        for x in range(5):
            expected = [
                f(place / 10000 ** (wave / 2)) for place in (y, x)
                for f in (torch.sin, torch.cos) for wave in (0, 1)
                for place in [torch.tensor(float(place))]
            ]  # fmt: skip
            assert torch.allclose(positions[:, y, x].float(), torch.stack(expected), atol=1e-6)


@pytest.mark.parametrize('size', [(8, 8), (9, 7), (1, 1), (2, 5)])
@pytest.mark.parametrize('stride', [1, 2, 3])
def test_output_size_is_conv2ds(size, stride):
    x = torch.randn(1, 16, *size, dtype=torch.float64)
    expected = nn.Conv2d(16, 24, 3, stride=stride, padding=1).double()(x).shape
    assert small(stride=stride)(x).shape == expected


def test_stride_is_attention_then_average():
    layer, strided = small(), small(stride=2)
    full, pooled = layer(X), strided(X)
    assert torch.allclose(pooled[..., 1, 1], full[..., 2:4, 2:4].mean((-2, -1)))
    # An odd map's last column and row average what there is.
    assert torch.allclose(pooled[..., 4, 3], full[..., 8, 6])
    assert torch.allclose(pooled[..., 0, 3], full[..., 0:2, 6].mean(-1))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('out_proj', [False, True])
@pytest.mark.parametrize('size', [(9, 7), (8, 10), (1, 1)])
def test_stride_by_queries_keeps_each_strides_pixel(size, out_proj, layout):
    pooled = small(stride=2, out_proj=out_proj)
    layer = small(stride=2, out_proj=out_proj, downsample='query')
    layer.load_state_dict(pooled.state_dict())
    every = small(out_proj=out_proj)
    every.load_state_dict(pooled.state_dict())
    x = torch.randn(2, 16, *size, dtype=torch.float64).contiguous(memory_format=layout)
    output = layer(x)
    assert output.is_contiguous(memory_format=layout) and output.shape == pooled(x).shape
    assert torch.allclose(output, every(x)[:, :, ::2, ::2], atol=1e-12)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * count_layer_macs(layer, x.shape)


@pytest.mark.parametrize('hooked', [False, True])
@pytest.mark.parametrize(
    'options',
    [
        dict(stride=3, dilation=2, border='mask'),
        dict(stride=2, logits='qr', bias=True, position_per_head=True),
        dict(stride=2, position='absolute', scale=0.5, keep_projections=True),
        dict(stride=2, kernel_size=1, position='none'),
        dict(stride=2, constant_query=True, border='mask'),
        dict(stride=9, backend='native'),
        dict(stride=2, backend='eager'),
    ],
    ids=str,
)
def test_stride_by_queries_with_every_option(options, hooked):
    layer = small(downsample='query', **options)
    every = small(**{**options, 'stride': 1})
    every.load_state_dict(layer.state_dict())
    for each in (layer, every):
        if hooked:
            each.value.register_forward_hook(lambda module, args, output: output)
    stride, results = options['stride'], []
    for each, step in ((layer, 1), (every, stride)):
        leaf = X.clone().requires_grad_()
        output = each(leaf)[:, :, ::step, ::step]
        leaves = [leaf, *each.parameters()]
        results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('dynamic', [None, True])
def test_stride_by_queries_compiles_as_one_graph(dynamic):
    layer = small(stride=2, downsample='query')
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager', dynamic=dynamic)
    for size in ((9, 7), (8, 10)):
        x = torch.randn(2, 16, *size, dtype=torch.float64)
        result, expected = compiled(x), layer(x)
        torch.testing.assert_close(result, expected)
        leaves = list(layer.parameters())
        for grad, truth in zip(
            *(torch.autograd.grad(y.square().sum(), leaves) for y in (result, expected))
        ):
            torch.testing.assert_close(grad, truth)


def test_stride_by_queries_exports_for_any_size():
    layer = small(stride=2, downsample='query').eval()
    dims = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    with torch.no_grad():
        program = torch.export.export(layer, (X,), dynamic_shapes=(dims,), strict=False)
        for size in ((9, 7), (8, 10), (3, 4)):
            x = torch.randn(1, 16, *size, dtype=torch.float64)
            torch.testing.assert_close(program.module()(x), layer(x))


def test_stride_by_queries_under_autocast_computes_low():
    layer = small(stride=2, downsample='query').float()
    x = X.float().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16 and output.shape == (*layer(x).shape,)
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.05)
    grads = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (output, layer(x))]
    assert (grads[0] - grads[1]).norm() <= 0.03 * grads[1].norm()


def test_out_proj_mixes_heads():
    layer = small(out_proj=True)
    bare = small()
    bare.load_state_dict({k: v for k, v in layer.state_dict().items() if 'out_proj' not in k})
    assert torch.allclose(layer(X), conv(bare(X), layer.out_proj))


@pytest.mark.parametrize('depth', [4, 32, 64])
def test_initial_logits_have_unit_variance(depth):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(256, 8 * depth, num_heads=8, position_per_head=True)
    x = torch.randn(1, 256, 24, 24)
    with torch.no_grad():
        q, k, v = (project_by(each, x) for each in (layer.query, layer.key, layer.value))
        content = (q * k).view(8, depth, -1).sum(1)
        position = torch.einsum(
            'hdp,hdt->hpt', q.view(8, depth, -1)[:, : depth // 2], layer.rel_row
        )
    assert 0.7 < content.std() < 1.4
    assert 0.7 < position.std() * 2**0.5 < 1.4
    assert 0.9 < v.std() < 1.1


@pytest.mark.parametrize('position_per_head', [False, True])
@pytest.mark.parametrize('num_heads', [1, 2, 4, 8])
def test_with_a_bias_each_head_starts_out_at_a_neighbour_of_its_own(num_heads, position_per_head):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(
        64, kernel_size=7, num_heads=num_heads, bias=True, position_per_head=position_per_head
    )
    weights = layer.attention_weights(torch.randn(1, 64, 12, 12), torch.tensor([[5, 5], [6, 7]]))
    places = {
        head: (int(peak) // 7 - 3, int(peak) % 7 - 3)
        for head, peak in enumerate(weights.mean(0).flatten(1).argmax(1))
    }
    assert weights.flatten(2).amax(2).min() > 0.5
    assert len(set(places.values())) == num_heads
    expected = NEIGHBOURS[:num_heads] if num_heads > 1 else [(0, 0)]
    assert list(places.values()) == list(expected)


def test_heads_of_two_channels_start_out_at_the_pixel_itself():
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(8, kernel_size=5, num_heads=4, bias=True)
    weights = layer.attention_weights(torch.randn(1, 8, 9, 9), torch.tensor([[4, 4], [0, 8]]))
    assert weights[:, :, 2, 2].min() > 0.5


@pytest.mark.parametrize('init', ['neighbours', 'centre'])
@pytest.mark.parametrize('lead', [None, 2.0, 0.0])
def test_a_head_starts_ahead_by_the_lead_where_it_points(init, lead):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(
        64, kernel_size=5, num_heads=4, bias=True, init=init, init_lead=lead
    )
    # Without content the queries are their bias.
    logits = layer.attention_terms(torch.zeros(1, 64, 9, 9), torch.tensor([[4, 4]])).position[0]
    for head, (row, col) in enumerate(NEIGHBOURS[:4] if init == 'neighbours' else [(0, 0)] * 4):
        own = logits[head, 2 + row, 2 + col].item()
        others = logits[head].clone()
        others[2 + row, 2 + col] = -torch.inf
        assert own - others.max().item() == pytest.approx(8.0 if lead is None else lead, abs=1e-4)


@pytest.mark.parametrize('options', [dict(), dict(bias=True, init='random')])
def test_a_random_start_is_without_preference(options):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(64, kernel_size=7, num_heads=4, **options)
    x = torch.randn(1, 64, 12, 12)
    assert layer.attention_weights(x, torch.tensor([[5, 5]]))[:, :, 3, 3].mean() < 0.1


def test_a_bias_is_only_a_bias():
    """It changes nothing that is drawn."""
    layers = []
    for bias in (False, True):
        torch.manual_seed(0)
        layers.append(LocalSelfAttention2d(16, num_heads=4, bias=bias, init='random'))
    without, with_bias = (layer.state_dict() for layer in layers)
    biases = {name for name in with_bias if name.endswith('bias')}
    assert biases == {'query.bias', 'value.bias'}
    assert not any(with_bias[name].any() for name in biases)
    assert all(torch.equal(with_bias[name], value) for name, value in without.items())


def test_the_default_start_is_that_of_0_1():
    """There a bias with relative positions pointed heads at neighbours."""
    for options, init in (
        (dict(bias=True), 'neighbours'),
        (dict(bias=False), 'random'),
        (dict(bias=True, position='none'), 'random'),
    ):
        assert LocalSelfAttention2d(16, num_heads=4, **options).init == init
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(16, kernel_size=3, num_heads=4, bias=True)
    # Of 0.1, on any machine.
    assert layer.query.weight.double().sum().item() == pytest.approx(0.34949156, abs=1e-5)
    assert layer.rel_row.double().square().sum().item() == pytest.approx(192.0, abs=1e-3)


@pytest.mark.parametrize('options', [dict(), dict(bias=True, position='absolute')])
def test_pointing_at_neighbours_needs_a_bias_and_relative_positions(options):
    with pytest.raises(ValueError, match="init='neighbours' points heads by the bias"):
        LocalSelfAttention2d(16, num_heads=4, init='neighbours', **options)
    with pytest.raises(ValueError, match="init='centre' points heads by the bias"):
        LocalSelfAttention2d(16, num_heads=4, init='centre', **options)
    with pytest.raises(ValueError, match="init_lead is for init='neighbours' or 'centre'"):
        LocalSelfAttention2d(16, num_heads=4, init_lead=4.0, **options)
    with pytest.raises(ValueError, match='init_lead must be a finite number of at least 0'):
        LocalSelfAttention2d(16, num_heads=4, bias=True, init_lead=-1)
    with pytest.raises(ValueError, match=r"init must be one of .* but is 'zeros'"):
        LocalSelfAttention2d(16, num_heads=4, init='zeros')


def test_conv_initialisers_do_not_reach_it():
    """RetinaHead draws every Conv2d from N(0, 0.01); attention would start as a plain average."""
    from mmengine.model import initialize

    module = nn.Sequential(LocalSelfAttention2d(16, num_heads=4))
    before = {name: p.clone() for name, p in module.named_parameters()}
    initialize(module, dict(type='Constant', layer=['Conv2d'], val=0))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_value_std():
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(256, num_heads=8, value_std=0.01)
    assert 0.0095 < layer.value.weight.std() < 0.0105


@pytest.mark.parametrize('border', ['zeros', 'mask'])
@pytest.mark.parametrize('position', ['relative', 'absolute', 'none'])
def test_attention_weights_are_those_that_forward_uses(position, border):
    layer = small(position=position, border=border, dilation=2)
    x = X[:1]
    points = torch.tensor([[0, 0], [4, 3], [8, 6]])
    weights = layer.attention_weights(x, points)
    assert torch.allclose(weights.sum((-2, -1)), torch.ones(3, 4, dtype=x.dtype))
    source = x + sinusoidal_positions(x) if position == 'absolute' else x
    padded = F.pad(conv(source, layer.value), (2,) * 4).view(4, 6, 13, 11)
    for (y, col), weight in zip(points.tolist(), weights):
        window = padded[:, :, y : y + 5 : 2, col : col + 5 : 2]
        expected = torch.einsum('hij,hdij->hd', weight, window).flatten()
        assert torch.allclose(layer(x)[0, :, y, col], expected)


@pytest.mark.parametrize('point', [(-1, 0), (0, -1), (6, 0), (0, 9)])
def test_attention_weights_of_a_pixel_that_there_is_not(point):
    layer = LocalSelfAttention2d(8, kernel_size=3, num_heads=2)
    with pytest.raises(
        ValueError, match=r'points must be rows and columns in a map of 6 x 9, but are'
    ):
        layer.attention_weights(torch.randn(1, 8, 6, 9), torch.tensor([[5, 8], point]))


@pytest.mark.parametrize('logits', ['qk+qr', 'qk', 'qr'])
def test_attention_terms_are_the_two_products_of_the_formula(logits):
    position = 'none' if logits == 'qk' else 'relative'
    layer = small(position=position, logits=logits, scale=0.5, position_per_head=True)
    x = X[:1]
    terms = layer.attention_terms(x, torch.tensor([[4, 3]]))
    query = conv(x, layer.query)[0, :, 4, 3].view(4, 6)
    expected = {'content': None, 'position': None}
    if 'qk' in logits:
        keys = conv(x, layer.key)[0, :, 3:6, 2:5].view(4, 6, 3, 3)
        expected['content'] = 0.5 * torch.einsum('hd,hdij->hij', query, keys)[None]
    if 'qr' in logits:
        row = torch.einsum('hd,hdi->hi', query[:, :3], layer.rel_row)
        col = torch.einsum('hd,hdj->hj', query[:, 3:], layer.rel_col)
        expected['position'] = 0.5 * (row[:, :, None] + col[:, None])[None]
    both = sum(term for term in expected.values() if term is not None)
    torch.testing.assert_close(terms.weights, both.flatten(2).softmax(-1).view(1, 4, 3, 3))
    for name, term in expected.items():
        torch.testing.assert_close(getattr(terms, name), term)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(kernel_size=4), 'kernel_size must be an odd integer of at least 1, but is 4'),
        (
            dict(kernel_size=(3, 5)),
            r'kernel_size must be one integer or two equal ones, but is \(3, 5\)',
        ),
        (dict(num_heads=5), 'num_heads must divide out_channels, 24, but is 5'),
        (dict(num_heads=24), "position='relative' needs an even number of channels per head"),
        (
            dict(hidden_channels=32),
            'hidden_channels must be out_channels, 24, without out_proj, but is 32',
        ),
        (
            dict(hidden_channels=30, out_proj=True),
            'num_heads must divide hidden_channels, 30, but is 4',
        ),
        (dict(stride=0), 'stride must be an integer of at least 1, but is 0'),
        (dict(downsample='max'), r"downsample must be one of \('pool', 'query'\), but is 'max'"),
        (dict(border='wrap'), r"border must be one of \('zeros', 'mask'\), but is 'wrap'"),
        (dict(position='learned'), r"position must be one of .*, but is 'learned'"),
        (dict(logits='kq'), r"logits must be one of .* or None, but is 'kq'"),
        (dict(logits='qr', position='none'), "logits='qr' does not go with position='none'"),
        (dict(logits='qk'), "logits='qk' does not go with position='relative'"),
        (dict(backend='fast'), r"backend must be one of .*, but is 'fast'"),
        (dict(value_std=-1), 'value_std must be a finite number above 0 or None, but is -1'),
        (dict(out_channels=0), 'out_channels must be an integer of at least 1, but is 0'),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_refuses_absolute_positions_on_channels_that_do_not_split():
    with pytest.raises(ValueError, match='in_channels divisible by 4, but in_channels is 6'):
        LocalSelfAttention2d(6, 8, num_heads=2, position='absolute')


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('x', [X[:, :5], X[0]], ids=['channels', 'no batch'])
def test_refuses_maps(x, grad):
    message = r'in_channels=16 takes \(B, 16, H, W\), but was given \(' + str(len(x))
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        small()(x)


@pytest.mark.parametrize('dtype', [torch.float16, torch.uint8, torch.int64, torch.float64])
@pytest.mark.parametrize('grad', [True, False])
def test_refuses_maps_of_another_type_than_the_weights(dtype, grad):
    layer = small().float()
    message = f'weights in torch.float32 takes that type, but was given {dtype}'
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=message):
        layer(X.to(dtype))
    with torch.autocast('cpu', torch.bfloat16):
        if dtype == torch.float16:
            layer(X.to(dtype))
        else:
            with pytest.raises(TypeError, match=message):
                layer(X.to(dtype))


@pytest.mark.parametrize(
    'options',
    [
        dict(stride=2, out_proj=True, bias=True),
        dict(position='absolute'),
        dict(logits='qr', dilation=2),
        dict(logits='qr', constant_query=True),
    ],
    ids=str,
)
def test_symbolic_traces_run(options):
    layer = small(**options)
    traced = torch.fx.symbolic_trace(layer)
    assert torch.equal(traced(X), layer(X))
    traced(X).sum().backward()
    assert layer.value.weight.grad.abs().sum() > 0


def test_survives_deepcopy_and_pickle():
    import copy
    import pickle

    layer = small()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(X), layer(X))


class TestConvCfg:
    """type='SASA', as mmdet's parts ask for it."""

    CFG = dict(type='SASA', kernel_size=7, num_heads=4)

    def test_kernel_size_of_conv_cfg_wins(self):
        module = ConvModule(16, 32, 3, stride=2, padding=1, conv_cfg=self.CFG)
        assert isinstance(module.conv, LocalSelfAttention2d)
        assert (module.conv.kernel_size, module.conv.stride) == (7, 2)
        assert module(torch.randn(1, 16, 9, 9)).shape == (1, 32, 5, 5)

    def test_host_kernel_size_is_the_default(self):
        conv_cfg = dict(type='SASA', num_heads=4)
        assert ConvModule(16, 32, 5, padding=2, conv_cfg=conv_cfg).conv.kernel_size == 5

    def test_bias_is_the_hosts(self):
        assert ConvModule(16, 32, 3, padding=1, conv_cfg=self.CFG).conv.value.bias is not None
        normed = ConvModule(16, 32, 3, padding=1, conv_cfg=self.CFG, norm_cfg=dict(type='BN'))
        assert normed.conv.value.bias is None

    def test_pointwise_convolutions_stay(self):
        module = ConvModule(16, 32, 1, stride=2, conv_cfg=self.CFG)
        assert type(module.conv) is nn.Conv2d
        assert module(torch.randn(1, 16, 8, 8)).shape == (1, 32, 4, 4)

    def test_serves_mmdets_resnet_and_fpn(self):
        from mmdet.models import FPN, ResNet

        backbone = ResNet(50, base_channels=8, conv_cfg=dict(type='SASA', num_heads=2))
        assert isinstance(backbone.layer1[0].conv2, LocalSelfAttention2d)
        assert type(backbone.layer1[0].conv1) is nn.Conv2d
        neck = FPN(
            [32, 64, 128, 256], 16, num_outs=5, conv_cfg=self.CFG, add_extra_convs='on_output'
        )
        outs = neck(backbone(torch.randn(1, 3, 64, 64)))
        assert [tuple(out.shape[2:]) for out in outs] == [(n, n) for n in (16, 8, 4, 2, 1)]
        assert type(neck.lateral_convs[0].conv) is nn.Conv2d

    def test_attn_cfg_wins_over_what_the_host_passes_by_name(self):
        from mmdet.models import ResNet

        attn_cfg = dict(kernel_size=5, num_heads=2, bias=True)
        conv_cfg = dict(type='SASA', attn_cfg=attn_cfg)
        normed = ConvModule(16, 32, 3, padding=1, conv_cfg=conv_cfg, norm_cfg=dict(type='BN')).conv
        assert (normed.kernel_size, normed.num_heads) == (5, 2)
        assert normed.value.bias is not None
        conv2 = ResNet(50, base_channels=8, conv_cfg=conv_cfg).layer1[0].conv2
        assert conv2.kernel_size == 5 and conv2.value.bias is not None

    def test_refuses_what_attn_cfg_does_not_take(self):
        conv_cfg = dict(type='SASA', attn_cfg=dict(stride=2))
        with pytest.raises(ValueError, match="attn_cfg has the unknown key 'stride'; it takes ker"):
            ConvModule(16, 32, 3, padding=1, conv_cfg=conv_cfg)

    def test_refuses_groups(self):
        with pytest.raises(ValueError, match='groups must be 1 where conv_cfg is SASA, but is 4'):
            ConvModule(16, 32, 3, padding=1, groups=4, conv_cfg=self.CFG)

    def test_keeps_grouped_convolutions_where_told_to(self):
        conv_cfg = dict(self.CFG, keep_grouped=True)
        module = DepthwiseSeparableConvModule(16, 32, 5, padding=2, conv_cfg=conv_cfg)
        assert type(module.depthwise_conv.conv) is nn.Conv2d
        assert (module.depthwise_conv.conv.groups, module.depthwise_conv.kernel_size) == (
            16,
            (5, 5),
        )
        assert module(torch.randn(1, 16, 8, 9)).shape == (1, 32, 8, 9)
        module = ConvModule(16, 32, 3, padding=1, conv_cfg=conv_cfg)
        assert isinstance(module.conv, LocalSelfAttention2d)

    @pytest.mark.parametrize(
        'host',
        [dict(padding=0), dict(padding=1, padding_mode='reflect'), dict(padding=1, dilation=2)],
    )
    def test_refuses_padding_that_changes_the_size(self, host):
        """Attention would hand on a larger map than the host expects."""
        with pytest.raises(ValueError, match='padding must keep the size of the map .* but is'):
            ConvModule(16, 32, 3, conv_cfg=self.CFG, **host)

    def test_dilation_is_the_hosts(self):
        module = ConvModule(16, 32, 3, padding=2, dilation=2, conv_cfg=self.CFG)
        assert (module.conv.dilation, module.conv.kernel_size) == (2, 7)
        assert module(torch.randn(1, 16, 8, 9)).shape == (1, 32, 8, 9)
