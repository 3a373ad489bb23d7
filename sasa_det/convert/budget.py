"""Which layers are worth converting, for a wanted time or number of FLOPs?

Each layer has a price, the error that its conversion alone makes at the detector's outputs, and a gain, the
time or FLOPs that it saves. Dynamic programming finds the set that gains enough for the least sum of errors.
"""

import copy
from typing import Callable, Dict, List, Mapping, NamedTuple, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..layers.replace import put
from .costs import compare_layers, compare_models
from .layers import Choice
from .walk import Calls, Stage, fit_apart, run_stages

# The gains are rounded to so many parts of what is wanted.
_PARTS = 2000
# Images that errors at the outputs are measured on, at most: the detector runs once for each layer.
MOST_PROBES = 8
KINDS = dict(time='ms', flops='gflops')


class Budget(NamedTuple):
    """What is wanted of a conversion.

    Attributes:
        kind: 'time', as measured on this machine for one image, or 'flops'.
        share: Of the convolutional detector's.
    """

    kind: str
    share: float


class Offer(NamedTuple):
    """What the conversion of a layer costs and saves.

    Attributes:
        error: At the outputs, the share of their variance.
        gain: Milliseconds or GFLOPs per image; negative where attention takes more.
    """

    error: float
    gain: float


class Plan(NamedTuple):
    """Which layers become attention within a budget.

    Attributes:
        choices: What becomes of each convolution.
        offers: Those that could be converted.
        total: Milliseconds or GFLOPs of the convolutional detector.
    """

    choices: Dict[str, Choice]
    offers: Dict[str, Offer]
    total: float


def read_budget(text: str) -> Budget:
    """Read a budget.

    Args:
        text: Such as ``time=0.8``.

    Raises:
        ValueError: It is not of this form.

    Examples:
        >>> read_budget('time=0.8')
        Budget(kind='time', share=0.8)
    """
    kind, _, share = text.partition('=')
    try:
        number = float(share)
    except ValueError:
        number = 0.0
    if kind not in KINDS or not 0 < number < 1:
        raise ValueError(
            f'a budget is one of {", ".join(f"{kind}=SHARE" for kind in KINDS)}, with a share between 0 and 1, '
            f'but is {text!r}'
        )
    return Budget(kind, number)


def choose_within(offers: Mapping[str, Offer], wanted: float) -> List[str]:
    """Choose the layers of the least sum of errors that together gain as much as is wanted.

    Args:
        offers: By name.
        wanted: The gain.

    Returns:
        The names, in the order of the offers.

    Raises:
        ValueError: All layers together gain less.

    Examples:
        >>> offers = dict(a=Offer(0.1, 3.0), b=Offer(0.02, 2.0), c=Offer(0.03, 2.0), d=Offer(0.0, -1.0))
        >>> choose_within(offers, 3.5)
        ['b', 'c']
    """
    useful = {name: offer for name, offer in offers.items() if offer.gain > 0}
    if wanted <= 0:
        return []
    if sum(offer.gain for offer in useful.values()) < wanted:
        raise ValueError('the layers gain less than is wanted')
    # Rounded down, so that what is chosen gains enough.
    gains = {name: int(offer.gain / wanted * _PARTS) for name, offer in useful.items()}
    # By the parts of the gain so far: the least error, and the names that make it.
    best = {0: (0.0, ())}
    for name, offer in useful.items():
        for parts, (error, names) in sorted(best.items(), reverse=True):
            reached = min(_PARTS, parts + gains[name])
            if reached > parts and error + offer.error < best.get(reached, (float('inf'),))[0]:
                best[reached] = (error + offer.error, (*names, name))
    names = best[_PARTS][1] if _PARTS in best else tuple(useful)
    return [name for name in offers if name in names]


def frontier(offers: Mapping[str, Offer], points: int = 20) -> List[tuple]:
    """List the least sums of errors for gains from nothing to all that there is.

    Args:
        offers: By name.
        points: Number of gains.

    Returns:
        Pairs of gain and error.
    """
    most = sum(max(0.0, offer.gain) for offer in offers.values())
    found = [(0.0, 0.0)]
    for point in range(1, points + 1):
        names = choose_within(offers, most * point / points * (1 - 1e-9))
        gain = sum(offers[name].gain for name in names)
        found.append((gain, sum(offers[name].error for name in names)))
    return found


def spend(
    budget: Budget,
    model: nn.Module,
    choices: Mapping[str, Choice],
    stages: Sequence[Stage],
    images: Tensor,
    calls: Mapping[str, Calls],
    seed: int = 0,
    tell: Callable[[int], None] = lambda done: None,
) -> Plan:
    """Choose the layers to convert, such that a detector meets a budget.

    Args:
        budget: What is wanted.
        model: The convolutional detector.
        choices: What may become of each convolution.
        stages: What runs the detector.
        images: The first stage's input.
        calls: How each layer is called.
        seed: Of the pixels that layers are fitted to.
        tell: Called with the number of layers that are measured.

    Returns:
        The plan.

    Raises:
        ValueError: No set of layers meets it; says what can be had.
    """
    attention = {name: choices[name].attn_cfg for name in calls}
    held_out = min(MOST_PROBES, max(1, len(images) // 4))
    errors, student = errors_alone(model, attention, stages, images, held_out, seed, tell)
    layers = compare_layers(model, student, calls)
    key = KINDS[budget.kind]
    total = compare_models(model, student, stages, images[:1])[f'{key}_before']
    offers = {
        name: Offer(errors[name], layers[name][f'{key}_before'] - layers[name][f'{key}_after'])
        for name in errors
    }
    try:
        chosen = choose_within(offers, (1 - budget.share) * total)
    except ValueError:
        least = 1 - sum(max(0.0, offer.gain) for offer in offers.values()) / total
        raise ValueError(
            f'no choice of layers reaches {budget.kind}={budget.share}; all that gain {budget.kind} together '
            f'reach {least:.2f} of the detector'
        ) from None
    reasons = {
        name: f'it gains no {budget.kind}'
        if offers[name].gain <= 0
        else 'the budget is met without it'
        for name in offers
    }
    left = {
        name: choice if name not in offers or name in chosen else Choice(None, reasons[name])
        for name, choice in choices.items()
    }
    return Plan(left, offers, total)


def draw_tradeoff(plan: Plan, budget: Budget) -> Figure:
    """Plot the sum of the layers' errors against time or FLOPs, for the best sets of layers.

    Args:
        plan: The plan.
        budget: What was wanted.
    """
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    gains, errors = zip(*frontier(plan.offers))
    axes.plot(
        [1 - gain / plan.total for gain in gains],
        errors,
        marker='.',
        label='the best sets of layers',
    )
    chosen = [plan.offers[name] for name in plan.offers if plan.choices[name].attn_cfg is not None]
    sets = {'chosen': chosen, 'all layers': plan.offers.values()}
    for (label, offers), marker in zip(sets.items(), 'os'):
        share = 1 - sum(offer.gain for offer in offers) / plan.total
        error = sum(offer.error for offer in offers)
        axes.plot(share, error, marker=marker, linestyle='', label=label)
    axes.axvline(budget.share, color='0.6', linewidth=1)
    axes.set(
        xlabel=f'{budget.kind}, of the convolutional detector',
        ylabel="sum of the layers' errors at the outputs",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


@torch.no_grad()
def errors_alone(
    model: nn.Module,
    attention: Mapping[str, dict],
    stages: Sequence[Stage],
    images: Tensor,
    held_out: int,
    seed: int = 0,
    tell: Callable[[int], None] = lambda done: None,
) -> tuple:
    """Convert each layer by itself, and measure what that changes at the outputs.

    Args:
        model: The teacher, in eval mode.
        attention: By the convolution's name, the arguments of its attention.
        stages: What runs the model.
        images: The first stage's input; those at the end measure.
        held_out: How many of them.
        seed: Of the pixels that are fitted to.
        tell: Called with the number of layers that are measured.

    Returns:
        By name, the share of the outputs' variance; and a copy of the model with all of these layers.
    """
    student = copy.deepcopy(model)
    layers = fit_apart(student, attention, stages, images[:-held_out], seed)
    # Each image twice, as in a conversion: both halves then have the same regions in a mask head.
    probe = torch.cat([images[-held_out:]] * 2)
    errors: Dict[str, float] = {}
    for done, (name, layer) in enumerate(layers.items(), 1):
        conv = model.get_submodule(name)
        put(model, name, _Halves(conv, layer))
        try:
            state = run_stages(model, stages, probe)
        finally:
            put(model, name, conv)
        errors[name] = _difference(_tensors(state), len(probe))
        tell(done)
    return errors, student


class _Halves(nn.Module):
    """A convolution for the first half of a batch, its attention for the second."""

    def __init__(self, conv: nn.Conv2d, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.layer = conv, layer

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2)
        return torch.cat([self.conv(first), self.layer(second)])


def _tensors(nested) -> List[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, Mapping):
        nested = nested.values()
    if isinstance(nested, (str, bytes)) or not hasattr(nested, '__iter__'):
        return []
    return [tensor for each in nested for tensor in _tensors(each)]


def _difference(outputs: Sequence[Tensor], batch: int) -> float:
    """Compare the halves of the outputs: the share of each one's variance, then the mean of the shares.

    Scores and boxes differ in scale. What has no dimension of the batch is left out.
    """
    halves = [
        output.chunk(2)
        for output in outputs
        if output.is_floating_point() and output.dim() and len(output) % batch == 0 < len(output)
    ]
    shares = [
        ((x - y).square().mean() / x.var(correction=0).clamp(min=1e-12)).item() for x, y in halves
    ]
    return sum(shares) / len(shares)
