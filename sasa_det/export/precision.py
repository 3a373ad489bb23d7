"""How a detector computes in lower precision than float32, for inference."""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any, List, Optional

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from torch import Tensor, nn

from ..evaluation.attention_maps import attention_layers

PRECISIONS = ('bfloat16', 'int8')
# As Linux calls them: of x86's vectors, of x86's matrix units, of ARM.
BFLOAT16_FLAGS = {'avx512_bf16', 'amx_bf16', 'bf16'}
CPUINFO = Path('/proc/cpuinfo')


def lower_precision(detector: nn.Module, precision: str) -> nn.Module:
    """Have a detector compute in lower precision, for inference.

    Args:
        detector: A detector of mmdet with one or two stages, whose dense head is a BaseDenseHead. It is not
            changed. :func:`~sasa_det.export.fuse.fuse` comes first, if at all.
        precision: 'bfloat16': backbone, neck and dense head have weights and maps of 16 bits. What they find is
            decoded and suppressed in float32, and a second stage computes in float32. 'int8': the projections
            of attention layers multiply weights of 8 bits, quantised per channel, by maps that are quantised
            at each call; by ``torch.ao.quantization.quantize_dynamic``. All else stays in float32.

    Returns:
        A copy in eval mode, which cannot be trained.

    Raises:
        ValueError: The precision is not known, the detector is of another kind, or no layer of it attends and
            precision is 'int8'.
        RuntimeError: The device does not have the arithmetic, as :func:`why_no_bfloat16` says beforehand.
            Or this torch has no dynamic quantisation, which its authors will move to another package.

    Examples:
        >>> lower_precision(nn.Conv2d(3, 8, 3), 'float8')
        Traceback (most recent call last):
            ...
        ValueError: precision must be one of ('bfloat16', 'int8'), but is 'float8'
    """
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be one of {PRECISIONS}, but is {precision!r}')
    on_cpu = all(each.device.type == 'cpu' for each in detector.parameters())
    if precision == 'int8':
        if not on_cpu:
            raise RuntimeError("precision='int8' is for CPUs: call detector.cpu() first")
        return _quantise(detector)
    missing = why_no_bfloat16() if on_cpu else None
    if missing:
        raise RuntimeError(f'{missing}: float32 is faster here')
    return _to_bfloat16(detector)


def why_no_bfloat16() -> Optional[str]:
    """Say why this CPU does not compute in bfloat16; None if it does.

    torch computes in bfloat16 on any CPU. Where it has to convert numbers one by one, that is slower than
    float32.

    Examples:
        >>> why_no_bfloat16() in (None, f'this CPU has none of {sorted(BFLOAT16_FLAGS)}')
        True
    """
    flags = set(CPUINFO.read_text().split()) if CPUINFO.is_file() else set()
    return None if flags & BFLOAT16_FLAGS else f'this CPU has none of {sorted(BFLOAT16_FLAGS)}'


def _to_bfloat16(detector: nn.Module) -> nn.Module:
    heads = _dense_heads(detector)
    detector = deepcopy(detector).eval().requires_grad_(False)
    heads = [getattr(detector, name) for name in heads]
    features = [detector.backbone, *([detector.neck] if detector.with_neck else ())]
    for part in (*features, *heads):
        part.to(torch.bfloat16)
        part.register_forward_pre_hook(_give_bfloat16)
    # mmdet decodes in the type of what the head gives, and regions are cut out in that of the maps.
    for part in (*heads, *(features[-1:] if isinstance(detector, TwoStageDetector) else ())):
        part.register_forward_hook(_return_float32)
    return detector


def _dense_heads(detector: nn.Module) -> List[str]:
    """Name the dense heads of a detector, whose outputs are decoded by methods of their own.

    Raises:
        ValueError: The detector is of another kind.
    """
    name = type(detector).__name__
    if not isinstance(detector, (SingleStageDetector, TwoStageDetector)):
        raise ValueError(
            f"precision='bfloat16' takes mmdet's detectors of one and two stages, but not {name}"
        )
    found = [
        head for head in ('bbox_head', 'rpn_head') if getattr(detector, head, None) is not None
    ]
    for head in found:
        if not isinstance(getattr(detector, head), BaseDenseHead):
            kind = type(getattr(detector, head)).__name__
            raise ValueError(
                f"precision='bfloat16' takes a BaseDenseHead, but {name}.{head} is a {kind}"
            )
    return found


def _give_bfloat16(module: nn.Module, args: tuple) -> tuple:
    return _cast(args, torch.bfloat16)


def _return_float32(module: nn.Module, args: tuple, output: Any) -> Any:
    return _cast(output, torch.float32)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, (tuple, list)):
        return type(x)(_cast(each, dtype) for each in x)
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _quantise(detector: nn.Module) -> nn.Module:
    try:
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    except ImportError as error:
        raise RuntimeError(
            f"precision='int8' takes torch.ao.quantization, which torch {torch.__version__} does not have"
        ) from error
    detector = deepcopy(detector).eval().requires_grad_(False)
    names = [
        f'{layer}.{name}'
        for layer, module in attention_layers(detector).items()
        for name, each in module.named_children()
        if type(each) is nn.Linear
    ]
    if not names:
        raise ValueError(
            "precision='int8' is for the projections of attention layers, of which there are none"
        )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that torch.ao.quantization will move to another package
        return quantize_dynamic(
            detector, dict.fromkeys(names, per_channel_dynamic_qconfig), inplace=True
        )
