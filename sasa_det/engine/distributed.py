"""Data-parallel training on the CPU, where mmengine's launcher and wrapper assume GPUs.

``torchrun --nproc_per_node=2 -m sasa_det train CONFIG --launcher pytorch`` runs mmdet's train.py in
two processes. On a CPU, with small maps, two processes of one thread are much faster than one
process of two threads.
"""

import os
from datetime import timedelta

import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class AnyDeviceDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's wrapper of a data-parallel model, which also takes a model on the CPU.

    mmengine assigns a GPU to each process, which torch refuses for a model on the CPU. A config
    selects this wrapper by ``model_wrapper_cfg=dict(type='AnyDeviceDistributedDataParallel')``.

    Args:
        module: The model.
        device_ids: The process's GPU; ignored if the model is on the CPU.
        kwargs: Those of :class:`mmengine.model.MMDistributedDataParallel`.
    """

    def __init__(self, module, device_ids=None, **kwargs) -> None:
        on_cpu = all(parameter.device.type == 'cpu' for parameter in module.parameters())
        super().__init__(module=module, device_ids=None if on_cpu else device_ids, **kwargs)


def join_processes() -> None:
    """Connect the processes that torchrun started, by gloo, unless there are GPUs.

    On GPUs mmengine itself connects them, and it keeps an existing process group.

    Examples:
        >>> join_processes()  # not started by torchrun: nothing to do
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ or torch.cuda.is_available():
        return
    torch.distributed.init_process_group('gloo', timeout=timedelta(minutes=30))
