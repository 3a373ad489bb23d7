"""What the operator's tests run over: every option, and inputs to match."""

from dataclasses import dataclass, replace
from itertools import product
from typing import List, Optional

import pytest
import torch

from sasa_det.ops import available_backends, local_attention
from sasa_det.ops.backends.reference import window_logits
from sasa_det.ops.window import Window, unfold_windows


@dataclass(frozen=True)
class Case:
    """One local attention: options, and the shapes of its inputs."""

    kernel_size: int = 3
    num_heads: int = 2
    dilation: int = 1
    border: str = 'zeros'
    scale: float = 0.8
    key: bool = True
    positions: Optional[str] = 'shared'  # or 'per_head' or None
    batch: int = 2
    depth: int = 4
    size: tuple = (6, 7)  # of key and value
    stride: int = 1

    def __str__(self):
        return '-'.join(str(x) for x in vars(self).values())

    @property
    def options(self) -> dict:
        return dict(
            kernel_size=self.kernel_size,
            num_heads=self.num_heads,
            dilation=self.dilation,
            border=self.border,
            scale=self.scale,
            stride=self.stride,
        )

    def inputs(self, dtype=torch.float64, seed=0) -> List[Optional[torch.Tensor]]:
        """Draw query, key, value, rel_row and rel_col."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        queries = tuple(-(-n // self.stride) for n in self.size)
        sizes = (queries, self.size, self.size)
        maps = [draw(self.batch, self.num_heads * self.depth, *size) for size in sizes]
        if not self.key:
            maps[1] = None
        heads = dict(shared=1, per_head=self.num_heads).get(self.positions)
        tables = [heads and draw(heads, self.depth // 2, self.kernel_size) for _ in range(2)]
        return maps + tables


def with_grad(inputs):
    """Make the inputs that are there leaves that want gradients."""
    return [None if x is None else x.detach().clone().requires_grad_() for x in inputs]


def value_and_grads(inputs, options, backend, seed=1):
    """Compute the output and the gradient of each input that is there, for a random cotangent."""
    leaves = with_grad(inputs)
    output = local_attention(*leaves, **options, backend=backend)
    cotangent = torch.randn(
        output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    there = [x for x in leaves if x is not None]
    return [output.detach(), *torch.autograd.grad(output, there, cotangent.to(output))]


def largest_error(results, expected) -> float:
    """Return the largest absolute difference between two lists of tensors."""
    assert len(results) == len(expected)
    errors = [
        (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        for a, b in zip(results, expected)
    ]
    assert all(error == error for error in errors), 'NaN'
    return max(errors)


def attend_plainly(query, key, value, rel_row, rel_col, *, num_heads, **options):
    """The formula in plain PyTorch, every intermediate in the inputs' own type."""
    window = Window(num_heads=num_heads, **options)
    logits = window_logits(query, key, rel_row, rel_col, window, size=tuple(value.shape[2:]))
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    values = (
        unfold_windows(value, window)
        .flatten(2, 3)
        .unflatten(1, (num_heads, value.shape[1] // num_heads))
    )
    return torch.einsum('bhpij,bhdpij->bhdp', weights, values).reshape(query.shape)


def assert_within_the_error_of_plain_pytorch(case, dtype, backend, device='cpu'):
    """The budget is what the plain formula loses in that type."""
    inputs = [None if x is None else x.to(device) for x in case.inputs(dtype)]
    exact = value_and_grads(
        [None if x is None else x.double() for x in inputs], case.options, 'reference'
    )
    results = value_and_grads(inputs, case.options, backend)
    leaves = with_grad(inputs)
    plain = attend_plainly(*leaves, **case.options)
    cotangent = torch.randn(
        plain.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    there = [x for x in leaves if x is not None]
    plain = [plain, *torch.autograd.grad(plain, there, cotangent.to(plain))]
    # Results are stored in their type: whatever the way of computing, each loses a unit in the last
    # place in each term of a product over a head's channels.
    rounding = torch.finfo(dtype).eps * case.depth * max(x.abs().max().item() for x in exact)
    for result, peer, truth in zip(results, plain, exact):
        assert result.dtype == dtype
        assert rms(result - truth) <= 2 * rms(peer - truth) + rounding


def rms(x):
    """Return the root of the mean square."""
    return x.double().square().mean().sqrt().item()


def strided(x, how):
    """The same numbers in another layout."""
    if how == 'channels_last':
        return x.contiguous(memory_format=torch.channels_last)
    if how == 'slice_of_fused_channels_last':
        return strided(strided(x, 'channels_last'), 'slice_of_fused')
    if how == 'slice_of_fused':
        return torch.cat((torch.full_like(x, 9), x, torch.full_like(x, 9)), 1).chunk(3, 1)[1]
    if how == 'transposed':
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if how == 'every_other':
        wide = x.new_full((*x.shape[:3], 2 * x.shape[3]), 9)
        wide[..., ::2] = x
        return wide[..., ::2]
    assert how == 'expanded'
    return x[:, :, :1].expand_as(x)


# Every combination of the options that changes what is computed, at one small, odd map.
OPTIONS = [
    Case(dilation=dilation, border=border, key=key, positions=positions)
    for dilation, border, key, positions in product(
        (1, 2), ('zeros', 'mask'), (True, False), ('shared', 'per_head', None)
    )
    if key or positions
]
# And each size that is special: of windows, heads, maps and batches.
SIZES = [
    Case(kernel_size=kernel_size, border=border, size=size)
    for kernel_size, border, size in (
        (1, 'zeros', (5, 4)),
        (1, 'mask', (5, 4)),
        (5, 'mask', (9, 21)),
        (7, 'zeros', (12, 9)),
        (7, 'mask', (3, 2)),
        (9, 'zeros', (10, 35)),
        (11, 'mask', (13, 6)),
        (13, 'zeros', (7, 15)),
        (3, 'zeros', (1, 1)),
        (3, 'mask', (1, 1)),
        (5, 'zeros', (1, 40)),
        (5, 'mask', (40, 1)),
        (7, 'zeros', (33, 17)),
    )
] + [
    Case(num_heads=1, depth=2),
    Case(num_heads=3, depth=10, kernel_size=7, size=(8, 19)),
    Case(num_heads=2, depth=3, positions=None, border='mask'),
    Case(num_heads=4, depth=8, dilation=3, kernel_size=5, border='mask', size=(11, 20)),
    Case(dilation=4, size=(3, 9)),
    Case(batch=0),
    Case(batch=5, size=(4, 70)),
]
# Strides: windows that overlap by much, by little, and not at all; dilations with which the stride has a common
# divisor and has none; maps that end anywhere between two queries.
STRIDES = [
    Case(stride=2, key=key, positions=positions, border=border, size=size)
    for key, positions, border, size in (
        (True, 'shared', 'zeros', (7, 9)),
        (True, 'per_head', 'mask', (8, 10)),
        (True, None, 'mask', (1, 1)),
        (False, 'shared', 'mask', (9, 8)),
    )
] + [
    Case(stride=stride, kernel_size=kernel_size, dilation=dilation, border=border, size=size)
    for stride, kernel_size, dilation, border, size in (
        (2, 7, 1, 'zeros', (39, 71)),
        (2, 7, 1, 'mask', (40, 5)),
        (2, 5, 1, 'mask', (1, 40)),
        (2, 3, 2, 'zeros', (9, 12)),
        (2, 3, 3, 'mask', (19, 14)),
        (2, 1, 1, 'zeros', (50, 6)),
        (2, 1, 3, 'mask', (13, 6)),
        (3, 3, 1, 'zeros', (20, 10)),
        (3, 5, 2, 'mask', (25, 9)),
        (3, 7, 1, 'zeros', (37, 37)),
        (4, 3, 6, 'mask', (30, 23)),
        (4, 9, 1, 'zeros', (70, 13)),
        (8, 3, 1, 'zeros', (60, 20)),
        (9, 5, 1, 'mask', (20, 19)),  # larger than the native kernels take
        (100, 3, 2, 'zeros', (5, 8)),
    )
]
CASES = OPTIONS + SIZES
SMALL = replace(Case(), batch=1, size=(3, 4))


def backends(*names):
    """Parametrise a test by backends, those that are not here skipped with their reason."""
    reasons = available_backends()
    return pytest.mark.parametrize(
        'backend',
        [
            pytest.param(name, marks=pytest.mark.skip(f'{name}: {reasons[name]}'))
            if reasons[name]
            else name
            for name in names
        ],
    )
