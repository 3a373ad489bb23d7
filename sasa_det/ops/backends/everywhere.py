"""A stride for backends that have none: attend at every pixel, and keep what the stride asks for."""

from types import ModuleType
from typing import Optional, Tuple

import torch
from torch import Tensor

from ..window import Window, output_format, strided, strided_copy


class Everywhere:
    """A backend that computes any stride by another that computes none.

    Pixels between the queries get queries of zeros, and their outputs gradients of zeros. So they add nothing
    to any gradient.

    Args:
        backend: The other backend.
    """

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Tensor,
        rel_row: Optional[Tensor],
        rel_col: Optional[Tensor],
        window: Window,
    ) -> Tuple[Tensor, Tensor]:
        """Compute the attention; as :func:`sasa_det.ops.backends.eager.forward`."""
        everywhere = _spread(query, value, window.stride)
        results = self.backend.forward(
            everywhere, key, value, rel_row, rel_col, window._replace(stride=1)
        )
        return tuple(strided_copy(x, window.stride) for x in results)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Optional[Tensor],
        value: Tensor,
        rel_row: Optional[Tensor],
        rel_col: Optional[Tensor],
        logsumexp: Tensor,
        grad_maps: Tuple[Tensor, Optional[Tensor], Tensor],
        window: Window,
    ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """Compute the gradients; as :func:`sasa_det.ops.backends.eager.backward`."""
        grad, everywhere, logsumexp = (
            _spread(x, value, window.stride) for x in (grad, query, logsumexp)
        )
        grad_everywhere = torch.empty_like(everywhere)
        tables = self.backend.backward(
            grad, everywhere, key, value, rel_row, rel_col, logsumexp,
            (grad_everywhere, *grad_maps[1:]), window._replace(stride=1),
        )  # fmt: skip
        grad_maps[0].copy_(strided(grad_everywhere, window.stride))
        return tables


def _spread(x: Tensor, value: Tensor, stride: int) -> Tensor:
    """Put a map's pixels where the queries are in the map of the values, and zeros between them."""
    size = (*x.shape[:2], *value.shape[2:])
    everywhere = x.new_zeros(size).contiguous(memory_format=output_format(x))
    strided(everywhere, stride).copy_(x)
    return everywhere
