"""All parts that sasa_det registers; mmdet's registries import this module at their first lookup."""

from .environment.stack import describe, find_problems

_PROBLEMS = find_problems()

if not _PROBLEMS:
    from . import data, models  # noqa: F401
    from .engine import distributed, hooks  # noqa: F401
else:
    # An error here would block everybody's parts, so only a lookup of ours raises it.
    from mmengine import registry

    _NAMES = dict(
        MODELS=('AttendingDetector', 'SASAResNet', 'SASAFPN', 'SASARetinaHead', 'AttentionStem'),
        DATASETS=('CheckedCocoDataset',),
        HOOKS=(
            'WholeCheckpointHook',
            'EpochSeedHook',
            'CollectDirHook',
            'GpuHook',
            'AttentionVisualizationHook',
            'AttentionDiagnosisHook',
        ),
    )

    def _refuse(*args, **kwargs):
        raise ImportError(describe(_PROBLEMS))

    for _registry, _names in _NAMES.items():
        getattr(registry, _registry).register_module(list(_names), module=_refuse, force=True)
