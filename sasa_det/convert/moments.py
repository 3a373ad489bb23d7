"""What a layer's inputs and outputs have in common: second moments of pixels and their neighbours."""

from typing import NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

Offsets = Sequence[Tuple[int, int]]
# Row and column offsets of a 3x3 convolution, in the order of its weight.
NINE = tuple((row, col) for row in (-1, 0, 1) for col in (-1, 0, 1))
# Pixels whose neighbours are gathered at once.
_CHUNK = 4096


class Covariance(NamedTuple):
    """Second moments about the mean.

    Attributes:
        inputs: (K C, K C), of the neighbours' channels.
        cross: (K C, O), of neighbours and targets.
        target: (O,), variances of the targets.
        input_mean: (K C,).
        target_mean: (O,).
        samples: Number of pixels.
    """

    inputs: Tensor
    cross: Tensor
    target: Tensor
    input_mean: Tensor
    target_mean: Tensor
    samples: int


class Moments:
    """Sums over pixels of their neighbours, of targets, and of products of both.

    They take the memory of a few weights, however many images they are of.

    Args:
        in_channels: Channels C of the map whose pixels are looked at.
        out_channels: Channels O of the targets.
        stride: Pixels of the map from one target to the next.
        dilation: Pixels from one neighbour to the next.
        offsets: The K neighbours.
        device: Where the maps are.

    Examples:
        >>> moments = Moments(8, 4)
        >>> moments.add(torch.randn(2, 8, 5, 6), torch.randn(2, 4, 5, 6))
        >>> moments.covariance().inputs.shape
        torch.Size([72, 72])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        offsets: Offsets = NINE,
        device=None,
    ) -> None:
        self.stride, self.dilation, self.offsets = stride, dilation, tuple(offsets)
        self._channels, size = in_channels, len(self.offsets) * in_channels
        self._inputs = torch.zeros(size, size, device=device)  # filled on and above the diagonal
        self._cross = torch.zeros(size, out_channels, device=device)
        # The mean of the first pixels, which all sums are about: little cancels in a covariance then.
        self._shift, self._target_shift = None, None
        self._sum = torch.zeros(size, device=device, dtype=torch.float64)
        self._target_sum = torch.zeros(out_channels, device=device, dtype=torch.float64)
        self._target_squares = torch.zeros(out_channels, device=device, dtype=torch.float64)
        self._samples = 0

    def add(
        self,
        x: Tensor,
        y: Tensor,
        share: float = 1.0,
        generator: Optional[torch.Generator] = None,
    ) -> None:
        """Add the pixels of a batch.

        Args:
            x: The maps (B, C, H, W).
            y: The targets (B, O, ceil(H / stride), ceil(W / stride)).
            share: Share of the pixels to take, at random.
            generator: Draws them, on the CPU.
        """
        pixels = _pixels(y, share, generator)
        targets = y.permute(0, 2, 3, 1).flatten(0, 2)
        for chunk in pixels.split(_CHUNK):
            near = gather(x, chunk, y.shape[2:], self.stride, self.dilation, self.offsets)
            target = targets[chunk]
            if self._shift is None:
                self._shift, self._target_shift = near.mean(0), target.mean(0)
            near, target = near - self._shift, target - self._target_shift
            for first in range(0, near.shape[1], self._channels):
                part = near[:, first : first + self._channels]
                self._inputs[first : first + self._channels, first:].addmm_(part.T, near[:, first:])
            self._cross.addmm_(near.T, target)
            self._sum += near.sum(0, dtype=torch.float64)
            self._target_sum += target.sum(0, dtype=torch.float64)
            self._target_squares += target.square().sum(0, dtype=torch.float64)
            self._samples += len(chunk)

    def covariance(self) -> Covariance:
        """Give the moments about the mean, per pixel.

        Raises:
            ValueError: No pixel was added.
        """
        if not self._samples:
            raise ValueError('there are moments only once pixels were added')
        mean, target_mean = self._sum / self._samples, self._target_sum / self._samples
        small, small_target = mean.float(), target_mean.float()
        inputs = self._inputs.triu() + self._inputs.triu(1).T
        return Covariance(
            inputs / self._samples - small[:, None] * small,
            self._cross / self._samples - small[:, None] * small_target,
            (self._target_squares / self._samples - target_mean.square()).float().clamp(min=0),
            self._shift + small,
            self._target_shift + small_target,
            self._samples,
        )


def gather(
    x: Tensor, pixels: Tensor, size, stride: int = 1, dilation: int = 1, offsets: Offsets = NINE
) -> Tensor:
    """Look up the neighbours of some pixels; outside of the map they are zero.

    Args:
        x: The maps (B, C, H, W).
        pixels: (P,), indices into the (B, *size) outputs of a layer.
        size: Height and width of the outputs.
        stride: Pixels of x from one output to the next.
        dilation: Pixels from one neighbour to the next.
        offsets: The K neighbours.

    Returns:
        (P, K C), one neighbour after the other.

    Examples:
        >>> gather(torch.ones(1, 2, 3, 3), torch.tensor([0]), (3, 3)).view(9, 2).sum(1).tolist()
        [0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 0.0, 2.0, 2.0]
    """
    reach = dilation * max(max(map(abs, offset)) for offset in offsets)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, reach, reach, reach, reach))
    height, width = padded.shape[1:3]
    image, row, col = (
        pixels // (size[0] * size[1]),
        pixels // size[1] % size[0],
        pixels % size[1],
    )
    first = (image * height + row * stride + reach) * width + col * stride + reach
    steps = torch.tensor([dilation * (i * width + j) for i, j in offsets], device=pixels.device)
    return padded.flatten(0, 2)[first[:, None] + steps].flatten(1)


def principal_directions(x: Tensor, count: int) -> Tensor:
    """Find the directions of most variance among a map's channels.

    Args:
        x: The maps (B, C, H, W).
        count: Number of directions.

    Returns:
        (C, count), orthonormal.

    Examples:
        >>> x = torch.tensor([1.0, -1.0])[:, None, None, None] * torch.tensor([0.0, 2.0])[:, None, None]
        >>> principal_directions(x, 1).abs().flatten().tolist()
        [0.0, 1.0]
    """
    flat = x.transpose(0, 1).flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return torch.linalg.eigh(flat @ flat.T)[1][:, -count:]


def _pixels(y: Tensor, share: float, generator) -> Tensor:
    count = y.shape[0] * y.shape[2] * y.shape[3]
    wanted = min(count, max(1, round(count * share)))
    if wanted == count:
        return torch.arange(count, device=y.device)
    return torch.randperm(count, generator=generator)[:wanted].sort().values.to(y.device)
