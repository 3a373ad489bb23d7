"""Stand-alone self-attention for MMDetection.

Importing the package checks the installed stack and registers everything, so that
``custom_imports = dict(imports=['sasa_det'])`` is all that a config needs.
"""

import sys
from functools import cache
from pathlib import Path

from .environment.stack import require_stack
from .version import __version__

__all__ = ['__version__', 'register']

# The doctor must start where the stack is broken, since it says what to mend, and the command line
# where it is slow to import: they register when they need to.
_MODULES = {'sasa_det.cli', 'sasa_det.environment.doctor'}
_SCRIPT = 'sasa-det'


@cache
def register() -> None:
    """Check the stack, allow mmengine's checkpoints to be loaded, register all parts.

    Importing the package does it, but for the command line, which does when it needs to.

    Raises:
        ImportError: The installed stack is not supported; says what to mend.

    Examples:
        >>> register()
        >>> from mmdet.registry import MODELS
        >>> 'SASAResNet' in MODELS
        True
    """
    require_stack()
    from .environment.torchvision_ops import declare_missing_ops

    declare_missing_ops()
    from .checkpoints.loading import allow_checkpoint_types

    allow_checkpoint_types()
    from . import data, layers, models, ops, registry  # noqa: F401
    from .engine import distributed, hooks  # noqa: F401
    from .evaluation import flops

    flops.register()


if not _MODULES.intersection(sys.orig_argv) and _SCRIPT not in (
    Path(argument).name for argument in sys.orig_argv[1:2]
):
    register()
