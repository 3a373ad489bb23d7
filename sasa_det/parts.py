"""All that sasa_det registers; mmdet's registries import this module when they are first asked."""

from .environment.stack import describe, find_problems

_PROBLEMS = find_problems()

if not _PROBLEMS:
    from . import data, models  # noqa: F401
    from .engine import distributed, hooks  # noqa: F401
else:
    # To raise here would keep others from their own parts: only who asks for one of ours is told.
    from mmengine import registry

    _NAMES = dict(
        MODELS=('SASAResNet', 'SASAFPN', 'SASARetinaHead', 'AttentionStem'),
        DATASETS=('CheckedCocoDataset',),
        HOOKS=('WholeCheckpointHook', 'EpochSeedHook', 'AttentionVisualizationHook'),
    )

    def _refuse(*args, **kwargs):
        raise ImportError(describe(_PROBLEMS))

    for _registry, _names in _NAMES.items():
        getattr(registry, _registry).register_module(list(_names), module=_refuse, force=True)
