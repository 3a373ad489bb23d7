"""How local attention is written as one ONNX node, ``sasa_det::LocalAttention``.

``csrc/local_attention.cpp`` is the node's implementation for onnxruntime. Its first input holds queries, keys
and values as one projection gives them. So no node splits or copies maps. With a stride, queries are
projections of fewer pixels, and are an input of their own. The projection becomes a 1x1 convolution, which adds
the bias in the same pass.
"""

import operator
from typing import Optional

import torch
from onnx.defs import OpSchema
from onnxscript import FLOAT
from onnxscript.values import Op, Opset
from torch import Tensor, fx

from ..ops.torch_library import register_fake

aten = torch.ops.aten

# Stands for the ONNX node in a program of torch.export. It is traced and translated, but never computed.
_LIB = torch.library.Library('sasa_det_onnx', 'DEF')
_LIB.define(
    'local_attention(Tensor maps, Tensor? rel_row, Tensor? rel_col, bool has_key, int kernel_size, '
    'int num_heads, int dilation, str border, float scale, int stride=1, Tensor? query=None) -> Tensor'
)
PACKED_ATTENTION = torch.ops.sasa_det_onnx.local_attention.default


@register_fake('sasa_det_onnx::local_attention', lib=_LIB)
def _fake(maps: Tensor, rel_row, rel_col, has_key: bool, *options) -> Tensor:
    if len(options) > 6:
        return torch.empty_like(options[-1])
    batch, channels, height, width = maps.shape
    return maps.new_empty(batch, channels // (3 if has_key else 2), height, width)


def _schema() -> OpSchema:
    optional = OpSchema.FormalParameterOption.Optional
    tables = [
        OpSchema.FormalParameter(name, 'T', param_option=optional)
        for name in ('rel_row', 'rel_col', 'query')
    ]
    kinds = dict(
        has_key='INT',
        kernel_size='INT',
        num_heads='INT',
        dilation='INT',
        border='STRING',
        scale='FLOAT',
    )
    return OpSchema(
        'LocalAttention',
        'sasa_det',
        1,
        inputs=[OpSchema.FormalParameter('maps', 'T'), *tables],
        outputs=[OpSchema.FormalParameter('output', 'T')],
        type_constraints=[('T', ['tensor(float)'], 'What the library computes.')],
        attributes=[
            OpSchema.Attribute(name, getattr(OpSchema.AttrType, kind))
            for name, kind in kinds.items()
        ]
        + [OpSchema.Attribute('stride', OpSchema.AttrType.INT, required=False)],
    )


_NODE = Op(Opset('sasa_det', 1), 'LocalAttention', _schema())


def packed_attention(
    maps: FLOAT,
    rel_row: Optional[FLOAT],
    rel_col: Optional[FLOAT],
    has_key: bool,
    kernel_size: int,
    num_heads: int,
    dilation: int,
    border: str,
    scale: float,
    stride: int = 1,
    query: Optional[FLOAT] = None,
):
    """Write the operator that :func:`pack` has put into a program as its ONNX node.

    Args:
        maps: A value in the graph, (B, 3 C, H, W): queries, keys and values; without keys (B, 2 C, H, W). With
            a stride there are no queries in it.
        rel_row: (num_heads or 1, d/2, k), or None.
        rel_col: As rel_row.
        has_key: Whether maps has keys.
        kernel_size, num_heads, dilation, border, scale: See :func:`sasa_det.ops.local_attention`.
        stride: Likewise, up to 8.
        query: The queries, where there is a stride.

    Returns:
        The output (B, C, H, W), of a stride's pixels.
    """
    # Without a stride the node is as it was before there were any, and older libraries take it.
    strided = () if query is None else (query,)
    return _NODE(
        maps,
        rel_row,
        rel_col,
        *strided,
        **({} if query is None else dict(stride=stride)),
        has_key=int(has_key),
        kernel_size=kernel_size,
        num_heads=num_heads,
        dilation=dilation,
        border=border,
        scale=scale,
    )


def pack(program: torch.export.ExportedProgram) -> None:
    """Rewrite a program for ONNX, in place: one operator per attention, and convolutions as projections.

    Args:
        program: As ``export_program`` in ``to_onnx.py`` returns it.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.sasa_det.local_attention.default:
            _pack_attention(graph, node)
        elif node.target is aten.unflatten.int:
            _write_as_convolution(graph, node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _pack_attention(graph: fx.Graph, node: fx.Node) -> None:
    """Give the operator the map that queries, keys and values are chunks of; else concatenate them."""
    *maps, rel_row, rel_col = node.args[:5]
    options = node.args[5:10]  # without the backend
    stride = node.args[11:]  # where there is one
    has_key = maps[1] is not None
    strided = (*stride, maps.pop(0)) if stride else ()
    maps = [each for each in maps if each is not None]
    chunks = maps[0].args[0] if maps[0].target is operator.getitem else None
    whole = _is(chunks, aten.chunk.default) and chunks.args[1:] == (len(maps), 1)
    in_order = all(
        _is(each, operator.getitem) and each.args == (chunks, at) for at, each in enumerate(maps)
    )
    with graph.inserting_before(node):
        if whole and in_order:
            packed = chunks.args[0]
        else:
            packed = graph.call_function(aten.cat.default, (maps, 1))
        arguments = (packed, rel_row, rel_col, has_key, *options, *strided)
        attention = graph.call_function(PACKED_ATTENTION, arguments)
    for result in list(node.users):
        if result.args[1] == 0:  # the other is for a backward
            attention.meta = result.meta
            result.replace_all_uses_with(attention)


def _write_as_convolution(graph: fx.Graph, node: fx.Node) -> None:
    """Turn what ``project`` in ``projected_attention.py`` does, a product of matrices, into a convolution."""
    product = node.args[0]
    if _is(product, aten.bmm.default):
        weight, x, bias = *product.args, None
    elif _is(product, aten.baddbmm.default):
        bias, weight, x = product.args
    else:
        return
    if not (_is(weight, aten.expand.default) and _is(x, aten.flatten.using_ints)):
        return
    if bias is not None and not _is(bias, aten.unsqueeze.default):
        return
    with graph.inserting_before(node):
        kernel = graph.call_function(aten.unsqueeze.default, (weight.args[0], 2))
        kernel = graph.call_function(aten.unsqueeze.default, (kernel, 3))
        bias = None if bias is None else bias.args[0]
        convolution = graph.call_function(aten.conv2d.default, (x.args[0], kernel, bias))
    convolution.meta = node.meta
    node.replace_all_uses_with(convolution)


def _is(node, target) -> bool:
    return isinstance(node, fx.Node) and node.target is target
