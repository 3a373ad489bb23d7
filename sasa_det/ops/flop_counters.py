"""How FLOP counters count attention, which they would otherwise leave out.

torch's and mmengine's are told once they are imported; mmdet's ``get_flops.py`` uses mmengine's. Others take
a function from here: ``jit_handles`` is for fvcore, ``count_for_thop`` and ``count_for_ptflops`` for those.
"""

from math import prod
from types import ModuleType
from typing import Callable, Dict, Sequence

from .window import strided_size


def count_macs(query_shape, kernel_size: int, has_key: bool, has_positions: bool) -> int:
    """Count the multiply-adds of one local attention as the backends compute it.

    q.k and the weighted sum of values each take ``C * k * k`` per pixel. q.r takes ``C * k``, since
    it is the sum of a row and a column term. Windows at the border count in full, as those of a
    padded convolution do.

    Args:
        query_shape: (B, C, H, W) of the queries.
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

    from .native_library import load

    if load()[0] is None:
        return
    projections = torch.ops.sasa_det_native

    # One side of each product has the size of the weight, the other the pixels of the map.
    @register(projections.project)
    def _(x, weight, *args, **kw) -> int:
        return 2 * prod(weight) * x[0] * prod(x[2:])

    @register(projections.attend)
    def _(x, weight, bias, rel_row, rel_col, has_key, kernel_size, *args, **kw) -> int:
        maps, stride = 2 + has_key, args[5] if len(args) > 5 else 1
        query = (x[0], weight[0] // maps, *strided_size(x[2:], stride))
        attention = count_macs(query, kernel_size, has_key, rel_row is not None)
        pixels = prod(query[2:]) + (maps - 1) * prod(x[2:])
        return 2 * (prod(weight) // maps * x[0] * pixels + attention)

    @register(projections.project_back)
    def _(grad, weight, *args, **kw) -> int:
        return 2 * prod(weight) * grad[0] * prod(grad[2:])

    @register(projections.weight_gradient)
    def _(grad, x, *args, **kw) -> int:
        return 2 * grad[1] * prod(x)

    # The layer on a GPU: all projections in one, and the attention.
    on_gpu = torch.ops.sasa_det_cuda

    def count_projection(x, channels, parts) -> int:
        return 2 * prod(x) * channels * parts

    @register(on_gpu.projected_forward)
    def _(x, pack, channels, parts, bias, tables, kernel_size, *args, **kw) -> int:
        query = (x[0], channels, *x[2:])
        attention = 2 * count_macs(query, kernel_size, parts == 3, tables > 0)
        return count_projection(x, channels, parts) + attention

    @register(on_gpu.projected_backward)
    def _(grad, x, pack, lse, maps, channels, parts, bias, tables, kernel_size, *args, **kw) -> int:
        *_, wanted = args
        products = (maps is None) + wanted[0] + wanted[1]
        attention = count_backward(grad, parts == 3 or None, tables or None, kernel_size)
        return products * count_projection(x, channels, parts) + attention


def register_with_mmengine(complexity_analysis: ModuleType) -> None:
    """Make mmengine's FlopAnalyzer and ActivationAnalyzer count attention; a multiply-add is one FLOP.

    Args:
        complexity_analysis: The module ``mmengine.analysis.complexity_analysis``.
    """
    from mmengine.analysis.jit_handles import generic_activation_jit

    for name, handle in jit_handles().items():
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault(name, handle)
        # As of other products, the activations are the elements of the output.
        known = complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS
        known.setdefault(name, generic_activation_jit())


def jit_handles() -> Dict[str, Callable]:
    """Give the handles by which fvcore's and mmengine's analyses count attention, a multiply-add as one.

    Returns:
        By operator, for ``FlopCountAnalysis(model, x).set_op_handle(**jit_handles())``.

    Examples:
        >>> sorted(jit_handles())
        ['aten::scaled_dot_product_attention', 'sasa_det::local_attention']
    """

    def local_attention(inputs, outputs) -> int:
        query, key, _, rel_row, _, kernel_size = inputs[:6]
        return count_macs(
            _shape(query), kernel_size.toIValue(), has_key=_is_given(key),
            has_positions=_is_given(rel_row),
        )  # fmt: skip

    def dot_product_attention(inputs, outputs) -> int:  # of the attention stem
        query, key, value = map(_shape, inputs[:3])
        return prod(query) * key[-2] + prod(query[:-1]) * prod(value[-2:])

    return {
        'sasa_det::local_attention': local_attention,
        'aten::scaled_dot_product_attention': dot_product_attention,
    }


def _shape(value) -> Sequence[int]:
    return value.type().sizes()


def _is_given(value) -> bool:
    return value.type().kind() != 'NoneType'


def count_layer_macs(layer, input_shape: Sequence[int]) -> int:
    """Count the multiply-adds of a layer: its projections and its attention, without biases and pooling.

    Args:
        layer: A :class:`~sasa_det.layers.LocalSelfAttention2d`.
        input_shape: (B, C, H, W) of its input.

    Examples:
        >>> from sasa_det.layers import LocalSelfAttention2d
        >>> layer = LocalSelfAttention2d(8, kernel_size=3, num_heads=2, position='none')
        >>> count_layer_macs(layer, (1, 8, 10, 10)) == 100 * 3 * 8 * 8 + 14400
        True
    """
    batch, _, *size = input_shape
    query_size = strided_size(size, layer.stride if layer.downsample == 'query' else 1)

    def weights(*projections) -> int:
        # There may be no such projection, and a constant query has no weight.
        given = (getattr(each, 'weight', None) for each in projections)
        return sum(weight.numel() for weight in given if weight is not None)

    macs = prod(query_size) * weights(layer.query, layer.out_proj)
    macs += prod(size) * weights(layer.key, layer.value)
    return batch * macs + count_macs(
        (batch, layer.hidden_channels, *query_size),
        layer.kernel_size,
        has_key=layer.key is not None,
        has_positions=layer.rel_row is not None,
    )


def count_for_thop(layer, inputs, output) -> None:
    """Count a layer for thop: ``thop.profile(..., custom_ops={LocalSelfAttention2d: count_for_thop})``.

    Args:
        layer: The :class:`~sasa_det.layers.LocalSelfAttention2d`.
        inputs: Its inputs.
        output: Its output.
    """
    layer.total_ops += count_layer_macs(layer, inputs[0].shape)


def count_for_ptflops(layer, inputs, output) -> None:
    """Count a layer for ptflops, in ``custom_modules_hooks={LocalSelfAttention2d: count_for_ptflops}``.

    Args:
        layer: The :class:`~sasa_det.layers.LocalSelfAttention2d`.
        inputs: Its inputs.
        output: Its output.
    """
    layer.__flops__ += count_layer_macs(layer, inputs[0].shape)
