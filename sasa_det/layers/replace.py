"""How convolutions of any model are replaced by attention, by name."""

from typing import Dict, List, Mapping

from torch import nn

from .attn_cfg import ARGUMENTS, check_keys, naming
from .local_self_attention import LocalSelfAttention2d


def replace_convolutions(
    model: nn.Module, attention: Mapping[str, Mapping]
) -> Dict[str, nn.Module]:
    """Put attention, with new weights, in the place of convolutions of a model.

    Args:
        model: The model; changed in place.
        attention: By the convolution's name in ``model.named_modules()``, the arguments of
            :class:`LocalSelfAttention2d` beside channels, stride and dilation.

    Returns:
        The new modules, by name.

    Raises:
        ValueError: A name is no convolution's, or an argument is not accepted; names it.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        >>> _ = replace_convolutions(model, {'0': dict(kernel_size=5, num_heads=4)})
        >>> type(model[0]).__name__
        'LocalSelfAttention2d'
    """
    found = dict(model.named_modules(remove_duplicate=False))
    new = {}
    for name, attn_cfg in attention.items():
        conv = found.get(name)
        if not isinstance(conv, nn.Conv2d):
            what = 'nothing' if conv is None else f'a {type(conv).__name__}'
            raise ValueError(f'{name} must name a convolution of the model, but names {what}')
        with naming(name):
            new[name] = replacement(conv, attn_cfg)
        put(model, name, new[name])
    return new


def replacement(conv: nn.Conv2d, attn_cfg: Mapping) -> LocalSelfAttention2d:
    """Build what takes a convolution's place, with new weights.

    Args:
        conv: The convolution, square and with one stride and one dilation.
        attn_cfg: See :func:`replace_convolutions`.

    Raises:
        ValueError: An argument is not accepted.

    Examples:
        >>> conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        >>> replacement(conv, dict(num_heads=4)).stride
        2
    """
    check_keys('attn_cfg', dict(attn_cfg), ARGUMENTS)
    return LocalSelfAttention2d(
        conv.in_channels,
        conv.out_channels,
        stride=conv.stride,
        dilation=conv.dilation,
        **attn_cfg,
    )


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another one, wherever that is used.

    Args:
        model: The model; changed in place.
        name: The other module's name in ``model.named_modules()``.
        module: The new one.
    """
    old = model.get_submodule(name)
    for alias in _names_of(model, old):
        parent, _, key = alias.rpartition('.')
        setattr(model.get_submodule(parent), key, module)


def _names_of(model: nn.Module, module: nn.Module) -> List[str]:
    return [name for name, each in model.named_modules(remove_duplicate=False) if each is module]
