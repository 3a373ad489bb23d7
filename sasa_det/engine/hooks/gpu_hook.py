"""What a run on NVIDIA GPUs needs: channels_last, and mmcv's ops under bfloat16."""

from typing import List

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from torch import Tensor, nn

from ...models.gpu import prepare_for_gpu, without_bfloat16


@HOOKS.register_module()
class GpuHook(Hook):
    """Prepare the model on a GPU by :func:`sasa_det.models.gpu.prepare_for_gpu`, and do nothing elsewhere.

    Checkpoints hold the same as without this hook: values and layouts. A run may resume on a CPU what a GPU
    began, and the reverse. Under DDP the weights are laid out after the model was wrapped. So torch warns once,
    in the first iteration, that gradients have other strides than its buckets; it then makes new buckets.

    Args:
        device_type: Type of the devices to prepare for.
    """

    # After hooks that add weights to a checkpoint.
    priority = 'VERY_LOW'

    def __init__(self, device_type: str = 'cuda') -> None:
        self.device_type = device_type

    def before_train(self, runner) -> None:
        """Prepare the model and the optimizer's state for training.

        Args:
            runner: The runner.
        """
        self._prepare(runner)
        if not self._on_gpu(runner):
            return
        for wrapper in _optim_wrappers(runner):
            # A resumed state is contiguous, and a fused step needs it laid out as the weights are.
            for state in wrapper.optimizer.state.values():
                for name, x in state.items():
                    if _is_map(x):
                        state[name] = x.to(memory_format=torch.channels_last)
            if getattr(wrapper, 'cast_dtype', None) == torch.bfloat16:
                for module in without_bfloat16(_model(runner)):
                    runner.logger.warning(
                        f"{module} computes by a kernel of mmcv, and mmcv 2.1's kernels for GPUs take float32 "
                        "and float16 only. If it raises an error, set optim_wrapper.dtype='float16'"
                    )

    def before_val(self, runner) -> None:
        """Prepare the model for validation.

        Args:
            runner: The runner.
        """
        self._prepare(runner)

    def before_test(self, runner) -> None:
        """Prepare the model for a test.

        Args:
            runner: The runner.
        """
        self._prepare(runner)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Lay the checkpoint's tensors out as torch does by default.

        Args:
            runner: The runner.
            checkpoint: Its content.
        """
        if self._on_gpu(runner):
            _make_contiguous(checkpoint)

    def _on_gpu(self, runner) -> bool:
        return any(x.device.type == self.device_type for x in runner.model.parameters())

    def _prepare(self, runner) -> None:
        if self._on_gpu(runner):
            prepare_for_gpu(_model(runner))


def _model(runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _optim_wrappers(runner) -> List[OptimWrapper]:
    wrapper = runner.optim_wrapper
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def _is_map(x) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4


def _make_contiguous(checkpoint: dict) -> None:
    for name, x in checkpoint.items():
        if isinstance(x, dict):
            _make_contiguous(x)
        elif _is_map(x):
            # Not contiguous(), which keeps the odd strides of a dimension of size one.
            checkpoint[name] = x.clone(memory_format=torch.contiguous_format)
