#!/usr/bin/env python
"""Compare a backend with the reference in float64 on random shapes and options, value and gradients.

    python tools/checks/draws.py --draws 10000 --backend native
    python tools/checks/draws.py --draws 1000000 --minutes 60 --dtypes float64 float32 bfloat16 float16

Draw number N is the same on every machine; `--first N --draws 1` repeats it. float64 must agree to 1e-10. For
another type the allowed error has three parts: twice eager's error, one unit in the last place per channel of
a head, and two float32 units of the largest log-sum-exp. The forward keeps only the last in float32.
"""

import argparse
import math
import random
import sys
import time

import torch
from rich.progress import track

from sasa_det.ops import local_attention

TOLERANCE = 1e-10


def draw(seed: int, dtype: torch.dtype = torch.float64) -> tuple:
    """Draw inputs and options.

    Args:
        seed: Number of the draw.
        dtype: Type of the inputs.

    Returns:
        The five inputs, None for absent ones, the options, and a description.
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
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

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
    described = (
        f'draw {seed}, {dtype}: shape {shape}, positions {positions}, key {has_key}, {options}'
    )
    return [*maps, *tables], options, described


def value_and_grads(inputs: list, options: dict, backend: str) -> list:
    """Compute the output and the gradients of all present inputs."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    output = local_attention(*leaves, **options, backend=backend)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return [output, *torch.autograd.grad(output, [x for x in leaves if x is not None], grad)]


def share_of_budget(seed: int, backend: str, dtype: torch.dtype) -> float:
    """Compute a draw's largest error, as a fraction of the allowed error."""
    inputs, options, _ = draw(seed, dtype)
    results = value_and_grads(inputs, options, backend)
    exact = [None if x is None else x.double() for x in inputs]
    truths = value_and_grads(exact, options, 'reference')
    peers = truths if dtype == torch.float64 else value_and_grads(inputs, options, 'eager')
    depth = inputs[0].shape[1] // options['num_heads']
    there = [
        (result.detach().double(), peer.detach().double(), truth.detach(), truth.abs().max().item())
        for result, peer, truth in zip(results, peers, truths)
        if truth.numel()
    ]
    if dtype == torch.float64:
        shares = [
            ((result - truth).abs().max() / max(size, 1.0) / TOLERANCE).item()
            for result, _, truth, size in there
        ]
    else:
        # The largest of eager's errors, as gradients of positions are sums with much cancellation.
        lost = max(
            (rms(peer - truth) / size for _, peer, truth, size in there if size), default=0.0
        )
        # Types of lower precision are computed in float32.
        units = torch.finfo(dtype).eps * depth
        most = largest_logit(exact, options) + math.log(options['kernel_size'] ** 2)
        units += 2 * torch.finfo(torch.float32).eps * most
        allowed = 2 * lost + units
        shares = [
            rms(result - truth) / (allowed * max(size, 1.0)) for result, _, truth, size in there
        ]
    return max((math.inf if math.isnan(share) else share for share in shares), default=0.0)


def largest_logit(inputs: list, options: dict) -> float:
    """Bound a head's logits by the norms of its queries, and of its keys and positions."""
    query, key, _, *tables = inputs
    norms = [
        0.0 if x is None or not x.numel() else x.detach().norm(dim=dim).max().item()
        for x, dim in (
            (query.unflatten(1, (options['num_heads'], -1)), 2),
            (None if key is None else key.unflatten(1, (options['num_heads'], -1)), 2),
            (tables[0], 1),
            (tables[1], 1),
        )
    ]
    return options['scale'] * norms[0] * (norms[1] + math.hypot(*norms[2:]))


def rms(x: torch.Tensor) -> float:
    """The root mean square."""
    return x.square().mean().sqrt().item()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--draws', type=int, default=200)
    parser.add_argument('--first', type=int, default=0)
    parser.add_argument(
        '--minutes', type=float, help='stop after so many of CPU time, whatever --draws says'
    )
    parser.add_argument('--backend', default='native')
    parser.add_argument(
        '--dtypes',
        nargs='+',
        default=['float64'],
        choices=('float64', 'float32', 'bfloat16', 'float16'),
        help='draws take them in turn; default: %(default)s',
    )
    options = parser.parse_args()
    begin, done, worst, wrong = time.process_time(), 0, 0.0, 0
    for seed in track(range(options.first, options.first + options.draws), transient=True):
        if options.minutes and time.process_time() - begin > 60 * options.minutes:
            break
        dtype = getattr(torch, options.dtypes[seed % len(options.dtypes)])
        share = share_of_budget(seed, options.backend, dtype)
        done, worst = done + 1, max(worst, share)
        if share > 1:
            wrong += 1
            print(
                f'{draw(seed, dtype)[2]}: {share:.2g} times the error that is allowed', flush=True
            )
    print(f'{done} draws, {wrong} disagree; at most {worst:.2g} of the error that is allowed')
    sys.exit(wrong > 0)


if __name__ == '__main__':
    main()
