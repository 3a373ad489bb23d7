"""Which layers are worth converting, for a wanted time, number of FLOPs or AP?

Each layer has a price, the error that its conversion alone makes at the detector's outputs, and a gain, the
time or FLOPs that it saves. Dynamic programming finds the set that gains enough for the least sum of errors.
Gains of time do not add up exactly, so the time of the whole detector is measured, and another set is chosen
until it is as wanted. For a wanted AP, the sets of least error are converted and their AP is measured.
"""

import copy
from typing import Callable, Dict, List, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from ..layers.replace import put
from .costs import compare_layers, cost_of
from .layers import Choice
from .walk import Calls, Stage, fit_apart, run_stages

# The gains are rounded to so many parts of what is wanted.
_PARTS = 2000
# Images that errors at the outputs are measured on, at most: the detector runs once for each layer.
MOST_PROBES = 8
# Sets of layers whose time is measured, at most, beside all that gain time.
_TRIALS = 6
# By the kind of a budget, what a layer gains.
KINDS = dict(time='ms', flops='gflops', ap='ms')
_NO_TIME = 'no layer gains time on this machine; ask for --budget flops=SHARE instead'
# The word for as little time, or as few FLOPs, as can be had.
LEAST = 'least'


class Budget(NamedTuple):
    """What is wanted of a conversion.

    Attributes:
        kind: 'time', as measured on this machine for one image, 'flops', or 'ap'.
        amount: Of the convolutional detector's time or FLOPs, a share, or 0 for as little as can be had; of
            AP, the change, at most 0.
    """

    kind: str
    amount: float


class Offer(NamedTuple):
    """What the conversion of a layer costs and saves.

    Attributes:
        error: At the outputs, the share of their variance.
        gain: Milliseconds or GFLOPs per image; negative where attention takes more.
    """

    error: float
    gain: float


class Offers(NamedTuple):
    """What the conversion of each layer costs and saves.

    Attributes:
        layers: By name.
        total: Milliseconds or GFLOPs of the convolutional detector.
    """

    layers: Dict[str, Offer]
    total: float

    def sums(self, names: Sequence[str]) -> tuple:
        """Add up layers.

        Args:
            names: Their names.

        Returns:
            What is left of the convolutional detector's time or FLOPs, a share; and the sum of errors.
        """
        chosen = [self.layers[name] for name in names]
        error, gain = (sum(values) for values in zip(*chosen)) if chosen else (0.0, 0.0)
        return 1 - gain / self.total, error


def read_budget(text: str) -> Budget:
    """Read a budget.

    Args:
        text: Such as ``time=0.8``, ``time=least`` or ``ap=-1.0``.

    Raises:
        ValueError: It is not of this form.

    Examples:
        >>> read_budget('time=0.8')
        Budget(kind='time', amount=0.8)
    """
    kind, _, amount = text.partition('=')
    if kind in ('time', 'flops') and amount == LEAST:
        return Budget(kind, 0.0)
    try:
        number = float(amount)
    except ValueError:
        number = float('nan')
    if kind not in KINDS or not (-100 < number <= 0 if kind == 'ap' else 0 < number <= 1):
        raise ValueError(
            'a budget is time=SHARE or flops=SHARE, with a share between 0 and 1 or the word least, or '
            f'ap=CHANGE, with a change of at most 0 such as -1.0, but is {text!r}'
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


def best_sets(offers: Mapping[str, Offer], points: int = 20) -> List[List[str]]:
    """List the sets of layers of the least sums of errors, for gains from nothing to all that there is.

    Args:
        offers: By name.
        points: Number of gains.

    Returns:
        The names in each set, which differ; the first is empty.
    """
    most = sum(max(0.0, offer.gain) for offer in offers.values())
    found = [[]]
    for point in range(1, points + 1):
        names = choose_within(offers, most * point / points * (1 - 1e-9))
        if names != found[-1]:
            found.append(names)
    return found


def choose_for_ap(
    offers: Mapping[str, Offer], change: float, measure: Callable[[List[str]], float]
) -> List[str]:
    """Choose layers that gain the most time for a change of AP, by bisection along the best sets.

    Args:
        offers: By name.
        change: That is accepted, at most 0.
        measure: Gives the change of AP once these layers are converted.

    Returns:
        The names.

    Raises:
        ValueError: No layer gains time, or the smallest set changes AP by more.

    Examples:
        >>> offers = dict(a=Offer(0.1, 3.0), b=Offer(0.02, 2.0))
        >>> choose_for_ap(offers, -1.0, lambda names: -0.5 * len(names))
        ['a', 'b']
        >>> choose_for_ap(offers, -0.7, lambda names: -0.5 * len(names))
        ['a']
    """
    sets = best_sets(offers)
    if len(sets) == 1:
        raise ValueError(_NO_TIME)
    fits, fails, smallest = 0, len(sets), change
    while fails - fits > 1:
        middle = (fits + fails) // 2
        smallest = measure(sets[middle])
        if smallest >= change:
            fits = middle
        else:
            fails = middle
    if not fits:
        raise ValueError(
            f'no choice of layers reaches ap={change:g}; the fewest layers that gain time change AP by '
            f'{smallest:.1f}'
        )
    return sets[fits]


def choose_for_time(
    offers: Offers, share: float, measure: Callable[[List[str]], float]
) -> List[str]:
    """Choose the layers of the least sum of errors with which the whole detector is as fast as is wanted.

    The measured time of all useful layers together says what the sums of gains are worth. What a chosen set
    then takes too much, or too little, is added to what is wanted of the next one.

    Args:
        offers: What each layer costs and saves.
        share: Of the detector's time, or 0 for the least that can be had.
        measure: Gives the share of time with these layers converted.

    Returns:
        The names; those of a set that was measured to be fast enough.

    Raises:
        ValueError: All useful layers together are too slow; says what they reach.

    Examples:
        >>> offers = Offers(dict(a=Offer(0.1, 3.0), b=Offer(0.02, 2.0)), 10.0)
        >>> measured = [1.0, 0.9, 0.75]  # by the number of layers
        >>> choose_for_time(offers, 0.85, lambda names: measured[len(names)])
        ['a', 'b']
        >>> choose_for_time(offers, 0.92, lambda names: measured[len(names)])
        ['b']
    """
    if share == 1:
        return []
    useful = useful_layers(offers.layers)
    least = measure(useful) if useful else 1.0
    if not share:
        return useful if least < 1 else []
    if not useful:
        raise ValueError(_NO_TIME)
    if least > share:
        raise ValueError(_out_of_reach(Budget('time', share), least))
    most = sum(offers.layers[name].gain for name in useful)
    worth = most / (1 - least)  # the gain that stands for all of the detector's time
    wanted = (1 - share) * worth
    tried = {tuple(useful): least}
    for _ in range(_TRIALS):
        names = tuple(choose_within(offers.layers, min(wanted, most * (1 - 1e-9))))
        if not names or names in tried:
            break
        tried[names] = measure(list(names))
        wanted += (tried[names] - share) * worth
    enough = [names for names, taken in tried.items() if taken <= share]
    return list(min(enough, key=lambda names: offers.sums(names)[1]))


def find_offers(
    kind: str,
    model: nn.Module,
    choices: Mapping[str, Choice],
    stages: Sequence[Stage],
    images: Tensor,
    calls: Mapping[str, Calls],
    seed: int = 0,
    tell: Callable[[int], None] = lambda done: None,
) -> Offers:
    """Measure what the conversion of each layer of a detector costs and saves.

    Args:
        kind: Of the budget.
        model: The convolutional detector.
        choices: What may become of each convolution.
        stages: What runs the detector.
        images: The first stage's input.
        calls: How each layer is called.
        seed: Of the pixels that layers are fitted to.
        tell: Called with the number of layers that are measured.
    """
    attention = {name: choices[name].attn_cfg for name in calls}
    held_out = min(MOST_PROBES, max(1, len(images) // 4))
    errors, student = errors_alone(model, attention, stages, images, held_out, seed, tell)
    layers = compare_layers(model, student, calls, stages, images[:1])
    key = KINDS[kind]
    offers = {
        name: Offer(errors[name], layers[name][f'{key}_before'] - layers[name][f'{key}_after'])
        for name in errors
    }
    return Offers(offers, cost_of(model, stages, images[:1])[key])


def spend(budget: Budget, offers: Offers, measure: Callable[[List[str]], float]) -> List[str]:
    """Choose the layers to convert, such that a detector meets a budget.

    Args:
        budget: What is wanted.
        offers: What each layer costs and saves.
        measure: Gives what becomes of the detector once these layers are converted: the share of its time, or
            the change of AP for a budget of AP. FLOPs are not measured.

    Returns:
        Their names.

    Raises:
        ValueError: No set of layers meets it; says what can be had.
    """
    if budget.kind == 'ap':
        return choose_for_ap(offers.layers, budget.amount, measure)
    if budget.kind == 'time':
        return choose_for_time(offers, budget.amount, measure)
    useful = useful_layers(offers.layers)
    least, _ = offers.sums(useful)
    if not budget.amount:
        return useful
    if least > budget.amount:
        raise ValueError(_out_of_reach(budget, least))
    return choose_within(offers.layers, (1 - budget.amount) * offers.total)


def useful_layers(offers: Mapping[str, Offer]) -> List[str]:
    """List the layers that gain something.

    Args:
        offers: By name.

    Examples:
        >>> useful_layers(dict(a=Offer(0.1, 3.0), b=Offer(0.0, -1.0)))
        ['a']
    """
    return [name for name, offer in offers.items() if offer.gain > 0]


def _out_of_reach(budget: Budget, least: float) -> str:
    return (
        f'no choice of layers reaches {budget.kind}={budget.amount}; all that gain {budget.kind} together '
        f'reach {least:.3f} of the detector'
    )


def choices_within(
    budget: Budget, choices: Mapping[str, Choice], offers: Offers, chosen: Sequence[str]
) -> Dict[str, Choice]:
    """Say what becomes of each convolution once a budget is spent.

    Args:
        budget: What was wanted.
        choices: What might become of each.
        offers: What each costs and saves.
        chosen: Those that become attention.
    """
    gain = 'flops' if budget.kind == 'flops' else 'time'
    others = 'it would cost AP' if budget.kind == 'ap' else 'the budget is met without it'
    return {
        name: choice
        if name not in offers.layers or name in chosen
        else Choice(None, f'it gains no {gain}' if offers.layers[name].gain <= 0 else others)
        for name, choice in choices.items()
    }


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
