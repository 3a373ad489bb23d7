"""What layers and models cost before and after a conversion: parameters, FLOPs, measured time."""

import statistics
import time
from functools import partial
from itertools import count
from typing import Callable, Dict, Iterator, List, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..evaluation.costs import count_costs
from .walk import Calls, Stage, run_stages

# Functions are timed in at least so many rounds, and then until so many seconds are over, in at most so many.
LEAST, SECONDS, MOST = 5, 5.0, 50


def compare_layers(
    teacher: nn.Module,
    student: nn.Module,
    calls: Mapping[str, Calls],
    stages: Sequence[Stage],
    image: Tensor,
) -> Dict[str, dict]:
    """Compare each convolution with its attention, for one image.

    The layers are timed in the models' runs. By itself, a layer would find its input in the caches.

    Args:
        teacher: The convolutional model.
        student: The converted one.
        calls: How each layer is called.
        stages: What runs the models.
        image: (1, 3, H, W).

    Returns:
        By name: parameters, GFLOPs and milliseconds, 'before' and 'after'.
    """
    models = (teacher, student)
    runs = [_TimedRun(model, list(calls), stages, image) for model in models]
    taken = {name: ([], []) for name in calls}
    try:
        for _ in take_turns(runs, image.device):
            for name, both in taken.items():
                for seconds, run in zip(both, runs):
                    seconds.append(run.seconds[name])
    finally:
        for run in runs:
            run.end()
    return {
        name: _before_and_after(
            [model.get_submodule(name) for model in models],
            [torch.zeros(shape, device=image.device) for shape, _ in calls[name]],
            list(map(statistics.median, both)),
        )
        for name, both in taken.items()
    }


def compare_models(
    teacher: nn.Module, student: nn.Module, stages: Sequence[Stage], image: Tensor
) -> dict:
    """Compare two models on one image; without what follows their heads.

    Args:
        teacher: The convolutional model.
        student: The converted one.
        stages: What runs them.
        image: (1, 3, H, W).

    Returns:
        Parameters, GFLOPs and milliseconds, 'before' and 'after'.
    """
    runs = [_Run(model, stages) for model in (teacher, student)]
    seconds = alternate([partial(run, image) for run in runs], image.device)
    return _before_and_after(runs, [image], seconds)


def cost_of(model: nn.Module, stages: Sequence[Stage], image: Tensor) -> dict:
    """Measure one model on one image; without what follows its head.

    Args:
        model: The model.
        stages: What runs it.
        image: (1, 3, H, W).

    Returns:
        'parameters', 'gflops' and 'ms'.
    """
    run = _Run(model, stages)
    return _costs(run, [image], *alternate([partial(run, image)], image.device))


def share_of_time(
    teacher: nn.Module, student: nn.Module, stages: Sequence[Stage], image: Tensor
) -> float:
    """Measure how much of the convolutional model's time a converted one takes.

    Args:
        teacher: The convolutional model.
        student: The converted one.
        stages: What runs them.
        image: (1, 3, H, W).
    """
    before, after = alternate(
        [partial(run_stages, model, stages, image) for model in (teacher, student)], image.device
    )
    return after / before


def alternate(runs: Sequence[Callable], device, least: int = LEAST) -> List[float]:
    """Measure functions in turn.

    Args:
        runs: The functions.
        device: What they compute on.
        least: Number of rounds, at least.

    Returns:
        The median of each, in seconds.
    """
    return [statistics.median(taken) for taken in zip(*take_turns(runs, device, least))]


def take_turns(runs: Sequence[Callable], device, least: int = LEAST) -> Iterator[List[float]]:
    """Run functions in turn, so that what else the machine does meets all of them.

    Args:
        runs: The functions; before the first round, each is run once to warm up.
        device: What they compute on.
        least: Number of rounds, at least.

    Yields:
        For each round, the seconds that each function took.
    """
    for run in runs:
        _seconds(run, device)
    begin = time.perf_counter()
    for number in count(1):
        yield [_seconds(run, device) for run in runs]
        if number >= least and (number >= MOST or time.perf_counter() - begin >= SECONDS):
            return


@torch.no_grad()
def _seconds(run: Callable, device) -> float:
    _wait(device)
    begin = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begin


def _before_and_after(
    modules: Sequence[nn.Module], inputs: Sequence[Tensor], seconds: Sequence[float]
) -> dict:
    return {
        f'{key}_{when}': value
        for when, module, took in zip(('before', 'after'), modules, seconds)
        for key, value in _costs(module, inputs, took).items()
    }


def _costs(module: nn.Module, inputs: Sequence[Tensor], seconds: float) -> dict:
    costs = [count_costs(module, x) for x in inputs]
    return dict(
        parameters=costs[0].parameters,
        gflops=sum(cost.flops for cost in costs) / 1e9,
        ms=1000 * seconds,
    )


def _wait(device) -> None:
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


class _Run(nn.Module):
    def __init__(self, model: nn.Module, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.model, self._stages = model, stages

    def forward(self, x):
        return run_stages(self.model, self._stages, x)


class _TimedRun:
    """Runs a model, and times some of its layers meanwhile.

    Attributes:
        seconds: By the layer's name, those of all of its calls in the last run.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], stages: Sequence[Stage], image: Tensor
    ) -> None:
        self._run = partial(run_stages, model, stages, image)
        self._names, self._device = names, image.device
        self._hooks = []
        for name in names:
            layer = model.get_submodule(name)
            self._hooks.append(layer.register_forward_pre_hook(partial(self._begin, name)))
            self._hooks.append(layer.register_forward_hook(partial(self._end, name)))

    def __call__(self) -> None:
        self.seconds = dict.fromkeys(self._names, 0.0)
        self._run()

    def _begin(self, name: str, *_) -> None:
        _wait(self._device)
        self.seconds[name] -= time.perf_counter()

    def _end(self, name: str, *_) -> None:
        _wait(self._device)
        self.seconds[name] += time.perf_counter()

    def end(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
