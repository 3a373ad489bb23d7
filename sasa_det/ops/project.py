"""How the channels of a map are projected: on the CPU in float32 by C++ kernels, else by PyTorch.

The kernels, ``csrc/projection.h``, compute three matrix products: the projection, and the gradients of the map
and of the weight. PyTorch's are up to three times as slow on some processors.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import wrap_torch_function

from .autograd import is_transformed
from .huge_pages import with_huge_pages
from .native_library import load
from .torch_library import is_autocast_enabled

_native, _ = load()
# Subclasses of Tensor, such as torch's fake tensors, may have no memory.
_PLAIN = (Tensor, torch.nn.Parameter)


# torch.fx and other tensor-likes see one call, and not the choices, which read what only a tensor knows.
@wrap_torch_function(lambda x, *_, **__: (x,))
def project(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Project every pixel's channels, as a 1x1 convolution does.

    Args:
        x: (B, in_channels, H, W).
        weight: (out_channels, in_channels).
        bias: (out_channels,), or None.

    Returns:
        (B, out_channels, H, W), in the memory layout of x.

    Examples:
        >>> project(torch.zeros(2, 8, 4, 5), torch.zeros(16, 8)).shape
        torch.Size([2, 16, 4, 5])
    """
    inputs = (x, weight, bias)
    if is_followed() or not takes(*inputs):
        return _by_pytorch(*inputs)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs):
        return _Project.apply(*inputs)
    return torch.ops.sasa_det_native.project(*inputs)


def project_backward(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: Tuple[bool, bool, bool]
) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Compute the gradients of :func:`project`; autograd does not see how.

    Args:
        grad: Gradient of the result.
        x: The map.
        weight: (out_channels, in_channels).
        wanted: Which of the gradients of x, weight and bias to compute.

    Returns:
        The gradients, None for those that are not wanted.

    Examples:
        >>> x, weight = torch.ones(1, 1, 2, 2), torch.tensor([[3.0]])
        >>> [each.tolist() for each in project_backward(x, x, weight, (False, True, True))[1:]]
        [[[4.0]], [4.0]]
    """
    if takes(grad, weight, None) and takes(x, weight, None):
        kernels = torch.ops.sasa_det_native
        return (
            kernels.project_back(grad, weight) if wanted[0] else None,
            kernels.weight_gradient(grad, x) if wanted[1] else None,
            grad.sum((0, 2, 3)) if wanted[2] else None,
        )
    if not _is_one_product(x):
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight[:, :, None, None], [len(weight)],
            [1, 1], [0, 0], [1, 1], False, [0, 0], 1, list(wanted),
        )  # fmt: skip
        return grads[0], None if grads[1] is None else grads[1].view_as(weight), grads[2]
    flat, grad = x.flatten(2), grad.flatten(2)
    back = weight.t().expand(x.shape[0], -1, -1)
    return (
        torch.bmm(back, grad).view_as(x) if wanted[0] else None,
        torch.bmm(grad, flat.transpose(1, 2)).sum(0) if wanted[1] else None,
        grad.sum((0, 2)) if wanted[2] else None,
    )


def is_followed() -> bool:
    """Say whether a tracer, a compiler, a transform or forward-mode AD is at work.

    They do not see into an ``autograd.Function``, nor into an ``out=``.

    Examples:
        >>> is_followed()
        False
    """
    dual = torch.autograd.forward_ad._current_level >= 0
    return torch.jit.is_tracing() or _is_compiling() or is_transformed() or dual


def _is_compiling() -> bool:
    if hasattr(torch, 'compiler') and hasattr(torch.compiler, 'is_compiling'):
        return torch.compiler.is_compiling()
    return torch._dynamo.is_compiling()  # torch < 2.3


def takes(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> bool:
    """Say whether the C++ kernels take a projection: of plain tensors, in float32, on the CPU.

    Args:
        x: The map.
        weight: The weight.
        bias: The bias, or None.

    Examples:
        >>> takes(torch.zeros(1, 8, 4, 5).double(), torch.zeros(16, 8).double(), None)
        False
    """
    given = [each for each in (x, weight, bias) if each is not None]
    return (
        _native is not None
        and all(
            type(each) in _PLAIN and each.is_cpu and each.dtype == torch.float32 for each in given
        )
        and not is_autocast_enabled('cpu')
    )


def _is_one_product(x: Tensor) -> bool:
    # On the CPU one matrix product per image is faster than oneDNN's 1x1 convolution.
    return x.is_cpu and x.is_contiguous()


def _by_pytorch(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    if not _is_one_product(x):
        return F.conv2d(x, weight[:, :, None, None], bias)
    images, flat, to = weight.expand(x.shape[0], -1, -1), x.flatten(2), {}
    # Outside of autograd, into huge pages. torch < 2.4 has other names for autocast's state, and cannot count
    # the FLOPs of an `out=`.
    if not torch.is_grad_enabled() and not is_followed() and hasattr(torch, 'get_autocast_dtype'):
        if not torch.is_autocast_enabled('cpu') and type(x) is Tensor:
            to = dict(out=with_huge_pages(x.new_empty(x.shape[0], len(weight), flat.shape[2])))
    if bias is None:
        y = torch.bmm(images, flat, **to)
    else:
        y = torch.baddbmm(bias[:, None], images, flat, **to)
    return y.unflatten(2, x.shape[2:])


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return torch.ops.sasa_det_native.project(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        if not torch.is_grad_enabled() and not is_transformed(grad):
            return project_backward(grad, *inputs[:2], ctx.needs_input_grad)
        # With create_graph, or under torch.func, somebody may differentiate what comes out.
        with torch.enable_grad():
            y = _by_pytorch(*inputs)
            wanted = [each for each, needed in zip(inputs, ctx.needs_input_grad) if needed]
            grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)
