"""Attention's FLOPs for mmengine's analysis, which leaves out operators that it does not know.

torch.utils.flop_counter has its formula beside the operator, in :mod:`sasa_det.ops.torch_library`.
"""

from math import prod

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import bmm_flop_jit, get_shape

from ..ops.torch_library import count_macs


def local_attention_flop_jit(inputs, outputs) -> int:
    """Count the multiply-adds, one each as mmengine counts them, of a traced local attention.

    Args:
        inputs: The traced operator's arguments (list of torch._C.Value).
        outputs: Its results; not needed.
    """
    query, key, _, rel_row, _, kernel_size = inputs[:6]
    return count_macs(
        get_shape(query), kernel_size.toIValue(), has_key=_is_given(key),
        has_positions=_is_given(rel_row),
    )  # fmt: skip


def dot_product_attention_flop_jit(inputs, outputs) -> int:
    """Count the multiply-adds of torch's own attention, which the attention stem calls.

    Args:
        inputs: The traced operator's arguments, queries, keys and values first.
        outputs: Its result; not needed.
    """
    query, key, value = (get_shape(each) for each in inputs[:3])
    return prod(query) * key[-2] + prod(query[:-1]) * prod(value[-2:])


def _is_given(value) -> bool:
    return value.type().kind() != 'NoneType'


def register() -> None:
    """Make every FlopAnalyzer of mmengine (mmdet's get_flops.py as well) count attention.

    And the projections before it: mmengine knows bmm, but not bmm with a bias.
    """
    known = complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
    known['sasa_det::local_attention'] = local_attention_flop_jit
    known.setdefault('aten::scaled_dot_product_attention', dot_product_attention_flop_jit)
    known.setdefault('aten::baddbmm', lambda inputs, outputs: bmm_flop_jit(inputs[1:3], outputs))
