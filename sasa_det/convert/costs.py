"""What layers and models cost before and after a conversion: parameters, FLOPs, measured time."""

import statistics
import time
from functools import partial
from typing import Callable, Dict, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..evaluation.costs import count_costs
from .walk import Calls, Stage, run_stages

_ROUNDS = 5


def compare_layers(
    teacher: nn.Module, student: nn.Module, calls: Mapping[str, Calls]
) -> Dict[str, dict]:
    """Compare each convolution with its attention, for one image.

    Args:
        teacher: The convolutional model.
        student: The converted one.
        calls: How each layer is called.

    Returns:
        By name: parameters, GFLOPs and milliseconds, 'before' and 'after'.
    """
    device = next(teacher.parameters()).device
    rows = {}
    for name, each in calls.items():
        layers = [model.get_submodule(name) for model in (teacher, student)]
        inputs = [torch.randn(shape, device=device) for shape, _ in each]
        seconds = alternate([partial(_run_all, layer, inputs) for layer in layers], device)
        rows[name] = _before_and_after(layers, inputs, seconds)
    return rows


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


def alternate(runs: Sequence[Callable], device, rounds: int = _ROUNDS) -> list:
    """Measure functions in turn, so that what else the machine does meets all of them.

    Args:
        runs: The functions.
        device: What they compute on.
        rounds: How often each is run, after once to warm up.

    Returns:
        The median of each, in seconds.
    """
    seconds = [[] for _ in runs]
    with torch.no_grad():
        for number in range(rounds + 1):
            for run, taken in zip(runs, seconds):
                _wait(device)
                begin = time.perf_counter()
                run()
                _wait(device)
                if number:
                    taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in seconds]


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


def _run_all(layer: nn.Module, inputs: Sequence[Tensor]) -> None:
    for x in inputs:
        layer(x)


def _wait(device) -> None:
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


class _Run(nn.Module):
    def __init__(self, model: nn.Module, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.model, self._stages = model, stages

    def forward(self, x):
        return run_stages(self.model, self._stages, x)
