"""How a command prepares its own process."""

import atexit
import warnings
from contextlib import ExitStack
from functools import cache

# A command's process loads checkpoints with our loaders to its end. Closed before Python takes modules apart.
_UNTIL_THE_END = ExitStack()
atexit.register(_UNTIL_THE_END.close)


def hide_dependencies_warnings() -> None:
    """Hide warnings that tell mmengine, mmdet, mmcv and mmpretrain what to change in their code.

    Warnings of a user's own code and of this package are shown. ``PYTHONWARNINGS`` and ``-W`` have priority.

    Examples:
        >>> with warnings.catch_warnings():
        ...     hide_dependencies_warnings()
    """
    warnings.filterwarnings('ignore', message='.*pkg_resources is deprecated', append=True)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings(
            'ignore', category=category, module=r'mm(engine|det|cv|pretrain)(\.|$)', append=True
        )


@cache
def prepare() -> None:
    """Register all parts, and load all checkpoints of this process with our loaders.

    The process belongs to the command. So mmengine's loaders are replaced for good, and torchvision's
    missing operators are declared. ``import sasa_det`` does neither.

    Raises:
        ImportError: The installed stack is not supported; says what to fix.
    """
    from ..environment.stack import require_stack

    require_stack()
    from ..environment.torchvision_ops import declare_missing_ops

    declare_missing_ops()
    from ..checkpoints import safe_loading

    _UNTIL_THE_END.enter_context(safe_loading())
    from .. import register

    register()
