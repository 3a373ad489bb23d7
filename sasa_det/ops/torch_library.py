"""The torch.library op behind ``local_attention``: schema, fake, autograd, autocast, FLOPs.

Low-level registration rather than ``torch.library.custom_op``, which torch 2.2 and 2.3 lack.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

from _sasa_det_startup import when_imported

from .arguments import check_tensors, check_window
from .autograd import LocalAttention, below_autograd, is_transformed
from .backends import native
from .backends.choice import choose_backend, logs_choices
from .flop_counters import register_with_torch
from .window import Window, compute_dtype, empty_logsumexp, empty_output

_LIB = torch.library.Library('sasa_det', 'DEF')
_INPUTS = 'Tensor query, Tensor? key, Tensor value, Tensor? rel_row, Tensor? rel_col'
_OPTIONS = 'int kernel_size, int num_heads, int dilation, str border, float scale, str backend, int stride=1'
_LIB.define(f'local_attention({_INPUTS}, {_OPTIONS}) -> (Tensor output, Tensor logsumexp)')
_LIB.define(
    f'local_attention_backward(Tensor grad, {_INPUTS}, Tensor logsumexp, {_OPTIONS})'
    ' -> (Tensor, Tensor, Tensor, Tensor, Tensor)'
)
# The same, but it writes the gradients of the maps into given tensors, which saves the layer a copy.
_GRAD_MAPS = 'Tensor(a!) grad_query, Tensor(b!)? grad_key, Tensor(c!) grad_value'
_LIB.define(
    f'local_attention_backward_into(Tensor grad, {_INPUTS}, Tensor logsumexp, {_GRAD_MAPS}, {_OPTIONS})'
    ' -> (Tensor, Tensor)'
)

# Overloads rather than packets: a packet looks up its overload at each call.
ATTEND = torch.ops.sasa_det.local_attention.default
ATTEND_BACKWARD = torch.ops.sasa_det.local_attention_backward.default
ATTEND_BACKWARD_INTO = torch.ops.sasa_det.local_attention_backward_into.default


def _check_dtypes(query: Tensor, **others: Optional[Tensor]) -> None:
    # Here and not in local_attention, since autocast casts only after that.
    for name, x in others.items():
        if x is not None and x.dtype != query.dtype:
            raise TypeError(
                f'local_attention: {name} is {x.dtype}, and must be of the type of query, {query.dtype}'
            )


def _check_grad(name: str, x: Optional[Tensor], of: Optional[Tensor]) -> None:
    if (x is None) != (of is None):
        raise ValueError(f'local_attention: {name} must be there just where its input is')
    if x is None:
        return
    if x.shape != of.shape or x.dtype != of.dtype or x.device != of.device:
        raise ValueError(
            f'local_attention: {name} must be {tuple(of.shape)} in {of.dtype} on {of.device}, '
            f'but is {tuple(x.shape)} in {x.dtype} on {x.device}'
        )


def _check(query, key, value, rel_row, rel_col, *options) -> Window:
    """Check what the op was given: kernels read and write as it says, and exported graphs call it as it is."""
    check_window(*options)
    window = Window.of_op(*options)
    check_tensors(query, key, value, rel_row, rel_col, window)
    _check_dtypes(query, key=key, value=value, rel_row=rel_row, rel_col=rel_col)
    return window


def _check_logsumexp(x: Tensor, query: Tensor, window: Window) -> None:
    batch, _, height, width = query.shape
    shape, dtype = (batch, window.num_heads, height, width), compute_dtype(query.dtype)
    if x.shape != shape or x.dtype != dtype or x.device != query.device:
        raise ValueError(
            f'local_attention: logsumexp must be {shape} in {dtype} on {query.device}, '
            f'but is {tuple(x.shape)} in {x.dtype} on {x.device}'
        )


def _forward(query, key, value, rel_row, rel_col, *options):
    window, backend = _check(query, key, value, rel_row, rel_col, *options), options[5]
    run = choose_backend(backend, query, window, key is not None, rel_row is not None)
    return run.forward(query, key, value, rel_row, rel_col, window)


def _backward_into(grad, query, key, value, rel_row, rel_col, logsumexp, *maps_and_options):
    maps, options = maps_and_options[:3], maps_and_options[3:]
    window, backend = _check(query, key, value, rel_row, rel_col, *options), options[5]
    _check_logsumexp(logsumexp, query, window)
    # The kernels write wherever these say.
    _check_grad('grad', grad, query)
    for name, to, of in zip(('query', 'key', 'value'), maps, (query, key, value)):
        _check_grad(f'grad_{name}', to, of)
    run = choose_backend(backend, query, window, key is not None, rel_row is not None)
    inputs = (query, key, value, rel_row, rel_col)
    # A backward may well run within autocast, which has cast what it casts in the forward.
    with torch.autocast(query.device.type, enabled=False):
        grads = run.backward(grad, *inputs, logsumexp.contiguous(), maps, window)
    return _some(query, grads)


def _backward(grad, query, key, value, rel_row, rel_col, logsumexp, *options):
    maps = [None if x is None else empty_output(x) for x in (query, key, value)]
    tables = _backward_into(grad, query, key, value, rel_row, rel_col, logsumexp, *maps, *options)
    return *_some(query, maps), *tables


def _some(like, tensors) -> tuple:
    # A schema cannot declare a returned tensor optional.
    return tuple(like.new_empty(0) if x is None else x for x in tensors)


def _fake_forward(query, key, value, rel_row, rel_col, *options):
    window = Window.of_op(*options)
    check_tensors(query, key, value, rel_row, rel_col, window)
    _check_dtypes(query, key=key, value=value, rel_row=rel_row, rel_col=rel_col)
    return empty_output(query), empty_logsumexp(query, window.num_heads)


def _fake_backward(grad, query, key, value, rel_row, rel_col, logsumexp, *options):
    maps = (None if x is None else empty_output(x) for x in (query, key, value))
    return *_some(query, maps), *_fake_backward_into(grad, query, key, value, rel_row, rel_col)


def _fake_backward_into(grad, query, key, value, rel_row, rel_col, *others):
    tables = (
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (rel_row, rel_col)
    )
    return _some(query, tables)


def _differentiable(*args):
    # A Function takes a tenth of a small map's time, and records nothing when gradients are off. But it
    # also refuses forward-mode differentiation, which needs no grad mode.
    if torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0:
        return LocalAttention.apply(*args)
    return below_autograd(*args)


def _autocast(device_type: str):
    def cast_and_call(query, key, value, rel_row, rel_col, *options):
        inputs = cast(device_type, query, key, value, rel_row, rel_col)
        with torch.autocast(device_type, enabled=False):
            return ATTEND(*inputs, *options)

    return cast_and_call


def cast(device_type: str, *inputs: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    """Cast tensors as autocast does for this op; float64 stays, as in its own rule for convolutions.

    Args:
        device_type: Such as 'cpu' or 'cuda'.
        inputs: Tensors or None.
    """
    dtype = _autocast_dtype(device_type)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in inputs)


def attend(*args) -> Tuple[Tensor, Tensor]:
    """Call the op, also under the transforms of ``torch.func``, which do not see into it.

    Args:
        args: All of its arguments, in the order of its schema.

    Returns:
        The output, and the log-sum-exp for the backward.
    """
    if not is_transformed():
        return ATTEND(*args)
    # Before the dispatcher, as torch.func takes an autograd.Function only from Python.
    device = args[0].device.type
    if is_autocast_enabled(device):
        args = (*cast(device, *args[:5]), *args[5:])
    with torch.autocast(device, enabled=False):
        return LocalAttention.apply(*args)


def is_autocast_enabled(device_type: str) -> bool:
    """Say whether autocast is on for a type of device, such as 'cpu', in any version of torch."""
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.is_autocast_enabled(device_type)
    # torch < 2.4
    return torch.is_autocast_enabled() if device_type == 'cuda' else torch.is_autocast_cpu_enabled()


def _autocast_dtype(device_type: str) -> torch.dtype:
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.get_autocast_dtype(device_type)
    # torch < 2.4
    return (
        torch.get_autocast_gpu_dtype() if device_type == 'cuda' else torch.get_autocast_cpu_dtype()
    )


_LIB.impl('local_attention', _forward, 'CompositeExplicitAutograd')
_LIB.impl('local_attention_backward', _backward, 'CompositeExplicitAutograd')
_LIB.impl('local_attention_backward_into', _backward_into, 'CompositeExplicitAutograd')
native.take_over(logs_choices)
_LIB.impl('local_attention', _differentiable, 'Autograd')
_LIB.impl('local_attention', _autocast('cpu'), 'AutocastCPU')
_LIB.impl('local_attention', _autocast('cuda'), 'AutocastCUDA')
# torch before 2.4 has it by another name.
register_fake = getattr(torch.library, 'register_fake', None) or torch.library.impl_abstract
register_fake('sasa_det::local_attention')(_fake_forward)
register_fake('sasa_det::local_attention_backward')(_fake_backward)
register_fake('sasa_det::local_attention_backward_into')(_fake_backward_into)
# Only once somebody counts FLOPs: torch's counter imports Triton, which a CPU does not need.
when_imported('torch.utils.flop_counter', register_with_torch)
