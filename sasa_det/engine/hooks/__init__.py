"""Hooks of mmengine's runner."""

from .attention_diagnosis_hook import AttentionDiagnosisHook
from .attention_visualization_hook import AttentionVisualizationHook
from .checkpoint_hook import WholeCheckpointHook
from .collect_dir_hook import CollectDirHook
from .epoch_seed_hook import EpochSeedHook
from .gpu_hook import GpuHook

__all__ = [
    'AttentionDiagnosisHook',
    'AttentionVisualizationHook',
    'CollectDirHook',
    'EpochSeedHook',
    'GpuHook',
    'WholeCheckpointHook',
]
