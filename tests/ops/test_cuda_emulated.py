"""The CUDA kernels on the CPU, under an emulator: their values, and what it says of kernels that are wrong.

Where there is a GPU, the values are tested there, too.

tools/checks/cuda_emulated.py runs over all options and more orders of the threads.
"""

import pytest
import torch
from cases import Case, assert_within_the_error_of_plain_pytorch, value_and_grads
from cuda_emulator import Emulator

from sasa_det.ops import available_backends
from sasa_det.ops.backends import cuda

# Together every option: depths, windows of each kind of tile, borders, dilation, tables, no key, both types.
CASES = [
    (Case(7, depth=32, batch=1, size=(9, 19)), torch.bfloat16),
    (
        Case(5, depth=8, dilation=2, border='mask', positions='per_head', batch=1, size=(9, 20)),
        torch.float16,
    ),
    (Case(9, num_heads=1, depth=16, key=False, batch=1, size=(10, 17)), torch.bfloat16),
    (Case(3, num_heads=1, depth=64, positions=None, border='mask', size=(9, 5)), torch.float16),
]


WHY_NO_GPU = available_backends()['cuda']
DEVICES = [
    'cpu',
    pytest.param(
        'cuda', marks=pytest.mark.skipif(WHY_NO_GPU is not None, reason=f'cuda: {WHY_NO_GPU}')
    ),
]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case, dtype', CASES, ids=str)
def test_matches_the_reference(case, dtype, device, monkeypatch):
    if device == 'cpu':
        Emulator(monkeypatch)
    else:
        # The inputs are contiguous, which the backend leaves to Triton, but can copy.
        monkeypatch.setattr(cuda, 'refuse', lambda query, window: None)
    assert_within_the_error_of_plain_pytorch(case, dtype, 'cuda', device)


def test_the_order_of_threads_changes_no_bit(monkeypatch):
    case, dtype = CASES[0]
    emulator = Emulator(monkeypatch)
    first, *others = [
        value_and_grads(case.inputs(dtype), case.options, 'cuda') for emulator.seed in range(3)
    ]
    for other in others:
        assert all(map(torch.equal, first, other))


# Of the forward's source, and what the emulator says without it.
MISTAKES = [
    ('    meet_block();\n', '', 'another warp'),
    ('    wait_for_copies();\n', '', 'not waited for'),
    ('free_chunk(at))', 'at)', 'another warp'),
    (
        '    queries.load(from,',
        '    queries.load(from + 8 * query.row_stride,',
        'that it was not given',
    ),
    ('STRIPS_AT + thread.warp * STRIPS', 'STRIPS_AT + SHARED_BYTES', 'bytes of shared memory at'),
    ('if (thread.t == 0) {', 'if (thread.t == 0) { meet_warp();', 'waits for ever'),
]


@pytest.mark.parametrize('wrong', MISTAKES, ids=lambda wrong: wrong[2])
def test_finds_mistakes(wrong, monkeypatch):
    before, after, message = wrong
    case, dtype = CASES[0]
    Emulator(monkeypatch, change=(before, after))
    with pytest.raises(RuntimeError, match=message):
        value_and_grads(case.inputs(dtype), case.options, 'cuda')
