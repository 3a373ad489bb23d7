"""Where does a pixel attend? The answer in words and numbers, also for those who cannot see the pictures."""

from typing import List

import numpy as np

from ...evaluation.attention_maps import AttentionMap

HEADERS = (
    'head',
    'looks most at',
    'its weight',
    "own cell's weight",
    'content spans',
    'position spans',
)


def head_rows(found: AttentionMap) -> List[list]:
    """Say for each head where a query pixel attends most, and due to which term of the logits.

    Args:
        found: Of one query pixel.

    Returns:
        One row per head, with the columns of ``HEADERS``. A term's span is the difference of its
        highest and lowest logit in the window. The term of wider span decides. '–' stands for a
        term that the layer lacks.

    Examples:
        >>> import torch
        >>> weights = torch.zeros(1, 1, 3, 3)
        >>> weights[0, 0, 0, 1] = 1
        >>> map = AttentionMap('neck', weights, *[torch.zeros(1, 2)] * 2, (3, 3), 1, 1, None, weights)
        >>> head_rows(map)
        [[1, '1 up', '1.000', '0.000', '1.00', '–']]
    """
    rows = []
    for head, weight in enumerate(found.weights[0].numpy()):
        middle = len(weight) // 2
        row, col = np.unravel_index(weight.argmax(), weight.shape)
        rows.append(
            [
                head + 1,
                _place((row - middle) * found.dilation, (col - middle) * found.dilation),
                f'{weight.max():.3f}',
                f'{weight[middle, middle]:.3f}',
                *(_span(term, head) for term in (found.content, found.position)),
            ]
        )
    return rows


def _place(down: int, right: int) -> str:
    parts = []
    if down:
        parts.append(f'{abs(down)} {"down" if down > 0 else "up"}')
    if right:
        parts.append(f'{abs(right)} {"right" if right > 0 else "left"}')
    return ', '.join(parts) or 'own cell'


def _span(term, head: int) -> str:
    if term is None:
        return '–'
    logits = term[0, head]
    logits = logits[logits.isfinite()]
    return f'{(logits.max() - logits.min()).item():.2f}'
