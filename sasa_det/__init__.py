"""Stand-alone self-attention for MMDetection.

Importing the package checks the installed stack and registers everything, so that
``custom_imports = dict(imports=['sasa_det'])`` is all that a config needs.
"""

import sys

from .stack import require_stack
from .version import __version__

__all__ = ['__version__']


def _register() -> None:
    """Check the stack, allow mmengine's checkpoints to be loaded, register all parts."""
    require_stack()
    from .torchvision_ops import declare_missing_ops

    declare_missing_ops()
    from .checkpoint import allow_checkpoint_types

    allow_checkpoint_types()
    from . import cpu_distributed, data, layers, models, ops, registry  # noqa: F401
    from .analysis import flops

    flops.register()


# The doctor must start where the stack is broken: it says what to mend.
if 'sasa_det.doctor' not in sys.orig_argv:
    _register()
