"""Data-parallel training on the CPU, which mmengine's launcher and wrapper take for the GPU's.

``torchrun --nproc_per_node=2 -m sasa_det train CONFIG --launcher pytorch`` runs mmdet's
train.py in two processes. On a CPU two processes of one thread are much faster than one process of
two threads where maps are small.
"""

import os
from datetime import timedelta

import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class AnyDeviceDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's wrapper of a data-parallel model, for a model on the CPU too.

    mmengine names a GPU for each process, which torch refuses where the model is on the CPU. A config
    asks for it by ``model_wrapper_cfg=dict(type='AnyDeviceDistributedDataParallel')``.

    Args:
        module: The model.
        device_ids: The process's GPU; ignored where the model is on the CPU.
        kwargs: Those of :class:`mmengine.model.MMDistributedDataParallel`.
    """

    def __init__(self, module, device_ids=None, **kwargs) -> None:
        on_cpu = all(parameter.device.type == 'cpu' for parameter in module.parameters())
        super().__init__(module=module, device_ids=None if on_cpu else device_ids, **kwargs)


def join_processes() -> None:
    """Join the processes that torchrun started, by gloo, unless there are GPUs.

    mmengine joins them itself on GPUs, and leaves it where it has been done.

    Examples:
        >>> join_processes()  # not started by torchrun: nothing to do
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ or torch.cuda.is_available():
        return
    torch.distributed.init_process_group('gloo', timeout=timedelta(minutes=30))
