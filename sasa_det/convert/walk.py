"""How a network is converted layer by layer, in the order in which it runs.

A batch holds each image twice. Through the first half goes what the teacher computes, through the second what
the student does, so that each layer is fitted to the student's inputs and the teacher's outputs: errors of
earlier layers are corrected rather than piled up. Convolutions that stay are fitted too, from their own weights
on, and batch normalisation follows. All other layers treat both halves alike.

A layer that a stage calls several times, as a head does for each level, is fitted once all calls are known. The
stage is then run again, but no layer computes twice: each goes on from what it kept of the run before, and NaN
marks maps that are left out.
"""

import copy
import time
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.replace import put, replacement
from .fit import fit_static_attention, least_squares_error, refit_convolution
from .layers import is_plain_convolution, write_static_attention
from .moments import NINE, Covariance, Moments, principal_directions

# What runs a part of a model: from the model and what comes in, to what comes out.
Stage = Callable[[nn.Module, object], object]
# Shapes of a module's input and output, for each call in one run of the model on one image.
Calls = List[Tuple[torch.Size, torch.Size]]
# Pixels to fit a layer to, per input of its equations.
SAMPLES_PER_INPUT = 16
# Attention of more channels is fitted in so many directions of most variance: moments grow with the square.
MOST_CHANNELS = 512


class Fitted(NamedTuple):
    """How well a layer was converted.

    Attributes:
        unexplained: Share of the teacher's variance that is left on held-out images.
        unavoidable: The share that a free 3x3 convolution of the student's inputs would leave, by the
            moments.
        seconds: Time to fit it.
    """

    unexplained: float
    unavoidable: float
    seconds: float


def run_stages(model: nn.Module, stages: Sequence[Stage], images: Tensor):
    """Run a model, one stage after the other.

    Args:
        model: The model.
        stages: What runs it.
        images: The first stage's input.

    Returns:
        The last stage's output.

    Examples:
        >>> run_stages(nn.ReLU(), [lambda model, x: model(x)], torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    state = images
    for stage in stages:
        state = stage(model, state)
    return state


def watch_calls(
    model: nn.Module, names: Sequence[str], stages: Sequence[Stage], images: Tensor
) -> Dict[str, Calls]:
    """Run a model and note how some of its modules are called.

    Args:
        model: The model.
        names: Of its modules.
        stages: What runs it.
        images: The first stage's input.

    Returns:
        By name, in the order of the first call; those that are not called are not in it.
    """
    calls: Dict[str, Calls] = {}

    def watch(name):
        def note(module, args, output):
            calls.setdefault(name, []).append((args[0].shape, output.shape))

        return model.get_submodule(name).register_forward_hook(note)

    hooks = [watch(name) for name in names]
    try:
        with torch.no_grad():
            run_stages(model, stages, images)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def walk(
    model: nn.Module,
    attention: Mapping[str, dict],
    stages: Sequence[Stage],
    images: Tensor,
    held_out: int,
    seed: int = 0,
    done: Optional[Mapping[str, dict]] = None,
    tell: Callable[[str, Optional[Fitted], nn.Module], None] = lambda *_: None,
) -> Dict[str, Fitted]:
    """Convert a model's convolutions to attention.

    Args:
        model: The teacher, in eval mode; becomes the student. If interrupted, what was not reached stays.
        attention: By the convolution's name, the arguments of its attention.
        stages: What runs the model, one after the other, each fed by the one before it.
        images: The first stage's input (B, ...).
        held_out: Of the images, how many at the end measure the error rather than be fitted to.
        seed: Of the pixels that are fitted to.
        done: State dicts of layers that were converted before, by name.
        tell: Called with each layer's name and its new module, first without a result, then with it.

    Returns:
        By name, how well the layers were converted, in the order in which they run.
    """
    others = [
        name
        for name, each in model.named_modules()
        if name not in attention and isinstance(each, (_BatchNorm, nn.Conv2d))
    ]
    calls = watch_calls(model, [*attention, *others], stages, images[:1])
    fitting = _Fitting(len(images) - held_out, len(images), seed, tell)
    pairs = {}
    for name, called in calls.items():
        module = model.get_submodule(name)
        if name in attention:
            pairs[name] = _AttentionPair(name, module, dict(attention[name]), called, fitting)
            if done and name in done:
                pairs[name].student.load_state_dict(done[name])
                pairs[name].fitted = True
        elif isinstance(module, nn.Conv2d) and _can_be_refitted(module):
            pairs[name] = _ConvolutionPair(name, module, called, fitting)
        elif isinstance(module, _BatchNorm) and (module.running_mean is None or len(called) == 1):
            put(model, name, _NormPair(module))
    for name, pair in pairs.items():
        put(model, name, pair)
    try:
        with torch.no_grad():
            state = torch.cat([images, images])
            for number, stage in enumerate(stages, 1):
                state = _sweep(stage, model, state, list(pairs.values()), number == len(stages))
    finally:
        for name, module in list(model.named_modules()):
            if isinstance(module, _Pair):
                put(model, name, module.student if module.fitted else module.conv)
            elif isinstance(module, _NormPair):
                put(model, name, module.norm)
    return {
        name: pairs[name].result() for name in calls if name in attention and pairs[name].fitted
    }


def fit_apart(
    model: nn.Module,
    attention: Mapping[str, dict],
    stages: Sequence[Stage],
    images: Tensor,
    seed: int = 0,
) -> Dict[str, nn.Module]:
    """Fit an attention to each convolution by itself: to the teacher's inputs, not to a student's.

    Args:
        model: The teacher, in eval mode; gets all of the layers.
        attention: By the convolution's name, the arguments of its attention.
        stages: What runs the model.
        images: The first stage's input.
        seed: Of the pixels that are fitted to.

    Returns:
        The layers, by name, in the order in which they run.
    """
    calls = watch_calls(model, list(attention), stages, images[:1])
    fitting = _Fitting(len(images), len(images), seed, lambda *_: None)
    pairs = {}
    for name, called in calls.items():
        pair = _AttentionPair(
            name, model.get_submodule(name), dict(attention[name]), called, fitting
        )
        pairs[name] = pair
        # After the convolution itself, so that what follows sees what the teacher computes.
        pair.hook = pair.conv.register_forward_hook(
            lambda conv, args, output, pair=pair: pair.add(args[0], output)  # returns None
        )
    with torch.no_grad():
        run_stages(model, stages, images)
        for name, pair in pairs.items():
            pair.hook.remove()
            pair.fit()
            put(model, name, pair.student)
    return {name: pair.student for name, pair in pairs.items()}


def _sweep(stage: Stage, model: nn.Module, state, pairs: Sequence['_Pair'], is_last: bool):
    """Run a stage until all of its layers are converted; those that levels share are fitted between runs."""
    for pair in pairs:
        pair.begin_stage()
    whole = False
    while True:
        for pair in pairs:
            pair.begin_run(whole)
        output = stage(model, state)
        waiting = [pair for pair in pairs if pair.waits]
        for pair in waiting:
            pair.fit()
        # What follows needs all maps, and so may a layer that reads those of several others.
        incomplete = any(pair.has_left_out for pair in pairs) and not is_last
        if not waiting and (whole or not (incomplete or any(pair.is_behind for pair in pairs))):
            return output
        whole = whole or not waiting


class _Fitting(NamedTuple):
    """What all pairs share: the images of each half to fit to, all of them, a seed, and whom to tell."""

    images: int
    batch: int
    seed: int
    tell: Callable


class _Pair(nn.Module):
    """A convolution for the teacher's half of a batch, and what takes its place in the student's."""

    def __init__(
        self, name: str, conv: nn.Conv2d, student: nn.Module, calls: Calls, fitting: _Fitting
    ) -> None:
        super().__init__()
        self.conv, self.student = conv, student
        self.fitted = self.waits = self._differs = False
        self._name, self._calls, self._fitting = name, calls, fitting
        self._offsets = NINE if conv.kernel_size == (3, 3) else ((0, 0),)
        inputs = len(self._offsets) * min(conv.in_channels, MOST_CHANNELS)
        pixels = sum(output[2] * output[3] for _, output in calls) * fitting.images
        self._share = min(1.0, max(SAMPLES_PER_INPUT * inputs, 2**15) / pixels)
        self._generator = torch.Generator().manual_seed(fitting.seed)
        self._moments = None
        self.begin_stage()
        self.begin_run(whole=False)

    def begin_stage(self) -> None:
        """Forget the calls of the stage before."""
        self._done = set()  # numbers of calls
        self._kept = {}  # by number, what waits: the teacher's output and the student's input

    def begin_run(self, whole: bool) -> None:
        """Count calls from the first on.

        Args:
            whole: Compute all maps, also those that no layer is known to wait for.
        """
        self._call, self._whole = -1, whole
        self.has_left_out = False
        if whole:
            self._kept.clear()

    @property
    def is_behind(self) -> bool:
        """Whether a call of this run has given nothing yet, in this run or in one before."""
        return self._call >= len(self._done)

    def forward(self, x: Tensor) -> Tensor:
        self._call += 1
        if self.fitted and self._call in self._kept:
            return self._finish(*self._kept.pop(self._call))
        teacher, student = x.chunk(2)
        if not self._whole and (self._call in self._done or _is_marked(teacher)):
            self.has_left_out |= self._call in self._done
            return self._marked(x)
        truth = self.conv(teacher)
        if not truth.isfinite().all():
            raise ValueError(
                f'the outputs of {self._name} must be finite to convert the model, but some are infinite or NaN'
            )
        reached = not _is_marked(student)
        if reached and not self.fitted:
            self._differs |= not torch.equal(teacher, student)
            self.add(student, truth)
            if len(self._calls) == 1:
                self.fit()
        if reached and self.fitted:
            return self._finish(truth, student)
        if self._whole:
            return torch.cat([truth, torch.full_like(truth, float('nan'))])
        if reached:
            # A copy, which nothing changes in place and which does not hold the teacher's half.
            self._kept[self._call] = truth, student.clone()
        return self._marked(x)

    def _finish(self, truth: Tensor, student: Tensor) -> Tensor:
        result = self.student(student)
        if self._call not in self._done:
            self._done.add(self._call)
            self._measure(truth, result)
        return torch.cat([truth, result])

    def _marked(self, x: Tensor) -> Tensor:
        size = (-(-edge // self.conv.stride[0]) for edge in x.shape[2:])
        return x.new_full((len(x), self.conv.out_channels, *size), float('nan'))

    def add(self, student: Tensor, truth: Tensor) -> None:
        """Add the student's inputs and the teacher's outputs to what is fitted to."""
        if self._moments is None:
            self._moments = Moments(
                student.shape[1],
                self.conv.out_channels,
                self.conv.stride[0],
                self.conv.dilation[0],
                self._offsets,
                device=student.device,
            )
        count = _images_of(student, self._fitting)
        self._moments.add(student[:count], truth[:count], self._share, self._generator)
        self.waits = True

    def fit(self) -> None:
        """Fit the student's layer to what was added."""
        covariance = self._moments.covariance()
        self._moments, self.waits, self.fitted = None, False, True
        self._fit(covariance)

    def _fit(self, covariance: Covariance) -> None:
        raise NotImplementedError

    def _measure(self, truth: Tensor, result: Tensor) -> None:
        pass


class _AttentionPair(_Pair):
    """Attention in the place of the student's convolution."""

    def __init__(
        self, name: str, conv: nn.Conv2d, attn_cfg: dict, calls: Calls, fitting: _Fitting
    ) -> None:
        attention = replacement(conv, attn_cfg).to(conv.weight).eval()
        super().__init__(name, conv, attention, calls, fitting)
        self._unavoidable = self._seconds = float('nan')
        self._left, self._variance = [], []
        self._basis = None  # (C, directions)

    def add(self, student: Tensor, truth: Tensor) -> None:
        if self.conv.in_channels > MOST_CHANNELS:
            if self._basis is None:
                self._basis = principal_directions(student, MOST_CHANNELS)
            student = torch.einsum('bchw,cd->bdhw', student, self._basis)
        super().add(student, truth)

    def _fit(self, covariance: Covariance) -> None:
        begin = time.perf_counter()
        self._fitting.tell(self._name, None, self.student)
        layer, weight = self.student, self.conv.weight
        if self._basis is not None:
            weight = torch.einsum('ocij,cd->odij', weight, self._basis)
        fitted = fit_static_attention(
            covariance,
            weight,
            layer.num_heads,
            layer.hidden_channels // layer.num_heads,
            layer.kernel_size,
        )
        if self._basis is not None:
            fitted = fitted._replace(value=self._basis @ fitted.value)
        write_static_attention(self.student, fitted, self._generator)
        self._unavoidable = least_squares_error(covariance)
        self._seconds = time.perf_counter() - begin
        self._fitting.tell(self._name, self.result(fitted.unexplained), self.student)

    def _measure(self, truth: Tensor, result: Tensor) -> None:
        count = _images_of(truth, self._fitting)
        count = 0 if count == len(truth) else count  # without held-out images, on all
        truth, result = truth[count:], result[count:]
        self._left.append((truth - result).square().sum((0, 2, 3)))
        deviation, mean = torch.var_mean(truth, (0, 2, 3), correction=0)
        self._variance.append((deviation, mean, truth[:, 0].numel()))

    def result(self, unexplained: Optional[float] = None) -> Fitted:
        """Give the error on the held-out images, or a given one before it is measured."""
        if self._left:
            count = sum(number for *_, number in self._variance)
            mean = sum(mean * number for _, mean, number in self._variance) / count
            total = sum(
                (deviation + (own - mean).square()) * number
                for deviation, own, number in self._variance
            )
            unexplained = (sum(self._left).sum() / total.sum().clamp(min=1e-12)).item()
        elif unexplained is None:
            unexplained = float('nan')
        return Fitted(unexplained, self._unavoidable, self._seconds)


class _ConvolutionPair(_Pair):
    """A convolution whose weights correct what earlier layers of the student do not compute exactly."""

    def __init__(self, name: str, conv: nn.Conv2d, calls: Calls, fitting: _Fitting) -> None:
        super().__init__(name, conv, copy.deepcopy(conv), calls, fitting)

    def _fit(self, covariance: Covariance) -> None:
        if self._differs:
            refit_convolution(self.student, covariance)


class _NormPair(nn.Module):
    """Batch normalisation whose statistics follow what conversion changed in its input.

    The running statistics change as the statistics of the student's half differ from those of the teacher's, so
    that they stay those of the training images, of which there were many more.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm = norm
        self._teacher = copy.deepcopy((norm.running_mean, norm.running_var))
        self._adjusted = False

    def forward(self, x: Tensor) -> Tensor:
        teacher, student = x.chunk(2)
        if self.norm.running_mean is None:  # normalised by each batch's own statistics
            return torch.cat([self.norm(teacher), self.norm(student)])
        if not self._adjusted and not _is_marked(student):
            self._adjusted = True
            if not torch.equal(teacher, student):
                self._adjust(teacher, student)
        mean, variance = self._teacher
        norm = self.norm
        truth = F.batch_norm(teacher, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)
        return torch.cat([truth, norm(student)])

    def _adjust(self, teacher: Tensor, student: Tensor) -> None:
        around = [0, *range(2, teacher.dim())]  # all but the channels
        before, before_mean = torch.var_mean(teacher, around)
        after, after_mean = torch.var_mean(student, around)
        ratio = torch.where(before > 0, after / before.clamp(min=1e-12), torch.ones_like(after))
        mean, variance = self._teacher
        self.norm.running_mean.copy_(after_mean + (mean - before_mean) * ratio.sqrt())
        self.norm.running_var.copy_(variance * ratio)


def _is_marked(student: Tensor) -> bool:
    return bool(student[:1].isnan().any())


def _can_be_refitted(conv: nn.Conv2d) -> bool:
    large = conv.kernel_size == (3, 3) and conv.in_channels > MOST_CHANNELS
    return is_plain_convolution(conv) and not large


def _images_of(half: Tensor, fitting: _Fitting) -> int:
    """Count the samples of a half to fit to; a head of regions has several for each image."""
    return max(1, len(half) * fitting.images // fitting.batch)
