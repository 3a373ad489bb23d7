"""How a command prepares its own process."""

from contextlib import ExitStack
from functools import cache

# Never closed: a command's process loads checkpoints with our loaders until it ends.
_UNTIL_THE_END = ExitStack()


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
