"""Letting PyPI's torchvision be imported beside a CPU build of torch.

mmpretrain needs torchvision, for its transforms only. PyPI's wheels are built for CUDA: beside a CPU
build of torch their C++ operators do not load, and the import fails over two that are not there.
"""

from importlib.util import find_spec

import torch

_SCHEMAS = (
    'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
)
_libraries = []


def declare_missing_ops() -> None:
    """Declare the operators whose absence keeps torchvision from being imported.

    Declared, they raise where they are called, as torchvision's operators do that it does not look for.
    Nothing is done without mmpretrain, or where torchvision can be imported. mmdet imports mmpretrain
    where there is one, so this comes before mmdet.

    Examples:
        >>> declare_missing_ops()
    """
    if find_spec('mmpretrain') is None or find_spec('torchvision') is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if 'torchvision::nms does not exist' not in str(error):
            raise
        library = torch.library.Library('torchvision', 'DEF')
        for schema in _SCHEMAS:
            library.define(schema)
        _libraries.append(library)  # what a library declares goes when it does
        import torchvision  # noqa: F401
