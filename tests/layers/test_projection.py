"""What the ecosystem's tools do to a projection takes effect, and costs nobody else anything."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sasa_det.layers import AttentionStem, LocalSelfAttention2d
from sasa_det.layers.projection import is_plain

X = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0))


def new_layer(**options):
    torch.manual_seed(0)
    return LocalSelfAttention2d(8, kernel_size=3, num_heads=2, bias=True, out_proj=True, **options)


def train_two_steps(module):
    """Train, as what fails at the second step does not show at the first."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = module(X).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def old_weight_norm(projection):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)
        nn.utils.weight_norm(projection)


def pruned(projection):
    prune.l1_unstructured(projection, 'weight', amount=0.5)


TOOLS = dict(
    spectral_norm=parametrizations.spectral_norm,
    old_spectral_norm=nn.utils.spectral_norm,
    weight_norm=parametrizations.weight_norm,
    old_weight_norm=old_weight_norm,
    prune=pruned,
)


@pytest.mark.parametrize('name', ['query', 'key', 'value', 'out_proj'])
@pytest.mark.parametrize('tool', TOOLS)
def test_a_tool_takes_effect_and_trains(tool, name):
    layer = new_layer()
    before = layer(X)
    projection = getattr(layer, name)
    TOOLS[tool](projection)
    assert not is_plain(projection)
    first, second = train_two_steps(layer)
    assert first != second
    for parameter in projection.parameters():
        assert parameter.grad.abs().sum() > 0
    # By hand, with the weight that the tool made of it.
    layer.eval()
    by_hand = new_layer().eval()
    with torch.no_grad():
        result = layer(X)
        for other in ('query', 'key', 'value', 'out_proj'):
            theirs, ours = getattr(layer, other), getattr(by_hand, other)
            ours.weight.copy_(theirs.weight)
            if ours.bias is not None:
                ours.bias.copy_(theirs.bias)
        by_hand.rel_row.copy_(layer.rel_row), by_hand.rel_col.copy_(layer.rel_col)
        assert all(is_plain(getattr(by_hand, other)) for other in ('query', 'key', 'value'))
        assert torch.allclose(result, by_hand(X), atol=1e-5)
    if tool in ('spectral_norm', 'old_spectral_norm', 'prune'):
        assert not torch.allclose(before, result)


@pytest.mark.parametrize('name', ['query', 'key', 'value', 'out_proj'])
def test_hooks_fire(name):
    layer = new_layer()
    plain = layer(X)
    seen = []
    projection = getattr(layer, name)
    handles = [
        projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape)),
        projection.register_forward_hook(lambda module, args, output: 2 * output),
        projection.register_full_backward_hook(lambda module, *grads: seen.append('backward')),
    ]
    changed = layer(X)
    changed.sum().backward()
    # An nn.Linear's own layout: channels last.
    assert seen == [(2, 5, 6, 8), 'backward']
    assert not torch.allclose(changed, plain)
    for handle in handles:
        handle.remove()
    assert torch.equal(layer(X), plain)


def test_a_replaced_projection_is_called():
    """As adapters such as LoRA replace a Linear by one that adds to it."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down = nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    layer = new_layer()
    plain = layer(X).detach()
    for name in ('query', 'value'):
        setattr(layer, name, Adapted(getattr(layer, name)))
    assert torch.allclose(layer(X), plain, atol=1e-6)
    train_two_steps(layer)
    assert layer.value.up.weight.abs().sum() > 0 and layer.query.up.weight.grad is not None
    assert not torch.allclose(layer(X), plain)


def test_lora_adapts_a_layer():
    """.ci/run installs peft, for this test alone, and says why."""
    peft = pytest.importorskip('peft')
    plain = new_layer()(X).detach()
    config = peft.LoraConfig(r=2, target_modules=['query', 'value'])
    model = peft.get_peft_model(nn.Sequential(new_layer()), config)
    layer = model.base_model.model[0]
    # It starts from zeros.
    assert torch.allclose(layer(X), plain, atol=1e-6)
    added = {name for name, each in layer.named_parameters() if each.requires_grad}
    assert added == {
        f'{projection}.lora_{part}.default.weight'
        for projection in ('query', 'value')
        for part in 'AB'
    }
    train_two_steps(model)
    assert all(layer.get_parameter(name).grad.abs().sum() > 0 for name in added)
    result = layer(X).detach()
    assert not torch.allclose(result, plain, atol=1e-4)
    # With the adapters' weights added to the projections' it is a plain layer again.
    merged = model.merge_and_unload()[0]
    assert is_plain(merged.query) and is_plain(merged.value)
    assert torch.allclose(merged(X), result, atol=1e-6)


def test_dynamic_quantisation_finds_the_projections():
    layer = new_layer().eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), {nn.Linear})
    assert 'quantized' in type(quantised.query).__module__
    with torch.no_grad():
        result, truth = quantised(X), layer(X)
    assert not torch.equal(result, truth)
    assert (result - truth).norm() < 0.05 * truth.norm()


def test_the_stem_calls_its_projections():
    stem = AttentionStem(3, 8, num_heads=2, values='plain')
    seen = []
    for projection in (stem.query, stem.key, stem.value):
        projection.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    stem(torch.zeros(1, 3, 8, 8))
    assert seen == [(4, 16, 8)] * 3


def test_a_plain_layer_calls_no_projection(monkeypatch):
    """Its projections are read and computed at once, and again in the backward."""
    layer = new_layer()

    def refuse(*args):
        raise AssertionError('called')

    monkeypatch.setattr(nn.Linear, 'forward', refuse)
    layer(X).sum().backward()
    assert layer.query.weight.grad.abs().sum() > 0
