"""How PyPI's torchvision can be imported beside a CPU build of torch.

mmpretrain needs torchvision, for its transforms only. PyPI's wheels are built for CUDA. Beside a CPU
build of torch their C++ operators do not load, and the import fails for lack of two of them.
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

    Declared operators raise when called, like torchvision's other missing operators. Nothing is done
    without mmpretrain, or if torchvision can be imported. mmdet imports mmpretrain if it is installed,
    so call this before importing mmdet.

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
        _libraries.append(library)  # its declarations last only as long as the library
        import torchvision  # noqa: F401
