"""The reference against the formula written as loops, and against finite differences."""

import math

import pytest
import torch
from cases import OPTIONS, SMALL, Case, with_grad

from sasa_det.ops import local_attention


def attend_by_loops(query, key, value, rel_row, rel_col, case: Case):
    """Equation 3 of the paper, a number at a time."""
    batch, channels, height, width = query.shape
    depth, k = channels // case.num_heads, case.kernel_size
    output = torch.zeros_like(value)
    for b in range(batch):
        for head in range(case.num_heads):
            own = slice(head * depth, (head + 1) * depth)
            table = head if case.positions == 'per_head' else 0
            for y in range(height):
                for x in range(width):
                    q = query[b, own, y, x].tolist()
                    logits, values = [], []
                    for t in range(k):
                        for u in range(k):
                            row = y + (t - k // 2) * case.dilation
                            col = x + (u - k // 2) * case.dilation
                            inside = 0 <= row < height and 0 <= col < width
                            if not inside and case.border == 'mask':
                                continue
                            logit = 0.0
                            for c in range(depth):
                                if key is not None and inside:
                                    logit += q[c] * key[b, head * depth + c, row, col].item()
                                if rel_row is not None and c < depth // 2:
                                    logit += q[c] * rel_row[table, c, t].item()
                                if rel_row is not None and c >= depth // 2:
                                    logit += q[c] * rel_col[table, c - depth // 2, u].item()
                            logits.append(case.scale * logit)
                            values.append(
                                value[b, own, row, col].tolist() if inside else [0.0] * depth
                            )
                    total = sum(math.exp(logit) for logit in logits)
                    for c in range(depth):
                        output[b, head * depth + c, y, x] = sum(
                            math.exp(logit) / total * v[c] for logit, v in zip(logits, values)
                        )
    return output


@pytest.mark.parametrize('case', OPTIONS, ids=str)
def test_agrees_with_loops(case):
    case = Case(**{**vars(case), 'batch': 1, 'size': (4, 5)})
    inputs = case.inputs()
    expected = attend_by_loops(*inputs, case)
    output = local_attention(*inputs, **case.options, backend='reference')
    assert (output - expected).abs().max() < 1e-12


def test_agrees_with_loops_on_a_map_smaller_than_the_window():
    case = Case(kernel_size=7, batch=1, size=(2, 1), border='mask')
    inputs = case.inputs()
    output = local_attention(*inputs, **case.options, backend='reference')
    assert (output - attend_by_loops(*inputs, case)).abs().max() < 1e-12


@pytest.mark.parametrize('case', OPTIONS, ids=str)
def test_gradcheck(case):
    case = Case(**{**vars(case), 'batch': SMALL.batch, 'size': SMALL.size})

    def attend(*inputs):
        return local_attention(*inputs, **case.options, backend='reference')

    assert torch.autograd.gradcheck(attend, with_grad(case.inputs()))


def test_is_differentiable_twice():
    def attend(*inputs):
        return local_attention(*inputs, **SMALL.options, backend='reference')

    assert torch.autograd.gradgradcheck(attend, with_grad(SMALL.inputs()))
