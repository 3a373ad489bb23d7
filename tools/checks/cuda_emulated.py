#!/usr/bin/env python
"""Run the CUDA kernels on the CPU, under the tests' emulator, with every option, in many orders of threads.

    python tools/checks/cuda_emulated.py                                 all variants, 2 orders each; an hour
    python tools/checks/cuda_emulated.py --depths 32 --windows 7 --orders 20

Value and gradients must be within the error budget of tests/ops/cases.py, and have the same bits in each order.
The emulator finds reads and writes out of bounds, memory that nobody wrote, and missing barriers.
Ends with status 1 if a case fails.
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tests' / 'ops'))

from cases import Case, assert_within_the_error_of_plain_pytorch, value_and_grads
from cuda_emulator import Emulator

from sasa_det.ops.backends.cuda_launches import DEPTHS, WINDOWS

# One or more chunks and strips, whole and cut, and maps that are smaller than a window.
SIZES = ((9, 19), (17, 5), (2, 33), (1, 1))


def check(case: Case, dtype: torch.dtype, orders: int, emulator: Emulator) -> str:
    """Compute a case in each order.

    Args:
        case: One local attention.
        dtype: Type of its inputs.
        orders: How many orders of the threads.
        emulator: Computes it.

    Returns:
        What is wrong; empty if nothing is.
    """
    try:
        emulator.seed = 0
        assert_within_the_error_of_plain_pytorch(case, dtype, 'cuda')
        first = value_and_grads(case.inputs(dtype), case.options, 'cuda')
        for emulator.seed in range(1, orders):
            other = value_and_grads(case.inputs(dtype), case.options, 'cuda')
            if not all(map(torch.equal, first, other)):
                return f'order {emulator.seed} gives other bits'
    except RuntimeError as error:
        return f'order {emulator.seed}: {error}'
    except AssertionError as error:
        return f'beyond the error budget: {error}'
    return ''


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--types', nargs='+', default=['bfloat16', 'float16'])
    parser.add_argument('--depths', nargs='+', type=int, default=DEPTHS)
    parser.add_argument('--windows', nargs='+', type=int, default=WINDOWS)
    parser.add_argument('--borders', nargs='+', default=['zeros', 'mask'])
    parser.add_argument('--dilations', nargs='+', type=int, default=[1, 2])
    parser.add_argument('--orders', type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Memory that nobody wrote is NaN.
    torch.use_deterministic_algorithms(True)
    emulator = Emulator(SimpleNamespace(setattr=setattr))
    terms = ((True, 'shared'), (True, 'per_head'), (True, None), (False, 'shared'))
    lists = (
        options.types,
        options.depths,
        options.windows,
        options.borders,
        options.dilations,
        terms,
    )
    cases = [*product(*lists)]
    wrong, begin = 0, time.process_time()
    for number, each in track([*enumerate(cases)], description='Emulating', transient=True):
        dtype, depth, window, border, dilation, (key, positions) = each
        case = Case(
            window, 2, dilation, border, 0.8, key, positions, 1, depth, SIZES[number % len(SIZES)]
        )
        said = check(case, getattr(torch, dtype), options.orders, emulator)
        if said:
            wrong += 1
            print(f'{case}, {dtype}: {said}', flush=True)
    took = time.process_time() - begin
    print(
        f'{len(cases)} cases in {options.orders} orders each, {wrong} wrong; {took:.0f} s without the compiler'
    )
    sys.exit(wrong > 0)


if __name__ == '__main__':
    main()
