"""Which attention comes nearest to a 3x3 convolution? Fitted to second moments of its inputs and outputs.

With query and key weights of zero, a head's weights a_h are the same in each window: the softmax of a row and
a column term that the query's bias makes of the relative positions. The layer then is

    y(p) = sum over heads h of P_h V_h (sum over offsets d of a_h(d) x(p + d)) + c

a block-term decomposition of the convolution's kernel, in which each head's block V_h P_h has rank d_h.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .moments import NINE, Covariance

# Of the mean variance of the inputs: as much is added to each input before equations are solved, ...
RIDGE = 1e-3
# ... and so much more in the refinement for each input per pixel.
RIDGE_FEW = 0.1
# As much is added where equations may be singular, but are to be solved exactly otherwise.
JITTER = 1e-6
# Of the largest deviation of an input's channel: a channel that hardly varies on these images counts as one
# that varies so much. Else its weights would cost nothing, and be large where other images use it.
SCALE_FLOOR = 0.1
# Nats by which a head prefers its own neighbour at the start of the refinement.
LEAD_NATS = 4.0
# Nats below the other neighbours of those that a 3x3 convolution does not see, in each row and column.
OUTSIDE_NATS = -3.0
# Iterations of L-BFGS: as many as take these multiply-adds, within bounds.
REFINEMENT_MACS = 1e11
FEWEST_STEPS, MOST_STEPS = 20, 120
# Pixels, per input, that the convolution's own weights count for.
PRIOR = 2


class StaticAttention(NamedTuple):
    """An attention whose weights are the same in each window.

    Attributes:
        rows: (H, k), logits of each head's row offsets.
        cols: (H, k), of its column offsets.
        value: (H, C, d), from the input's channels to those of each head.
        output: (H, d, O), from those to the output.
        bias: (O,).
        unexplained: The share of the outputs' variance that is left, by the moments.
    """

    rows: Tensor
    cols: Tensor
    value: Tensor
    output: Tensor
    bias: Tensor
    unexplained: float


@torch.no_grad()
def fit_static_attention(
    covariance: Covariance,
    weight: Tensor,
    num_heads: int,
    depth: int,
    kernel_size: int,
) -> StaticAttention:
    """Find the attention of the least squared error, per output relative to its variance.

    Args:
        covariance: Of the nine neighbours and the convolution's outputs.
        weight: The convolution's weight (O, C, 3, 3).
        num_heads: Heads H of the attention.
        depth: Channels d of each.
        kernel_size: Its window size k, at least 3.

    Returns:
        The attention.
    """
    kernel = weight.permute(2, 3, 1, 0).flatten(0, 2)  # (9 C, O), in the order of the moments
    observed, covariance = covariance, _with_prior(covariance, kernel)
    channels = weight.shape[1]
    deviation = covariance.target.sqrt().clamp(min=1e-6 * covariance.target.max().sqrt() + 1e-12)
    scale = covariance.inputs.diagonal().view(9, channels).mean(0).sqrt()
    scale = scale.clamp(min=SCALE_FLOOR * scale.max() + 1e-12)
    ninefold = scale.repeat(9)
    # In units of each channel's standard deviation.
    inputs = covariance.inputs / ninefold[:, None] / ninefold
    cross = covariance.cross / ninefold[:, None] / deviation
    where, value = _best_blocks(inputs, kernel * ninefold[:, None] / deviation, num_heads, depth)
    rows, cols = _preferences(where, kernel_size, inputs)
    ridge = RIDGE + RIDGE_FEW * len(kernel) / observed.samples
    rows, cols, value, output = _refine(inputs, cross, rows, cols, value, ridge)
    value = value / scale[:, None]
    output = output * deviation
    # Values of unit variance, as after an ordinary start.
    blocks = _spread(_patterns(rows, cols), value)
    variance = (blocks * (covariance.inputs @ blocks)).sum(0).view(num_heads, 1, depth)
    size = variance.sqrt().clamp(min=1e-12)
    value, output = value / size, output * size.transpose(1, 2)
    kernel = _spread(_patterns(rows, cols), value) @ output.flatten(0, 1)
    bias = observed.target_mean - observed.input_mean @ kernel
    return StaticAttention(rows, cols, value, output, bias, _unexplained(observed, kernel))


@torch.no_grad()
def refit_convolution(conv: nn.Conv2d, covariance: Covariance) -> None:
    """Change a convolution such that it computes given targets from other inputs than it was trained with.

    A ridge pulls its weights to those that it has, the more the fewer pixels there are.

    Args:
        conv: The convolution, of 1 x 1 or 3 x 3; changed in place.
        covariance: Of the neighbours and the targets.
    """
    kernel = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    ridge = RIDGE + RIDGE_FEW * len(kernel) / covariance.samples
    left = covariance.cross - covariance.inputs @ kernel
    kernel = kernel + solve(covariance.inputs, left, ridge)
    conv.weight.copy_(kernel.view(*conv.kernel_size, conv.in_channels, -1).permute(3, 2, 0, 1))
    if conv.bias is not None:
        conv.bias.copy_(covariance.target_mean - covariance.input_mean @ kernel)


def least_squares_error(covariance: Covariance) -> float:
    """Compute the share of the outputs' variance that even a free 3x3 convolution leaves.

    Above zero where the inputs differ from those that the convolution was trained with.

    Args:
        covariance: Of the nine neighbours and the outputs.
    """
    return _unexplained(covariance, solve(covariance.inputs, covariance.cross))


def _unexplained(covariance: Covariance, kernel: Tensor) -> float:
    """Compute the share of the outputs' variance that a kernel (9 C, O) leaves."""
    explained = (kernel * (2 * covariance.cross - covariance.inputs @ kernel)).sum()
    return 1 - (explained / covariance.target.sum().clamp(min=1e-12)).item()


def solve(matrix: Tensor, right: Tensor, ridge: float = RIDGE) -> Tensor:
    """Solve equations of a covariance, to whose diagonal a share of its mean is added.

    Args:
        matrix: (N, N), symmetric and not negative.
        right: (N, O).
        ridge: The share.

    Examples:
        >>> solve(torch.eye(2), torch.ones(2, 1), ridge=1.0).flatten().tolist()
        [0.5, 0.5]
    """
    ridge = ridge * matrix.diagonal().mean() + 1e-12
    return torch.linalg.solve(matrix + ridge * torch.eye(len(matrix), device=matrix.device), right)


def _with_prior(covariance: Covariance, kernel: Tensor) -> Covariance:
    """Shrink the moments towards those of independent inputs, to which the convolution answers exactly.

    With few pixels per input the moments alone would be fitted, and other images missed.
    """
    pixels = PRIOR * len(kernel)
    share = pixels / (pixels + covariance.samples)
    diagonal = covariance.inputs.diagonal()
    diagonal = diagonal.clamp(min=SCALE_FLOOR**2 * diagonal.max())
    answers = diagonal[:, None] * kernel
    return covariance._replace(
        inputs=(1 - share) * covariance.inputs + share * diagonal.diag(),
        cross=(1 - share) * covariance.cross + share * answers,
        target=(1 - share) * covariance.target + share * (kernel * answers).sum(0),
    )


def _best_blocks(inputs: Tensor, kernel: Tensor, num_heads: int, depth: int):
    """Choose the blocks of ``depth`` directions that carry most of the outputs, whichever neighbours' they are.

    Returns:
        The heads' neighbours (H,), indices into NINE, and their value weights (H, C, d).
    """
    channels = len(kernel) // 9
    candidates = []
    # Of all neighbours together: those outside of tiny maps are always zero.
    ridge = 1e-4 * inputs.diagonal().mean() + 1e-8
    for index in range(9):
        part = slice(index * channels, (index + 1) * channels)
        own = inputs[part, part]
        own = own + ridge * torch.eye(channels, device=own.device)
        factor = torch.linalg.cholesky(own)
        left, strength, _ = torch.linalg.svd(factor.T @ kernel[part], full_matrices=False)
        values = torch.linalg.solve_triangular(factor.T, left * strength, upper=True)
        for begin in range(0, values.shape[1], depth):
            block = slice(begin, begin + depth)
            energy = strength[block].square().sum().item()
            candidates.append((energy, index, values[:, block]))
    candidates.sort(key=lambda candidate: -candidate[0])
    values = kernel.new_zeros(num_heads, channels, depth)
    where = [4] * num_heads
    for head, (_, index, block) in enumerate(candidates[:num_heads]):
        where[head] = index
        values[head, :, : block.shape[1]] = block
    return torch.tensor(where), values


def _preferences(where: Tensor, kernel_size: int, like: Tensor):
    """Make logits (H, k) of rows and columns that prefer one neighbour."""
    centre = kernel_size // 2
    start = like.new_full((len(where), kernel_size), OUTSIDE_NATS)
    start[:, centre - 1 : centre + 2] = 0
    tables = []
    for axis in (0, 1):
        table = start.clone()
        offsets = torch.tensor([NINE[index][axis] for index in where.tolist()])
        table[torch.arange(len(where)), centre + offsets] = LEAD_NATS
        tables.append(table)
    return tables


def _patterns(rows: Tensor, cols: Tensor) -> Tensor:
    """Compute the weights (H, 9) of the nine neighbours; those further away have the rest."""
    centre = rows.shape[1] // 2
    near = slice(centre - 1, centre + 2)
    rows, cols = rows.softmax(1)[:, near], cols.softmax(1)[:, near]
    return (rows[:, :, None] * cols[:, None]).flatten(1)


def _spread(patterns: Tensor, value: Tensor) -> Tensor:
    """Write each head's values as weights (9 C, H d) of all neighbours."""
    heads, channels, depth = value.shape
    weights = patterns.T[:, None, :, None] * value.transpose(0, 1)
    return weights.reshape(9 * channels, heads * depth)


def _refine(inputs, cross, rows, cols, value, ridge: float):
    """Lower the error over patterns and values, on the moments alone.

    The output weights are always the best ones for these, in closed form: variable projection (Golub and
    Pereyra, 1973). It takes far fewer steps than a descent over all three.
    """
    heads, channels, depth = value.shape
    outputs = cross.shape[1]
    learned = [each.contiguous().requires_grad_() for each in (rows, cols, value)]

    def project(blocks):
        """Give the best output weights (H d, O), their error, and the products of moments and blocks."""
        products = inputs @ blocks + ridge * blocks
        gram, right = blocks.T @ products, blocks.T @ cross
        output = solve(gram, right, JITTER)
        loss = outputs + (output * (gram @ output - 2 * right)).sum()
        return output, loss / outputs, products

    optimizer = torch.optim.LBFGS(
        learned,
        max_iter=_steps(*cross.shape),
        history_size=20,
        line_search_fn='strong_wolfe',
        tolerance_grad=1e-7,
        tolerance_change=1e-7,
    )

    def closure():
        optimizer.zero_grad()
        rows, cols, value = learned
        blocks = _spread(_patterns(rows, cols), value)
        with torch.no_grad():
            output, loss, products = project(blocks)
        # The output weights are at their best, so that their change adds nothing to the gradient.
        blocks.backward(2 * (products @ output - cross) @ output.T / outputs)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    rows, cols, value = (each.detach() for each in learned)
    output, *_ = project(_spread(_patterns(rows, cols), value))
    return rows, cols, value, output.view(heads, depth, outputs)


def _steps(inputs: int, outputs: int) -> int:
    # A step is a product with the moments.
    return round(min(MOST_STEPS, max(FEWEST_STEPS, REFINEMENT_MACS / (inputs**2 * outputs))))
