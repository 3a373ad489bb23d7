#!/usr/bin/env python
"""Print one checksum of the bits that each backend computes, value and gradients, on random shapes and options.

    python tools/checks/bits.py --draws 200

Run it before and after a change that must not alter a single bit: the lines are to be the same. They
are those of one machine: another CPU has other instructions. The draws are those of ``draws.py``.
Triton runs where there is a GPU, or under ``TRITON_INTERPRET=1``.
"""

import argparse
import hashlib
import itertools

import torch
from draws import draw, value_and_grads

from sasa_det.ops import available_backends

DTYPES = ('float64', 'float32', 'bfloat16', 'float16')
# Draws of more numbers in a map are passed over: the interpreter would take minutes for each.
LARGEST_INTERPRETED = 2_000


def bits(backend: str, draws: int, dtypes) -> str:
    """Compute the checksum of a backend's results on so many draws."""
    checksum, done = hashlib.sha256(), 0
    for seed in itertools.count():
        if done == draws:
            break
        dtype = getattr(torch, dtypes[seed % len(dtypes)])
        inputs, options, _ = draw(seed, dtype)
        if backend == 'triton' and inputs[0].numel() > LARGEST_INTERPRETED:
            continue
        done += 1
        for result in value_and_grads(inputs, options, backend):
            checksum.update(result.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return f'{backend}: {checksum.hexdigest()[:16]} of {done} draws'


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    there = [name for name, reason in available_backends().items() if reason is None]
    parser.add_argument('--draws', type=int, default=200)
    parser.add_argument('--backends', nargs='+', default=there, choices=there)
    parser.add_argument('--dtypes', nargs='+', default=DTYPES, choices=DTYPES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for backend in options.backends:
        print(bits(backend, options.draws, options.dtypes), flush=True)


if __name__ == '__main__':
    main()
