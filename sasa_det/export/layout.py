"""How a detector computes in channels_last, for inference on a CPU."""

from copy import deepcopy

import torch
from torch import nn


def to_channels_last(detector: nn.Module) -> nn.Module:
    """Lay weights and maps of a detector out in channels_last, for inference.

    Values do not change, but for the order in which sums are rounded. On a GPU,
    :func:`sasa_det.models.gpu.prepare_for_gpu` does the same and more, for training too.

    Args:
        detector: A detector of mmdet, or any other module that takes images. It is not changed.

    Returns:
        A copy in eval mode.

    Examples:
        >>> model = to_channels_last(nn.Conv2d(3, 8, 3))
        >>> model(torch.zeros(1, 3, 8, 8)).is_contiguous(memory_format=torch.channels_last)
        True
    """
    detector = deepcopy(detector).eval().to(memory_format=torch.channels_last)
    getattr(detector, 'backbone', detector).register_forward_pre_hook(_lay_out)
    return detector


def _lay_out(module: nn.Module, args: tuple) -> tuple:
    images, *others = args
    return (images.contiguous(memory_format=torch.channels_last), *others)
