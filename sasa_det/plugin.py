"""How sasa_det plugs into mmengine and mmdet once they are imported. Nothing of theirs is replaced."""

from importlib import import_module
from types import ModuleType

from _sasa_det_startup import start, when_imported

PARTS = 'sasa_det.parts'
# The registries that hold parts of ours.
REGISTRIES = ('MODELS', 'DATASETS', 'HOOKS', 'MODEL_WRAPPERS')


def connect() -> None:
    """Plug into the modules that are already imported, and into the others once they are.

    ``import sasa_det`` calls this. docs/faq.md lists the effects and their reasons.

    Examples:
        >>> connect()
    """
    start()
    when_imported('mmengine.registry', _add_convolutions)
    when_imported('mmengine.logging.history_buffer', _allow_checkpoint_types)
    when_imported('mmengine.analysis.complexity_analysis', _count_flops)
    when_imported('mmdet.registry', _add_location)
    when_imported('mmpretrain.registry', _add_location)


def register() -> None:
    """Register all parts now; with a config this happens at a registry's first lookup.

    Raises:
        ImportError: The installed stack is not supported; says what to fix.

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
    """Build the layer of ``conv_cfg=dict(type='SASA')``; see :func:`sasa_det.layers.build_sasa`."""
    from .layers import build_sasa as build

    return build(*args, **kwargs)


def build_depthwise_separable(*args, **kwargs):
    """Build that of ``conv_cfg=dict(type='DepthwiseSeparable')``; see :mod:`sasa_det.layers`."""
    from .layers import build_depthwise_separable as build

    return build(*args, **kwargs)


def _add_convolutions(registry: ModuleType) -> None:
    # In mmengine's own registry, like mmcv's convolutions, so that every OpenMMLab project finds
    # them.
    builds = dict(SASA=build_sasa, DepthwiseSeparable=build_depthwise_separable)
    for name, build in builds.items():
        if name not in registry.MODELS.module_dict:
            registry.MODELS.register_module(name, module=build)


def _add_location(registry: ModuleType) -> None:
    for name in REGISTRIES:
        each = getattr(registry, name)
        if each._imported:  # it has imported its locations, and does so only once
            import_module(PARTS)
        elif PARTS not in each._locations:
            # A new list: registries without locations of their own may share the old one.
            each._locations = [*each._locations, PARTS]


def _allow_checkpoint_types(_: ModuleType) -> None:
    from .checkpoints.types import allow_checkpoint_types

    allow_checkpoint_types()


def _count_flops(complexity_analysis: ModuleType) -> None:
    from .ops.flop_counters import register_with_mmengine

    register_with_mmengine(complexity_analysis)
