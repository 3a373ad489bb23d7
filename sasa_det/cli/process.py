"""What a command does to its own process before it works."""

from contextlib import ExitStack
from functools import cache

# Left open: a command's process loads checkpoints by our loaders until it ends.
_UNTIL_THE_END = ExitStack()


@cache
def prepare() -> None:
    """Register all parts, and have all checkpoints of this process loaded by our loaders.

    The process is the command's own, so that mmengine's loaders may be swapped for good, and torchvision be
    helped where it would not import. ``import sasa_det`` does neither.

    Raises:
        ImportError: The installed stack is not supported; says what to mend.
    """
    from ..environment.stack import require_stack

    require_stack()
    from ..environment.torchvision_ops import declare_missing_ops

    declare_missing_ops()
    from ..checkpoints import safe_loading

    _UNTIL_THE_END.enter_context(safe_loading())
    from .. import register

    register()
