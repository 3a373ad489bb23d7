"""Which backend runs: which are available, which support an input, which one 'auto' takes."""

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Dict, List, Optional

from torch import Tensor

from ..window import Window
from .everywhere import Everywhere

logger = logging.getLogger('sasa_det')

# Fastest first: 'auto' takes the first that has no objection.
FUSED = ('cuda', 'triton', 'native', 'eager')
BACKENDS = ('auto', 'reference', *FUSED[::-1])
# The only device type that a backend supports. For others 'auto' does not even import the backend:
# its imports may take seconds, or fail.
DEVICES = {'cuda': 'cuda', 'triton': 'cuda', 'native': 'cpu'}


def available_backends() -> Dict[str, Optional[str]]:
    """Say which backends this installation has.

    Returns:
        Each backend's name with None if it can be used, else the reason why not.

    Examples:
        >>> available_backends()['eager'] is None
        True
    """
    reasons = {'reference': None}
    reasons.update((name, _missing(name)) for name in FUSED)
    return reasons


@cache
def _module(name: str):
    """Import a backend; None if this version of the package lacks it."""
    if find_spec(f'{__package__}.{name}') is None:
        return None
    return import_module(f'.{name}', __package__)


def _missing(name: str) -> Optional[str]:
    """Say why a backend cannot be used here at all; None if it can."""
    module = _module(name)
    return f'this version of sasa_det has no {name} kernels' if module is None else module.missing()


def logs_choices() -> bool:
    """Say whether each choice of 'auto' is logged.

    Examples:
        >>> logs_choices()
        False
    """
    return logger.isEnabledFor(logging.DEBUG)


@cache
def _warn_once(why: str) -> None:
    """Say that tiled PyTorch computes where there would be kernels; it may take many times as long."""
    logger.warning('local_attention computes in plain PyTorch, which is slow: %s', why)


def choose_backend(
    requested: str, query: Tensor, window: Window, has_key: bool = True, has_rel: bool = True
):
    """Return the backend that computes this input, with its functions ``forward`` and ``backward``.

    Args:
        requested: 'auto', or a backend's name, which never falls back.
        query: The query, (B, C, H, W).
        window: The attention's options.
        has_key: Whether there are keys.
        has_rel: Whether there are relative positions.

    Raises:
        RuntimeError: The backend asked for cannot compute this; lists every reason.
    """
    refusals: List[str] = []
    for name in FUSED if requested == 'auto' else (requested,):
        device = DEVICES.get(name)
        if requested == 'auto' and device not in (None, query.device.type):
            reason = f'it computes on {device}, but query is on {query.device}'
        else:
            reason = _missing(name) or _module(name).refuse(query, window)
            if reason is None and requested == 'auto' and name == 'cuda':
                reason = _module(name).distrust(query, window, has_key, has_rel)
        if reason is None:
            if requested == 'auto' and logs_choices():
                others = ''.join(f'; not {refusal}' for refusal in refusals)
                logger.debug('local_attention on %s takes %s%s', query.device, name, others)
            if requested == 'auto' and name == 'eager' and query.device.type in DEVICES.values():
                slow = [
                    each
                    for each in refusals
                    if DEVICES[each.partition(':')[0]] == query.device.type
                ]
                _warn_once('; '.join(slow))
            module = _module(name)
            strides = window.stride <= getattr(module, 'LARGEST_STRIDE', 1)
            return module if strides else Everywhere(module)
        refusals.append(f'{name}: {reason}')
    raise RuntimeError(
        f'local_attention: backend={requested!r} cannot be used: ' + '; '.join(refusals)
    )
