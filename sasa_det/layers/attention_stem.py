"""The stem of stand-alone self-attention: attention inside small blocks of the image."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .projection import draw, new_projection

BLOCK = 4  # height and width of a block in pixels, and the stem's stride
VALUES = ('mixtures', 'plain', 'conv')
POOLS = dict(max=nn.MaxPool2d, avg=nn.AvgPool2d)


class MixedValues(nn.Module):
    """Project a block's pixels by weights that depend on a pixel's position in the block.

    Section 3.2 of `Stand-Alone Self-Attention in Vision Models <https://arxiv.org/abs/1906.05909>`_:
    the weight at row a and column b is a weighted mean of ``num_mixtures`` matrices. The weights are
    the softmax over m of (row embedding a + column embedding b) . nu^m.

    Args:
        in_channels: Channels of the pixels.
        out_channels: Channels of the values.
        num_mixtures: Number of matrices.

    Shape:
        (N, 16, in_channels), blocks row by row, to (N, 16, out_channels).

    Examples:
        >>> MixedValues(3, 8, num_mixtures=4)(torch.zeros(6, 16, 3)).shape
        torch.Size([6, 16, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, num_mixtures: int) -> None:
        super().__init__()
        self.num_mixtures = num_mixtures
        self.weight = nn.Parameter(torch.empty(num_mixtures, out_channels, in_channels))
        self.row = nn.Parameter(torch.empty(BLOCK, out_channels))
        self.col = nn.Parameter(torch.empty(BLOCK, out_channels))
        self.nu = nn.Parameter(torch.empty(num_mixtures, out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew; logits of about unit variance tell positions apart from the start."""
        nn.init.normal_(self.weight, std=self.weight.shape[2] ** -0.5)
        for table in (self.row, self.col, self.nu):
            nn.init.normal_(table, std=(2 * table.shape[1]) ** -0.25)

    def mixture(self) -> Tensor:
        """Compute the share of each matrix at each position of a block, (16, num_mixtures)."""
        positions = (self.row[:, None] + self.col).flatten(0, 1)
        return (positions @ self.nu.t()).softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        """Project (N, 16, in_channels) to (N, 16, out_channels)."""
        # Mixing the matrices, not their outputs, leaves one projection per pixel.
        weight = (self.mixture() @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])
        return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)


class AttentionStem(nn.Module):
    """Replace ResNet's first convolution and pooling by attention inside blocks of 4 x 4 pixels.

    Section 3.2 of `Stand-Alone Self-Attention in Vision Models <https://arxiv.org/abs/1906.05909>`_:
    attention with logits q.k alone inside each non-overlapping block, batch normalisation, 4 x 4
    pooling. Height and width are padded to multiples of 4. The padding takes no part in attention,
    normalisation or pooling.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the output, divisible by num_heads.
        num_heads: Number of attention heads.
        values: 'mixtures': position-aware values, the paper's choice. 'plain': one projection.
            'conv': a spatial convolution, the only choice that sees across blocks (Table 7).
        num_mixtures: Number of matrices of 'mixtures'. The paper does not give it; 6 fits the FLOPs of
            its Tables 1 and 2 (``python -m tools.paper.tables --search``).
        value_kernel_size: kernel_size of the convolution of 'conv', odd. The paper does not give it;
            5 fits the FLOPs of its Table 7.
        bias: Add a bias to the queries and to plain values. Off by default, as normalisation follows.
        norm_cfg: The normalisation, as mmcv takes it; batch normalisation by default.
        relu: Whether a ReLU follows the normalisation, as in ResNet. The paper does not say.
        pool: 'max', the paper's, or 'avg'. Its stride is 4: the paper does not give it, but only 4
            keeps ResNet's stride.

    Shape:
        (B, in_channels, H, W) to (B, out_channels, ceil(H / 4), ceil(W / 4)), as in ResNet's stem.

    Raises:
        ValueError: An argument is not as above; names the argument, its value and the accepted values.

    Examples:
        >>> AttentionStem()(torch.zeros(2, 3, 65, 96)).shape
        torch.Size([2, 64, 17, 24])
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 64,
        num_heads: int = 4,
        values: str = 'mixtures',
        num_mixtures: int = 6,
        value_kernel_size: int = 5,
        bias: bool = False,
        norm_cfg: Optional[dict] = None,
        relu: bool = True,
        pool: str = 'max',
    ) -> None:
        super().__init__()
        numbers = dict(
            in_channels=in_channels,
            out_channels=out_channels,
            num_heads=num_heads,
            num_mixtures=num_mixtures,
            value_kernel_size=value_kernel_size,
        )
        for name, value in numbers.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f'{name} must be an integer of at least 1, but is {value!r}')
        if out_channels % num_heads:
            raise ValueError(
                f'num_heads must divide out_channels, {out_channels}, but is {num_heads}'
            )
        if value_kernel_size % 2 == 0:
            raise ValueError(f'value_kernel_size must be odd, but is {value_kernel_size}')
        for name, value, accepted in (('values', values, VALUES), ('pool', pool, tuple(POOLS))):
            if value not in accepted:
                raise ValueError(f'{name} must be one of {accepted}, but is {value!r}')

        self.num_heads = num_heads
        self.values = values
        self.query = new_projection(in_channels, out_channels, bias)
        self.key = new_projection(in_channels, out_channels, False)
        self._draw_queries_and_keys()
        if values == 'mixtures':
            self.value = MixedValues(in_channels, out_channels, num_mixtures)
        elif values == 'plain':
            self.value = new_projection(in_channels, out_channels, bias)
            draw(self.value, in_channels**-0.5)
        else:
            self.value = nn.Conv2d(
                in_channels,
                out_channels,
                value_kernel_size,
                padding=value_kernel_size // 2,
                bias=bias,
            )
        self.norm = _build_norm(norm_cfg, out_channels)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()
        # A partial last window pools only its pixels, for the output size of ResNet's stem.
        self.pool = POOLS[pool](BLOCK, stride=BLOCK, ceil_mode=True)

    def init_weights(self) -> None:
        """Draw the projections anew; the name that mmengine calls it by."""
        self._draw_queries_and_keys()
        if self.values == 'plain':
            draw(self.value, self.value.in_features**-0.5)
        else:
            self.value.reset_parameters()

    def _draw_queries_and_keys(self) -> None:
        # Var(q.k) = 1 for an image of unit variance; the paper does not scale the logits.
        depth = self.query.out_features // self.num_heads
        std = self.query.in_features**-0.5 * depth**-0.25
        draw(self.query, std)
        draw(self.key, std)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, normalise, pool."""
        return self.pool(self.relu(self.norm(self.attend(x))))

    def attend(self, x: Tensor) -> Tensor:
        """Attend inside each block, at the image's resolution.

        Args:
            x: (B, in_channels, H, W).

        Returns:
            (B, out_channels, H, W).
        """
        size = x.shape[2:]
        missing = [-edge % BLOCK for edge in size]
        padding = (0, missing[1], 0, missing[0])
        blocks = _to_blocks(F.pad(x, padding))
        if self.values == 'conv':
            value = _to_blocks(F.pad(self.value(x), padding))
        else:
            value = self.value(blocks)
        query, key, value = (
            each.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for each in (self.query(blocks), self.key(blocks), value)
        )
        mask = None
        # In a graph for any size, the sizes are no numbers yet: what is true of one is not of others.
        if any(not isinstance(gap, int) or gap for gap in missing):
            inside = F.pad(x.new_ones(1, 1, *size), padding).expand(x.shape[0], -1, -1, -1)
            mask = _to_blocks(inside).bool().transpose(1, 2)[:, None]
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
        y = y.transpose(1, 2).flatten(2)
        rows, cols = ((edge + gap) // BLOCK for edge, gap in zip(size, missing))
        y = y.unflatten(0, (x.shape[0], rows, cols)).unflatten(3, (BLOCK, BLOCK))
        y = y.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return y[:, :, : size[0], : size[1]]


def _build_norm(norm_cfg: Optional[dict], channels: int) -> nn.Module:
    if norm_cfg is None:
        return nn.BatchNorm2d(channels)
    # Without configs mmcv need not be installed.
    from mmcv.cnn import build_norm_layer

    return build_norm_layer(norm_cfg, channels)[1]


def _to_blocks(x: Tensor) -> Tensor:
    """Cut (B, C, 4 h, 4 w) into (B * h * w, 16, C), images and blocks row by row."""
    x = x.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)
