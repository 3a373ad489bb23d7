"""The projections of a map's channels: plain ``nn.Linear`` modules, so that other tools know them."""

import torch
from torch import Tensor, nn

from ..ops.project import project


def new_projection(in_channels: int, out_channels: int, bias: bool) -> nn.Linear:
    """Make a projection whose weights are still to be drawn, by :func:`draw`.

    Not an ``nn.Conv2d``: detectors initialise those by a rule of their own (RetinaHead: N(0, 0.01)), under
    which attention would start as a plain average.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of the result.
        bias: Whether to add a learned bias.

    Examples:
        >>> new_projection(8, 16, bias=False).weight.shape
        torch.Size([16, 8])
    """
    device = torch.empty(0).device  # the one that a `with torch.device(...)` asks for
    return nn.utils.skip_init(nn.Linear, in_channels, out_channels, bias=bias, device=device)


def draw(projection: nn.Linear, std: float) -> None:
    """Draw a projection's weight from N(0, std**2) and set its bias to zero.

    Args:
        projection: The projection.
        std: Standard deviation of the weight.
    """
    nn.init.normal_(projection.weight, std=std)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)


class ConstantProjection(nn.Module):
    """Give every pixel the same learned channels: a projection of nothing but its bias.

    Args:
        out_channels: Channels of the result.

    Shape:
        (..., in_channels) to (..., out_channels), as of an ``nn.Linear``.

    Examples:
        >>> project_by(ConstantProjection(16), torch.zeros(2, 8, 4, 5)).shape
        torch.Size([2, 16, 4, 5])
    """

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Repeat the channels for each pixel; no memory is taken."""
        # A view of a parameter says that it requires a gradient even where none is recorded. torch's counter of
        # FLOPs then looks for what would compute it.
        bias = self.bias if torch.is_grad_enabled() else self.bias.detach()
        return bias.expand(x.shape[:-1] + bias.shape)


def is_plain(projection: nn.Module) -> bool:
    """Say whether nobody would notice that a projection's weight is read and the module not called.

    Hooks, parametrisations, pruning, adapters such as LoRA, and quantised modules want the call.

    Args:
        projection: What stands in for the projection.

    Examples:
        >>> projection = nn.Linear(8, 8)
        >>> is_plain(projection), is_plain(nn.utils.parametrizations.spectral_norm(projection))
        (True, False)
    """
    return (
        type(projection) is nn.Linear
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
        and not projection._backward_hooks
        and not projection._backward_pre_hooks
        and 'weight' in projection._parameters
        and 'forward' not in projection.__dict__
    )


def project_by(projection: nn.Module, x: Tensor) -> Tensor:
    """Project a map, by calling the projection where somebody wants the call.

    Args:
        projection: Takes channels last, as an ``nn.Linear`` does.
        x: (B, in_channels, H, W).

    Returns:
        (B, out_channels, H, W).

    Examples:
        >>> project_by(new_projection(8, 16, bias=True), torch.zeros(2, 8, 4, 5)).shape
        torch.Size([2, 16, 4, 5])
    """
    if is_plain(projection):
        return project(x, projection.weight, projection.bias)
    return projection(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
