"""How torch's and mmengine's FLOP counters count the operator, which they would otherwise leave out.

mmdet's ``get_flops.py`` uses mmengine's counter.
"""

from math import prod
from types import ModuleType


def count_macs(query_shape, kernel_size: int, has_key: bool, has_positions: bool) -> int:
    """Count the multiply-adds of one local attention as the backends compute it.

    q.k and the weighted sum of values each take ``C * k * k`` per pixel. q.r takes ``C * k``, since
    it is the sum of a row and a column term. Windows at the border count in full, as those of a
    padded convolution do.

    Args:
        query_shape: (B, C, H, W).
        kernel_size: Window size k, in pixels.
        has_key: False for logits q.r alone.
        has_positions: Whether relative positions are given.

    Examples:
        >>> count_macs((1, 8, 10, 10), 3, has_key=True, has_positions=False)
        14400
    """
    batch, channels, height, width = query_shape
    per_channel = kernel_size**2 * (1 + has_key) + kernel_size * has_positions
    return batch * channels * height * width * per_channel


def register_with_torch(flop_counter: ModuleType) -> None:
    """Register the formulas with torch's FlopCounterMode, which counts a multiply-add as two FLOPs.

    Args:
        flop_counter: The module ``torch.utils.flop_counter``.
    """
    import torch

    register = getattr(flop_counter, 'register_flop_formula', None)
    if register is None:  # torch < 2.2
        return

    # Arguments arrive as shapes, or None.
    @register(torch.ops.sasa_det.local_attention)
    def _(query, key, value, rel_row, rel_col, kernel_size, *args, **kwargs) -> int:
        return 2 * count_macs(query, kernel_size, key is not None, rel_row is not None)

    # The backward recomputes the logits and takes two products for each product of the forward.
    def count_backward(query, key, rel_row, kernel_size: int) -> int:
        again = count_macs(query, kernel_size, key is not None, rel_row is not None)
        values = count_macs(query, kernel_size, False, False)
        return 2 * (3 * again - values)

    @register(torch.ops.sasa_det.local_attention_backward)
    def _(grad, query, key, value, rel_row, rel_col, lse, kernel_size, *args, **kw) -> int:
        return count_backward(query, key, rel_row, kernel_size)

    @register(torch.ops.sasa_det.local_attention_backward_into)
    def _(
        grad, query, key, value, rel_row, rel_col, lse, gq, gk, gv, kernel_size, *args, **kw
    ) -> int:
        return count_backward(query, key, rel_row, kernel_size)


def register_with_mmengine(complexity_analysis: ModuleType) -> None:
    """Make every FlopAnalyzer of mmengine count attention; it counts a multiply-add as one FLOP.

    The projections before it are counted too: mmengine knows bmm, but not bmm with a bias.

    Args:
        complexity_analysis: The module ``mmengine.analysis.complexity_analysis``.
    """
    from mmengine.analysis.jit_handles import bmm_flop_jit, get_shape

    def local_attention(inputs, outputs) -> int:
        query, key, _, rel_row, _, kernel_size = inputs[:6]
        return count_macs(
            get_shape(query), kernel_size.toIValue(), has_key=_is_given(key),
            has_positions=_is_given(rel_row),
        )  # fmt: skip

    def dot_product_attention(inputs, outputs) -> int:  # of the attention stem
        query, key, value = (get_shape(each) for each in inputs[:3])
        return prod(query) * key[-2] + prod(query[:-1]) * prod(value[-2:])

    known = complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
    known['sasa_det::local_attention'] = local_attention
    known.setdefault('aten::scaled_dot_product_attention', dot_product_attention)
    known.setdefault('aten::baddbmm', lambda inputs, outputs: bmm_flop_jit(inputs[1:3], outputs))


def _is_given(value) -> bool:
    return value.type().kind() != 'NoneType'
