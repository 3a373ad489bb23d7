"""Stand-alone self-attention as a layer."""

from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import check_window
from ..ops.geometry import Window
from ..ops.reference import attention_weights
from .position import check_sinusoidal_channels, sinusoidal_positions
from .projected_attention import project, projected_attention

POSITIONS = ('relative', 'absolute', 'none')
LOGITS = ('qk+qr', 'qk', 'qr')
# The head start of a window's centre row and column, in units of the logits' standard deviation.
CENTRE = 5.0


class Projection(nn.Module):
    """Project every pixel's channels: a 1x1 convolution that initialises itself.

    It is no ``nn.Conv2d``, because detectors initialise every ``nn.Conv2d`` inside them by a rule of
    their own (RetinaHead: N(0, 0.01)), under which attention would start out as a plain average.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of the result.
        bias: Whether to add a learned bias.
        std: Standard deviation of the initial weight.

    Example:
        >>> Projection(8, 16, bias=False, std=0.1)(torch.zeros(2, 8, 4, 5)).shape
        torch.Size([2, 16, 4, 5])
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, std**2) and set the bias to zero."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Project (B, in_channels, H, W) to (B, out_channels, H, W)."""
        return project(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Show the channels, as torch's layers do."""
        out_channels, in_channels = self.weight.shape
        return f'{in_channels}, {out_channels}, bias={self.bias is not None}'


class LocalSelfAttention2d(nn.Module):
    """Replace a spatial convolution by self-attention in a window around each pixel.

    Section 3.1 of `Stand-Alone Self-Attention in Vision Models <https://arxiv.org/abs/1906.05909>`_.
    The initial weights give logits of about unit variance for an input of unit variance, since the
    paper does not scale them by 1/sqrt(d).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; those of the input by default. Divisible by num_heads.
        kernel_size: Edge of the window in pixels, odd.
        num_heads: Number of attention heads.
        stride: Attention at every pixel, then average pooling over stride x stride, which is how the
            paper replaces a strided convolution. Output size ceil(H / stride), Conv2d's.
        dilation: Distance in pixels between neighbours in a window.
        bias: Add a bias to the projections (a key's would cancel in the softmax, so there is none).
            With relative positions the queries' starts out pointing at the centre of the window:
            the layer is close to a 1x1 convolution at first, where it would otherwise be a blur.
        position: 'relative': learned row and column offsets, the paper's choice; 'absolute':
            sinusoids added to the input (Table 5); 'none'.
        position_per_head: Learn offsets for each head rather than one set for all. The paper does not
            say; HaloNet, by the same authors, shares them.
        logits: 'qk+qr', 'qk' or 'qr' (Table 6). By default 'qk+qr' with relative positions, else 'qk'.
        border: 'zeros' or 'mask', see :func:`sasa_det.ops.local_attention`.
        scale: Factor of the logits. The paper has none.
        out_proj: Mix the heads by one more projection.
        value_std: Standard deviation of the initial value weights. The paper has 0.01 in detectors,
            whose layers are followed by batch normalisation; by default in_channels ** -0.5, which
            keeps the size of activations without it.
        backend: See :func:`sasa_det.ops.local_attention`.

    Shape:
        (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: An argument is not as above; names the argument, its value and what it may be.

    Example:
        >>> layer = LocalSelfAttention2d(16, 32, kernel_size=7, num_heads=4, stride=2)
        >>> layer(torch.zeros(2, 16, 25, 30)).shape
        torch.Size([2, 32, 13, 15])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Optional[int] = None,
        kernel_size: int = 7,
        num_heads: int = 8,
        stride: Union[int, Tuple[int, int]] = 1,
        dilation: Union[int, Tuple[int, int]] = 1,
        bias: bool = False,
        position: str = 'relative',
        position_per_head: bool = False,
        logits: Optional[str] = None,
        border: str = 'zeros',
        scale: float = 1.0,
        out_proj: bool = False,
        value_std: Optional[float] = None,
        backend: str = 'auto',
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        kernel_size = _as_one('kernel_size', kernel_size)
        stride, dilation = _as_one('stride', stride), _as_one('dilation', dilation)
        logits = _choose_logits(position, logits)
        check_window(kernel_size, num_heads, dilation, border, scale, backend)
        _check_channels(in_channels, out_channels, num_heads, position)
        if not isinstance(stride, int) or stride < 1:
            raise ValueError(f'stride must be an integer of at least 1, but is {stride!r}')
        if value_std is not None and not value_std > 0:
            raise ValueError(f'value_std must be a number above 0 or None, but is {value_std!r}')

        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.num_heads = num_heads
        self.stride = stride
        self.dilation = dilation
        self.position = position
        self.logits = logits
        self.border = border
        self.scale = scale
        self.backend = backend

        depth = out_channels // num_heads
        # Var(q.k) = d * Var(q) * Var(k) = 1 for an input of unit variance; the same for q.r.
        std = in_channels**-0.5 * depth**-0.25
        self.query = Projection(in_channels, out_channels, bias, std)
        self.key = Projection(in_channels, out_channels, False, std) if 'qk' in logits else None
        value_std = in_channels**-0.5 if value_std is None else value_std
        self.value = Projection(in_channels, out_channels, bias, value_std)
        self.out_proj = (
            Projection(out_channels, out_channels, bias, out_channels**-0.5) if out_proj else None
        )
        if 'qr' in logits:
            shape = (num_heads if position_per_head else 1, depth // 2, kernel_size)
            self.rel_row = nn.Parameter(torch.empty(shape))
            self.rel_col = nn.Parameter(torch.empty(shape))
        else:
            self.register_parameter('rel_row', None)
            self.register_parameter('rel_col', None)
        self._reset_positions()
        self._look_at_own_pixel()

    # What mmcv's ConvModule reads off the layer that it wraps.
    groups = 1
    transposed = False
    output_padding = 0

    @property
    def padding(self) -> int:
        """Pixels by which a window reaches out of the map; a convolution would pad by as many."""
        return self.dilation * (self.kernel_size // 2)

    def _reset_positions(self) -> None:
        if self.rel_row is not None:
            std = (self.out_channels // self.num_heads) ** -0.25
            nn.init.normal_(self.rel_row, std=std)
            nn.init.normal_(self.rel_col, std=std)

    def _look_at_own_pixel(self) -> None:
        """Have the biases of the queries favour a window's centre.

        Random logits of unit variance make attention a blur at first, and a stack of blurs loses
        what it should find before it has learnt to look. With the centre ahead of its row and column
        by CENTRE each, a layer starts close to a 1x1 convolution and widens as it learns.
        """
        if self.query.bias is None or self.rel_row is None:
            return
        # As large as a query's own entries, so that q.k gains unit variance, and no more, by it.
        entry = (self.out_channels // self.num_heads) ** -0.25
        nn.init.constant_(self.query.bias, entry)
        for table in (self.rel_row.data, self.rel_col.data):
            # To the bias, one number throughout, all offsets look alike but the centre.
            table -= table.mean(1, keepdim=True)
            table[:, :, self.kernel_size // 2] += CENTRE / (entry * table.shape[1])

    def init_weights(self) -> None:
        """Draw all weights anew; the name that mmengine and mmcv call it by."""
        for projection in (self.query, self.key, self.value, self.out_proj):
            if projection is not None:
                projection.reset_parameters()
        self._reset_positions()
        self._look_at_own_pixel()

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then pool where the layer has a stride."""
        if self.position == 'absolute':
            x = x + sinusoidal_positions(x)
        projections = [each for each in (self.query, self.key, self.value) if each is not None]
        x = projected_attention(
            x,
            [each.weight for each in projections],
            [each.bias for each in projections],
            self.rel_row,
            self.rel_col,
            kernel_size=self.kernel_size,
            num_heads=self.num_heads,
            dilation=self.dilation,
            border=self.border,
            scale=self.scale,
            backend=self.backend,
        )
        if self.out_proj is not None:
            x = self.out_proj(x)
        if self.stride > 1:
            # A last, partial window averages the pixels that it has: Conv2d's size, no dark edge.
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return x

    @torch.no_grad()
    def attention_weights(self, x: Tensor, points: Tensor) -> Tensor:
        """Compute where given query pixels look, before any pooling.

        Args:
            x: The layer's input (1, in_channels, H, W).
            points: (P, 2) row and column of the query pixels, in pixels of x.

        Returns:
            (P, num_heads, k, k), each k x k summing to one; with border='zeros' positions out of the
            map carry weight as well.

        Example:
            >>> layer = LocalSelfAttention2d(16, kernel_size=3, num_heads=4)
            >>> weights = layer.attention_weights(torch.randn(1, 16, 8, 8), torch.tensor([[4, 4]]))
            >>> weights.shape, bool(weights.sum((-2, -1)).allclose(torch.ones(1, 4)))
            (torch.Size([1, 4, 3, 3]), True)
        """
        if x.dim() != 4 or x.shape[0] != 1:
            raise ValueError(f'x must be one map (1, C, H, W), but is {tuple(x.shape)}')
        if self.position == 'absolute':
            x = x + sinusoidal_positions(x)
        window = Window(self.kernel_size, self.num_heads, self.dilation, self.border, self.scale)
        key = None if self.key is None else self.key(x)
        weights = attention_weights(
            self.query(x), key, self.rel_row, self.rel_col, window, tuple(points.t())
        )
        return weights[0].transpose(0, 1)

    def extra_repr(self) -> str:
        """Show what the layer is, as torch's layers do."""
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, '
            f'num_heads={self.num_heads}, stride={self.stride}, dilation={self.dilation}, '
            f'position={self.position!r}, logits={self.logits!r}, border={self.border!r}, '
            f'scale={self.scale}, backend={self.backend!r}'
        )


def _as_one(name: str, size) -> int:
    """Read Conv2d's pairs, of which attention takes equal ones."""
    if isinstance(size, (tuple, list)):
        if len(size) != 2 or size[0] != size[1]:
            raise ValueError(f'{name} must be one integer or two equal ones, but is {size!r}')
        size = size[0]
    return size


def _choose_logits(position: str, logits: Optional[str]) -> str:
    if position not in POSITIONS:
        raise ValueError(f'position must be one of {POSITIONS}, but is {position!r}')
    if logits is None:
        return 'qk+qr' if position == 'relative' else 'qk'
    if logits not in LOGITS:
        raise ValueError(f'logits must be one of {LOGITS} or None, but is {logits!r}')
    if ('qr' in logits) != (position == 'relative'):
        raise ValueError(
            f'logits={logits!r} does not go with position={position!r}: the term q.r is the relative '
            "position, so that position='relative' takes 'qk+qr' or 'qr', and the others take 'qk'"
        )
    return logits


def _check_channels(in_channels: int, out_channels: int, num_heads: int, position: str) -> None:
    for name, channels in (('in_channels', in_channels), ('out_channels', out_channels)):
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f'{name} must be an integer of at least 1, but is {channels!r}')
    if out_channels % num_heads:
        raise ValueError(f'num_heads must divide out_channels, {out_channels}, but is {num_heads}')
    if position == 'relative' and out_channels // num_heads % 2:
        raise ValueError(
            f"position='relative' needs an even number of channels per head, but out_channels="
            f'{out_channels} over num_heads={num_heads} is {out_channels // num_heads}'
        )
    if position == 'absolute':
        check_sinusoidal_channels(in_channels)
