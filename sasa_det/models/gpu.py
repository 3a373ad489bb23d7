"""What a detector of mmdet needs on an NVIDIA GPU: channels_last, and losses that take bfloat16."""

from typing import Any, List

import torch
from mmdet.models.losses import FocalLoss
from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor
from torch import Tensor, nn

# They call ops of mmcv, whose CUDA kernels take float32 and float16 only. mmdet's extractors also round the
# regions to the type of the maps, and bfloat16 cannot hold a coordinate above 256 to the pixel.
NEED_FLOAT32 = (FocalLoss, BaseRoIExtractor)


def prepare_for_gpu(model: nn.Module) -> None:
    """Set a detector up for an NVIDIA GPU: fast layouts, and float32 where mmcv takes no bfloat16.

    - Weights become channels_last, and so do the images that the data preprocessor returns. All maps between
      follow.
    - Focal losses and the extractors of regions get float32 where they would get bfloat16.

    Values do not change. A second call changes nothing.

    Args:
        model: A detector, or a classifier of mmpretrain; not its data-parallel wrapper.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> prepare_for_gpu(model)
        >>> model[0].weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    model.to(memory_format=torch.channels_last)
    preprocessor = getattr(model, 'data_preprocessor', None)
    if preprocessor is not None and _lay_out not in preprocessor._forward_hooks.values():
        preprocessor.register_forward_hook(_lay_out)
    for module in model.modules():
        if isinstance(module, NEED_FLOAT32):
            compute_in_float32(module)


def compute_in_float32(module: nn.Module) -> None:
    """Give a module float32 in the place of bfloat16, as under autocast.

    Args:
        module: Gets a forward pre-hook, unless it has it.

    Examples:
        >>> loss = nn.Identity()
        >>> compute_in_float32(loss)
        >>> loss(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    if _cast not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_cast, with_kwargs=True)


def without_bfloat16(model: nn.Module) -> List[str]:
    """Name the modules that cannot compute in bfloat16 on a GPU, not even after :func:`prepare_for_gpu`.

    Args:
        model: A detector.

    Returns:
        Name and type of each, such as 'backbone.layer2.0.conv2 (ModulatedDeformConv2dPack)'.

    Examples:
        >>> without_bfloat16(nn.Conv2d(3, 8, 3))
        []
    """
    in_float32 = [
        name for name, module in model.named_modules() if isinstance(module, NEED_FLOAT32)
    ]
    return [
        f'{name} ({type(module).__name__})'
        for name, module in model.named_modules()
        if type(module).__module__.startswith('mmcv.ops.')
        and not any(name.startswith(f'{outer}.') for outer in in_float32)
    ]


def _lay_out(preprocessor: nn.Module, args: tuple, output: dict) -> dict:
    return {**output, 'inputs': _in_channels_last(output['inputs'])}


def _in_channels_last(images: Any) -> Any:
    if isinstance(images, dict):  # semi-supervised: by the branch
        return {branch: _in_channels_last(each) for branch, each in images.items()}
    if isinstance(images, Tensor) and images.dim() == 4:
        return images.contiguous(memory_format=torch.channels_last)
    return images


def _cast(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
    return tuple(map(_to_float32, args)), {name: _to_float32(x) for name, x in kwargs.items()}


def _to_float32(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return type(x)(map(_to_float32, x))
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x
