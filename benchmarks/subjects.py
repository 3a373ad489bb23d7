"""The benchmarks' subjects: attention in several ways, and the convolution, at RetinaNet's shapes."""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import local_attention
from sasa_det.ops.flop_counters import count_macs

SHAPES = {  # channels, height, width of RetinaNet-R50 at 1333 x 800
    'stage 1': (64, 200, 336),
    'stage 2': (128, 100, 168),
    'stage 3': (256, 50, 84),
    'stage 4': (512, 25, 42),
    'P3': (256, 100, 168),
    'P4': (256, 50, 84),
    'P5': (256, 25, 42),
    'P6': (256, 13, 21),
    'P7': (256, 7, 11),
}
HEADS = 8
BACKENDS = {
    'core': {'cpu': 'native', 'cuda': 'triton'},
    'core-cuda': {'cpu': 'eager', 'cuda': 'cuda'},
    'eager': {'cpu': 'eager', 'cuda': 'eager'},
    'unfold': {'cpu': 'reference', 'cuda': 'reference'},
}


def unfold_as_published(query, key, value, rel_row, rel_col, kernel_size):
    """Attend with whole windows of keys and values in memory.

    So do the public implementations of the paper, but they apply the softmax to each product. Here it
    applies to the sum over a head's channels, as in the formula.
    """
    batch, channels, height, width = query.shape

    def windows(x):
        padded = F.pad(x, (kernel_size // 2,) * 4)
        return padded.unfold(2, kernel_size, 1).unfold(3, kernel_size, 1)

    by_head = (batch, HEADS, channels // HEADS, height, width, -1)
    window = (-1, -1, kernel_size, kernel_size)
    positions = torch.cat(
        (rel_row.unsqueeze(3).expand(window), rel_col.unsqueeze(2).expand(window)), 1
    )
    positions = positions.repeat(HEADS, 1, 1, 1).view(channels, 1, 1, kernel_size, kernel_size)
    keys = (windows(key) + positions).contiguous().view(by_head)
    values = windows(value).contiguous().view(by_head)
    weights = (query.view(by_head) * keys).sum(2, keepdim=True).softmax(-1)
    return (weights * values).sum(-1).view_as(query)


@cache
def _flex_mask(height: int, width: int, kernel_size: int, device: str):
    """Build flex_attention's mask: the keys of a padded map in a query's window."""
    from torch.nn.attention.flex_attention import create_block_mask

    span = width + kernel_size - 1

    def in_window(b, h, query, key):
        row, col = key // span - query // width, key % span - query % width
        return (row >= 0) & (row < kernel_size) & (col >= 0) & (col < kernel_size)

    keys = (height + kernel_size - 1) * span
    return create_block_mask(in_window, None, None, height * width, keys, device=device)


@cache
def _flex(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    # Only this part is compiled: from the whole function torch 2.13 compiles another formula on the CPU.
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def attend_by_flex(query, key, value, rel_row, rel_col, mask, compiled=False):
    """Attend by torch's flex_attention, with pixels in row-major order and the terms q.r as its score_mod.

    As in the operator, the zeros around the map are keys and values like any other.
    """
    height, width = query.shape[2:]
    kernel_size = rel_row.shape[2]
    span = width + kernel_size - 1

    def by_head(x):
        return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (HEADS, -1)).transpose(1, 2)

    query = by_head(query)
    key, value = (by_head(F.pad(x, (kernel_size // 2,) * 4)) for x in (key, value))
    first, second = query.chunk(2, 3)
    by_row, by_col = first @ rel_row, second @ rel_col  # (B, heads, pixels, kernel_size)

    def add_positions(score, b, h, pixel, neighbour):
        row = (neighbour // span - pixel // width).clamp(0, kernel_size - 1)
        col = (neighbour % span - pixel % width).clamp(0, kernel_size - 1)
        return score + by_row[b, h, pixel, row] + by_col[b, h, pixel, col]

    output = _flex(compiled)(query, key, value, add_positions, mask, scale=1.0)
    return output.transpose(1, 2).flatten(2).unflatten(1, (height, width)).permute(0, 3, 1, 2)


class Subject:
    """A subject to time: a function of leaf tensors that need gradients.

    Args:
        name: 'conv3x3', 'layer', 'core', 'eager', 'unfold', 'public unfold', 'compiled' or 'flex'.
        shape: (B, C, H, W).
        kernel_size: The attention's kernel_size.
        device: Device of all tensors.
        dtype: Type of all tensors.
        layout: Memory format of the maps.
    """

    def __init__(
        self,
        name: str,
        shape: tuple,
        kernel_size: int,
        device: str = 'cpu',
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.name, self.kernel_size = name, kernel_size
        generator = torch.Generator(device).manual_seed(0)
        channels = shape[1]

        def draw(size):
            x = torch.randn(size, generator=generator, device=device).to(dtype)
            return x.contiguous(memory_format=layout) if x.dim() == 4 else x

        if name not in ('conv3x3', 'layer'):
            sizes = [shape] * 3 + [(1, channels // HEADS // 2, kernel_size)] * 2
            self.leaves = [draw(size) for size in sizes]
            self.call = _attention(name, shape, kernel_size, device)
        else:
            module = (
                nn.Conv2d(channels, channels, 3, padding=1, bias=False)
                if name == 'conv3x3'
                else LocalSelfAttention2d(channels, kernel_size=kernel_size, num_heads=HEADS)
            ).to(device, dtype, memory_format=layout)
            x = draw(shape)
            self.leaves = [x, *(parameter.detach() for parameter in module.parameters())]
            names = [name for name, _ in module.named_parameters()]
            self.call = lambda x, *parameters: torch.func.functional_call(
                module, dict(zip(names, parameters)), x
            )
        for leaf in self.leaves:
            leaf.requires_grad_()
        # The output's gradient exists before the backward, as in training.
        self.grad = draw(shape)

    def forward(self) -> torch.Tensor:
        """Compute without saving anything for a backward."""
        with torch.no_grad():
            return self.call(*self.leaves)

    def both(self) -> tuple:
        """Compute the gradients of all leaves."""
        return torch.autograd.grad(self.call(*self.leaves), self.leaves, self.grad)

    def check(self, tolerance: float) -> bool:
        """Compare the output and all gradients with the reference's in float32 on the CPU.

        Args:
            tolerance: Largest norm of an error, relative to the norm of the reference.

        Raises:
            AssertionError: A result deviates by more.
        """
        name = self.name if self.name in ('conv3x3', 'layer') else 'unfold'
        truth = Subject(name, tuple(self.grad.shape), self.kernel_size)
        truth.leaves = [leaf.detach().float().cpu().requires_grad_() for leaf in self.leaves]
        truth.grad = self.grad.float().cpu()
        results, exact = ((x.forward(), *x.both()) for x in (self, truth))
        for result, wanted in zip(results, exact):
            error = (result.cpu() - wanted).norm() / wanted.norm()
            assert error < tolerance, f'{self.name} is wrong by {error:.1%}'
        return True

    def traffic(self) -> tuple:
        """Count the bytes that a forward, and a forward with backward, must read or write at least."""
        leaves, grad = sum(leaf.nbytes for leaf in self.leaves), self.grad.nbytes
        return leaves + grad, 3 * leaves + 2 * grad


def _attention(name: str, shape: tuple, kernel_size: int, device: str):
    """Return a function of query, key, value and the relative positions."""
    if name in BACKENDS:
        backend = BACKENDS[name][torch.device(device).type]
        return lambda *leaves: local_attention(
            *leaves, kernel_size=kernel_size, num_heads=HEADS, backend=backend
        )
    if name == 'flex':
        mask = _flex_mask(*shape[2:], kernel_size, device)
        return lambda *leaves: attend_by_flex(*leaves, mask, compiled=True)
    ways = {'public unfold': lambda x: x, 'compiled': partial(torch.compile, dynamic=False)}
    attend = ways[name](unfold_as_published)
    return lambda *leaves: attend(*leaves, kernel_size)


def flops(name: str, shape: tuple, kernel_size: int) -> tuple:
    """Count the FLOPs of a forward, and of a forward with backward; a multiply-add counts as two."""
    batch, channels, height, width = shape
    pixels = batch * height * width
    if name == 'conv3x3':
        macs = 9 * channels**2 * pixels
        return 2 * macs, 6 * macs
    core = count_macs(shape, kernel_size, True, True)
    projections = 3 * channels**2 * pixels if name == 'layer' else 0
    # The backward repeats the projection and the logits, and takes two products per product of the forward.
    again = core * 3 - count_macs(shape, kernel_size, False, False)
    return 2 * (core + projections), 2 * (core + again + 4 * projections)


def as_row(case: tuple, subject: str, shape: tuple, times: dict, machine: dict) -> dict:
    """Compare a subject's figures with the convolution's and the machine's.

    Args:
        case: Name of the shape, batch and kernel size.
        subject: The subject.
        shape: (B, C, H, W).
        times: Seconds by subject and pass.
        machine: The machine's description, with its FLOP/s.
    """
    row = dict(zip(('shape', 'batch', 'kernel_size'), case), subject=subject)
    for way, count in zip(('forward', 'both'), flops(subject, shape, case[2])):
        seconds = times[subject][way]
        row[f'{way}_ms'] = seconds * 1e3
        row[f'{way}_us'] = seconds * 1e6 / (shape[0] * shape[2] * shape[3])
        row[f'{way}_ratio'] = seconds / times['conv3x3'][way]
        row[f'{way}_gflops'] = count / seconds / 1e9
        row[f'{way}_share'] = count / seconds / 1e9 / machine['peak_gflops']
    return row
