#!/usr/bin/env python
"""Compare a backend with the reference in float64 on random shapes and options, value and gradients.

    python tools/check_draws.py --draws 10000 --backend native

Draw number N is the same on every machine; `--first N --draws 1` repeats it.
"""

import argparse
import random
import sys

import torch
from rich.progress import track

from sasa_det.ops import local_attention

TOLERANCE = 1e-10


def draw(seed: int) -> tuple:
    """Draw inputs and options.

    Args:
        seed: Number of the draw.

    Returns:
        The five inputs, None where there is none, the options, and a description.
    """
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    num_heads, half = choose.randint(1, 4), choose.randint(1, 5)
    depth = 2 * half
    shape = (
        choose.choice((0, 1, 1, 2, 3)),
        num_heads * depth,
        choose.choice((1, 2, 3, 5, 8, 13, 17, 33)) + choose.randint(0, 3),
        choose.choice((1, 2, 3, 7, 8, 15, 16, 17, 33)) + choose.randint(0, 3),
    )
    options = dict(
        kernel_size=choose.choice((1, 3, 5, 7, 9, 11, 13)),
        num_heads=num_heads,
        dilation=choose.choice((1, 1, 1, 2, 3)),
        border=choose.choice(('zeros', 'mask')),
        scale=choose.choice((1.0, depth**-0.5, 3.0)),
    )
    positions = choose.choice((None, 1, num_heads))
    has_key = positions is None or choose.random() < 0.75

    def make(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def lay_out(x):
        layout = choose.choice(('contiguous', 'channels_last', 'sliced', 'expanded'))
        if layout == 'channels_last':
            return x.contiguous(memory_format=torch.channels_last)
        if layout == 'sliced':
            wide = make(shape[0], shape[1] + 1, shape[2] + 2, 2 * shape[3] + 1)
            return wide[:, 1:, 1:-1, 1::2]
        if layout == 'expanded':
            return x[:, :, :1].expand(shape)
        return x

    maps = [lay_out(make(*shape)) for _ in range(3)]
    if not has_key:
        maps[1] = None
    tables = [None if positions is None else make(positions, half, options['kernel_size'])]
    tables.append(None if positions is None else make(positions, half, options['kernel_size']))
    described = f'draw {seed}: shape {shape}, positions {positions}, key {has_key}, {options}'
    return [*maps, *tables], options, described


def value_and_grads(inputs: list, options: dict, backend: str) -> list:
    """Compute the output and the gradients of all inputs that there are."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    output = local_attention(*leaves, **options, backend=backend)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return [output, *torch.autograd.grad(output, [x for x in leaves if x is not None], grad)]


def largest_error(seed: int, backend: str) -> float:
    """Compute by how much a draw's results differ, beside the size of the largest of each."""
    inputs, options, _ = draw(seed)
    worst = 0.0
    for result, truth in zip(
        value_and_grads(inputs, options, backend), value_and_grads(inputs, options, 'reference')
    ):
        if truth.numel():
            error = (result - truth).detach().abs().max() / truth.detach().abs().max().clamp(min=1)
            worst = max(worst, float(error.nan_to_num(nan=torch.inf)))
    return worst


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--draws', type=int, default=200)
    parser.add_argument('--first', type=int, default=0)
    parser.add_argument('--backend', default='native')
    options = parser.parse_args()
    worst, wrong = 0.0, 0
    for seed in track(range(options.first, options.first + options.draws), transient=True):
        error = largest_error(seed, options.backend)
        worst = max(worst, error)
        if error > TOLERANCE:
            wrong += 1
            print(f'{draw(seed)[2]}: off by {error:.2e}')
    print(f'{options.draws} draws, {wrong} disagree; largest relative error {worst:.2e}')
    sys.exit(wrong > 0)


if __name__ == '__main__':
    main()
