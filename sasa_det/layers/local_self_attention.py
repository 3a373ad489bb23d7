"""Stand-alone self-attention as a layer."""

import math
from typing import NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import check_window, local_attention
from ..ops.backends.reference import window_logits
from ..ops.window import Window, strided_copy
from .position import check_sinusoidal_channels, sinusoidal_positions
from .projected_attention import check_map, projected_attention
from .projection import ConstantProjection, draw, is_plain, new_projection, project_by

POSITIONS = ('relative', 'absolute', 'none')
LOGITS = ('qk+qr', 'qk', 'qr')
INITS = ('neighbours', 'centre', 'random')
DOWNSAMPLES = ('pool', 'query')
# The default of init_lead.
LEAD_NATS = 8.0
# Factor of the std of the query and key weights with a lead; 1 gives content logits of unit variance.
LEAD_STD_FACTOR = 0.3
# Row and column offset in pixels of each head's own neighbour, in the order of the heads.
NEIGHBOURS = ((0, 1), (1, 0), (0, -1), (-1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))


class AttentionTerms(NamedTuple):
    """Attention weights of query pixels, and the logits' terms behind them; each (P, num_heads, k, k).

    Attributes:
        weights: The softmax of the terms' sum, each k x k summing to one.
        content: The logits q.k, times the layer's scale; None if the layer has no such term.
        position: The logits q.r of the learned relative positions, likewise.
    """

    weights: Tensor
    content: Optional[Tensor]
    position: Optional[Tensor]


class LocalSelfAttention2d(nn.Module):
    """Replace a spatial convolution by self-attention in a window around each pixel.

    Section 3.1 of `Stand-Alone Self-Attention in Vision Models <https://arxiv.org/abs/1906.05909>`_.
    The initial weights give logits of about unit variance for an input of unit variance: the paper
    does not scale logits by 1/sqrt(d).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; those of the input by default.
        kernel_size: Window size in pixels, odd.
        num_heads: Number of attention heads; divides hidden_channels.
        stride: Distance in pixels between outputs, see downsample. The output has Conv2d's size,
            ceil(H / stride).
        dilation: Distance in pixels between neighbours in a window.
        bias: Add a bias to the projections (a key's would cancel in the softmax, so there is none).
        position: 'relative': learned row and column offsets, the paper's choice; 'absolute':
            sinusoids added to the input (Table 5); 'none'.
        position_per_head: Learn offsets per head rather than one set for all heads. The paper leaves
            this open; HaloNet, by the same authors, shares them.
        logits: 'qk+qr', 'qk' or 'qr' (Table 6). By default 'qk+qr' with relative positions, else 'qk'.
        border: 'zeros' or 'mask', see :func:`sasa_det.ops.local_attention`.
        scale: Factor of the logits. The paper has none.
        out_proj: Mix the heads by one more projection.
        value_std: Standard deviation of the initial value weights. The paper has 0.01 in detectors,
            where batch normalisation follows each layer. The default in_channels ** -0.5 keeps the
            scale of activations without it.
        backend: See :func:`sasa_det.ops.local_attention`.
        init: 'neighbours': the query bias points each head at a different neighbour. The layer then
            starts close to a convolution rather than a plain average; needs a bias and relative
            positions. 'centre': likewise, but every head at the pixel itself. 'random': logits of unit
            variance, biases of zero. By default 'neighbours' where possible, else 'random'.
        downsample: What a stride above 1 does. 'pool': attention at every pixel, then average pooling
            over stride x stride, the paper's replacement of a strided convolution. 'query': only every
            stride-th row and column has a query, as in a strided convolution, which saves the computation
            of the others; not in the paper.
        constant_query: Learn one query for all pixels in the place of a projection. With logits='qr' the
            weights are then the same at every pixel: a learned shift of each head, as a control of what
            attention is worth. Not in the paper.
        init_lead: With init='neighbours' or 'centre', by how many nats the logit of the cell that a head
            points at exceeds those of the other rows and columns, at least. 8 by default.
        keep_projections: Keep queries, keys and values for the backward, which otherwise projects the input
            again. That is faster, but the layer then holds four maps rather than one.
        hidden_channels: Channels of queries, keys and values, all heads together. By default those of the
            output, as in the paper; others need out_proj.

    Shape:
        (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: An argument is not as above; names the argument, its value and the accepted values.

    Examples:
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
        init: Optional[str] = None,
        downsample: str = 'pool',
        constant_query: bool = False,
        init_lead: Optional[float] = None,
        keep_projections: bool = False,
        hidden_channels: Optional[int] = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        hidden_channels = out_channels if hidden_channels is None else hidden_channels
        kernel_size = _as_one('kernel_size', kernel_size)
        stride, dilation = _as_one('stride', stride), _as_one('dilation', dilation)
        logits = _choose_logits(position, logits)
        init = _choose_init(init, bias, position)
        init_lead = _choose_lead(init_lead, init)
        check_window(kernel_size, num_heads, dilation, border, scale, backend)
        _check_channels(in_channels, out_channels, hidden_channels, num_heads, position, out_proj)
        if not isinstance(stride, int) or stride < 1:
            raise ValueError(f'stride must be an integer of at least 1, but is {stride!r}')
        if downsample not in DOWNSAMPLES:
            raise ValueError(f'downsample must be one of {DOWNSAMPLES}, but is {downsample!r}')
        if value_std is not None and not (_is_finite(value_std) and value_std > 0):
            raise ValueError(
                f'value_std must be a finite number above 0 or None, but is {value_std!r}'
            )

        self.in_channels = in_channels
        self.out_channels = out_channels
        self.hidden_channels = hidden_channels
        self.kernel_size = kernel_size
        self.num_heads = num_heads
        self.stride = stride
        self.downsample = downsample
        self.dilation = dilation
        self.position = position
        self.logits = logits
        self.border = border
        self.scale = scale
        self.backend = backend
        self.init = init
        self.init_lead = init_lead
        self.constant_query = constant_query
        self.keep_projections = keep_projections

        self.value_std = in_channels**-0.5 if value_std is None else value_std

        if constant_query:
            self.query = ConstantProjection(hidden_channels)
        else:
            self.query = new_projection(in_channels, hidden_channels, bias)
        self.key = new_projection(in_channels, hidden_channels, False) if 'qk' in logits else None
        self.value = new_projection(in_channels, hidden_channels, bias)
        self.out_proj = new_projection(hidden_channels, out_channels, bias) if out_proj else None
        if 'qr' in logits:
            depth = hidden_channels // num_heads
            shape = (num_heads if position_per_head else 1, depth // 2, kernel_size)
            self.rel_row = nn.Parameter(torch.empty(shape))
            self.rel_col = nn.Parameter(torch.empty(shape))
        else:
            self.register_parameter('rel_row', None)
            self.register_parameter('rel_col', None)
        self.init_weights()

    # mmcv's ConvModule reads these from the layer that it wraps.
    groups = 1
    transposed = False
    output_padding = 0

    @property
    def padding(self) -> int:
        """Pixels by which a window extends beyond the map: the padding of an equal convolution."""
        return self.dilation * (self.kernel_size // 2)

    def _reset_positions(self) -> None:
        if self.rel_row is not None:
            std = (self.hidden_channels // self.num_heads) ** -0.25
            nn.init.normal_(self.rel_row, std=std)
            nn.init.normal_(self.rel_col, std=std)

    def _point_heads(self) -> None:
        """Set the query biases to point each head at a different neighbour, or all at the centre.

        With random logits a layer starts close to a plain average, and a stack of averages loses
        detail. If all heads attended to the pixel itself, they would see no shapes. So heads start
        apart, by the construction of Cordonnier et al. (https://arxiv.org/abs/1911.03584) for a
        convolution. The content term is learned from there.
        """
        if self.init == 'random' or self.kernel_size == 1:
            return
        depth = self.hidden_channels // self.num_heads
        half, entry = depth // 2, depth**-0.25
        # Offsets -1, 0 and 1 are three directions of a plane, 120 degrees apart; a query along one
        # of them prefers it. At depth 2 there is only a line, which has room for the pixel itself
        # alone.
        angles = torch.arange(3) * (2 * math.pi / 3)
        plane = torch.stack([angles.cos(), angles.sin()]) * 2**0.5
        directions = plane.repeat(-(-half // 2), 1)[:half] if half > 1 else torch.eye(3)[1:2]
        bias = self.query.bias.data.view(self.num_heads, 2, half)
        apart = self.init == 'neighbours' and half > 1 < self.num_heads
        for head in range(self.num_heads):
            row, col = NEIGHBOURS[head % len(NEIGHBOURS)] if apart else (0, 0)
            bias[head, 0] = entry * directions[:, 1 + row]
            bias[head, 1] = entry * directions[:, 1 + col]
        lead = directions * (self.init_lead / entry / directions[:, 1].square().sum())
        centre = self.kernel_size // 2
        for table in (self.rel_row.data, self.rel_col.data):
            # Random components in this plane would give heads random preferences, so they are removed.
            for first in range(min(half, 2)):
                table[:, first::2] -= table[:, first::2].mean(1, keepdim=True)
            table[:, :, centre - 1 : centre + 2] += lead

    def init_weights(self) -> None:
        """Draw all weights anew; the name that mmengine and mmcv call it by."""
        depth = self.hidden_channels // self.num_heads
        # Var(q.k) = d * Var(q) * Var(k) = 1 for an input of unit variance; the same for q.r.
        std = self.in_channels**-0.5 * depth**-0.25
        if self.init != 'random':
            std *= LEAD_STD_FACTOR
        if self.constant_query:
            # As large as the queries of an input of unit variance.
            nn.init.normal_(self.query.bias, std=self.in_channels**0.5 * std)
        else:
            draw(self.query, std)
        if self.key is not None:
            draw(self.key, std)
        draw(self.value, self.value_std)
        if self.out_proj is not None:
            draw(self.out_proj, self.hidden_channels**-0.5)
        self._reset_positions()
        self._point_heads()

    def forward(self, x: Tensor) -> Tensor:
        """Attend, at the strided pixels or at all, and average if the layer is to."""
        if self.position == 'absolute':
            x = x + sinusoidal_positions(x)
        options = dict(
            kernel_size=self.kernel_size,
            num_heads=self.num_heads,
            dilation=self.dilation,
            border=self.border,
            scale=self.scale,
            backend=self.backend,
            stride=self.stride if self.downsample == 'query' else 1,
        )
        tables = (self.rel_row, self.rel_col)
        projections = [each for each in (self.query, self.key, self.value) if each is not None]
        if all(map(is_plain, projections)):
            weights = [each.weight for each in projections]
            biases = [each.bias for each in projections]
            keep = self.keep_projections
            x = projected_attention(x, weights, biases, *tables, keep=keep, **options)
        else:
            check_map(x, self.in_channels)
            query = project_by(self.query, strided_copy(x, options['stride']))
            key = None if self.key is None else project_by(self.key, x)
            value = project_by(self.value, x)
            x = local_attention(query, key, value, *tables, **options)
        if self.out_proj is not None:
            x = project_by(self.out_proj, x)
        if self.stride > 1 and self.downsample == 'pool':
            # A partial last window averages only its pixels: the output has Conv2d's size, without
            # a dark edge.
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return x

    @torch.no_grad()
    def attention_weights(self, x: Tensor, points: Tensor) -> Tensor:
        """Compute the attention weights of given query pixels, before any pooling.

        Args:
            x: The layer's input (1, in_channels, H, W).
            points: (P, 2) row and column of the query pixels, in pixels of x.

        Returns:
            (P, num_heads, k, k), each k x k summing to one. With border='zeros' positions outside of
            the map carry weight too.

        Examples:
            >>> layer = LocalSelfAttention2d(16, kernel_size=3, num_heads=4)
            >>> weights = layer.attention_weights(torch.randn(1, 16, 8, 8), torch.tensor([[4, 4]]))
            >>> weights.shape, bool(weights.sum((-2, -1)).allclose(torch.ones(1, 4)))
            (torch.Size([1, 4, 3, 3]), True)
        """
        return self.attention_terms(x, points).weights

    @torch.no_grad()
    def attention_terms(self, x: Tensor, points: Tensor) -> AttentionTerms:
        """Compute the attention weights of given query pixels, and the terms of their logits.

        Args:
            x: The layer's input (1, in_channels, H, W).
            points: (P, 2) row and column of the query pixels, in pixels of x.

        Raises:
            ValueError: x is a batch, or not a map. Or a point is not in it.

        Examples:
            >>> layer = LocalSelfAttention2d(16, kernel_size=3, num_heads=4, logits='qr')
            >>> terms = layer.attention_terms(torch.randn(1, 16, 8, 8), torch.tensor([[4, 4]]))
            >>> terms.content is None, terms.position.shape
            (True, torch.Size([1, 4, 3, 3]))
        """
        if x.dim() != 4 or x.shape[0] != 1:
            raise ValueError(f'x must be one map (1, C, H, W), but is {tuple(x.shape)}')
        # A negative row or column would count from the other side.
        if (points < 0).any() or (points >= points.new_tensor(x.shape[2:])).any():
            raise ValueError(
                f'points must be rows and columns in a map of {x.shape[2]} x {x.shape[3]}, '
                f'but are {points.tolist()}'
            )
        if self.position == 'absolute':
            x = x + sinusoidal_positions(x)
        window = Window(self.kernel_size, self.num_heads, self.dilation, self.border, self.scale)
        query, points = project_by(self.query, x), tuple(points.t())

        def logits(key, rel_row, rel_col):
            return window_logits(query, key, rel_row, rel_col, window, points)[0].transpose(0, 1)

        content = None if self.key is None else logits(project_by(self.key, x), None, None)
        position = None if self.rel_row is None else logits(None, self.rel_row, self.rel_col)
        both = sum(term for term in (content, position) if term is not None)
        return AttentionTerms(both.flatten(2).softmax(-1).view_as(both), content, position)

    def extra_repr(self) -> str:
        """Describe the layer's options, as torch's layers do."""
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, '
            f'num_heads={self.num_heads}, hidden_channels={self.hidden_channels}, stride={self.stride}, '
            f'dilation={self.dilation}, '
            f'position={self.position!r}, logits={self.logits!r}, border={self.border!r}, '
            f'scale={self.scale}, backend={self.backend!r}, init={self.init!r}, '
            f'downsample={self.downsample!r}, constant_query={self.constant_query}'
        )


def _is_finite(number) -> bool:
    return isinstance(number, (int, float)) and math.isfinite(number)


def _as_one(name: str, size) -> int:
    """Read a pair as Conv2d takes it; attention accepts only equal values."""
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


def _choose_init(init: Optional[str], bias: bool, position: str) -> str:
    can_point = bool(bias) and position == 'relative'
    if init is None:
        return 'neighbours' if can_point else 'random'
    if init not in INITS:
        raise ValueError(f'init must be one of {INITS} or None, but is {init!r}')
    if init != 'random' and not can_point:
        raise ValueError(
            f'init={init!r} points heads by the bias of the queries at relative positions: it needs '
            f"bias=True and position='relative', but bias={bias!r} and position={position!r}"
        )
    return init


def _choose_lead(init_lead: Optional[float], init: str) -> float:
    if init_lead is None:
        return LEAD_NATS
    if init == 'random':
        raise ValueError(
            f"init_lead is for init='neighbours' or 'centre', but is {init_lead!r} where init is 'random'"
        )
    if not (_is_finite(init_lead) and init_lead >= 0):
        raise ValueError(f'init_lead must be a finite number of at least 0, but is {init_lead!r}')
    return float(init_lead)


def _check_channels(
    in_channels: int,
    out_channels: int,
    hidden_channels: int,
    num_heads: int,
    position: str,
    out_proj: bool,
) -> None:
    for name, channels in (
        ('in_channels', in_channels),
        ('out_channels', out_channels),
        ('hidden_channels', hidden_channels),
    ):
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f'{name} must be an integer of at least 1, but is {channels!r}')
    if hidden_channels != out_channels and not out_proj:
        raise ValueError(
            f'hidden_channels must be out_channels, {out_channels}, without out_proj, but is {hidden_channels}'
        )
    divided = 'out_channels' if hidden_channels == out_channels else 'hidden_channels'
    if hidden_channels % num_heads:
        raise ValueError(f'num_heads must divide {divided}, {hidden_channels}, but is {num_heads}')
    if position == 'relative' and hidden_channels // num_heads % 2:
        raise ValueError(
            f"position='relative' needs an even number of channels per head, but {divided}="
            f'{hidden_channels} over num_heads={num_heads} is {hidden_channels // num_heads}'
        )
    if position == 'absolute':
        check_sinusoidal_channels(in_channels)
