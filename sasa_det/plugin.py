"""What mmengine and mmdet are told of sasa_det, once somebody imports them. Nothing of theirs is replaced."""

from importlib import import_module
from types import ModuleType

from _sasa_det_startup import start, when_imported

PARTS = 'sasa_det.parts'
# Those in which something of ours is registered.
REGISTRIES = ('MODELS', 'DATASETS', 'HOOKS', 'MODEL_WRAPPERS')


def connect() -> None:
    """Tell those that are imported already, and the others as soon as they are.

    Importing sasa_det does it. docs/faq.md lists the effects and their reasons.

    Examples:
        >>> connect()
    """
    start()
    when_imported('mmengine.registry', _add_convolution)
    when_imported('mmengine.logging.history_buffer', _allow_checkpoint_types)
    when_imported('mmengine.analysis.complexity_analysis', _count_flops)
    when_imported('mmdet.registry', _add_location)
    when_imported('mmpretrain.registry', _add_location)


def register() -> None:
    """Register all parts now, where a config leaves it to the first question of a registry.

    Raises:
        ImportError: The installed stack is not supported; says what to mend.

    Examples:
        >>> register()
        >>> from mmdet.registry import MODELS
        >>> 'SASAResNet' in MODELS
        True
    """
    from .environment.stack import require_stack

    require_stack()
    import_module(PARTS)


def build_sasa(*args, **kwargs):
    """Build what ``conv_cfg=dict(type='SASA')`` stands for; see :func:`sasa_det.layers.build_sasa`."""
    from .layers import build_sasa as build

    return build(*args, **kwargs)


def _add_convolution(registry: ModuleType) -> None:
    # In mmengine's own, as mmcv's convolutions are, so that every project of the family finds it.
    if 'SASA' not in registry.MODELS.module_dict:
        registry.MODELS.register_module('SASA', module=build_sasa)


def _add_location(registry: ModuleType) -> None:
    for name in REGISTRIES:
        each = getattr(registry, name)
        if each._imported:  # it was asked before, and does not look again
            import_module(PARTS)
        elif PARTS not in each._locations:
            # A new list: the old one may be shared by all registries that were given none.
            each._locations = [*each._locations, PARTS]


def _allow_checkpoint_types(_: ModuleType) -> None:
    from .checkpoints.types import allow_checkpoint_types

    allow_checkpoint_types()


def _count_flops(complexity_analysis: ModuleType) -> None:
    from .ops.flop_counters import register_with_mmengine

    register_with_mmengine(complexity_analysis)
