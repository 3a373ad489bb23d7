"""Hooks of mmengine's runner."""

from .attention_visualization_hook import AttentionVisualizationHook
from .checkpoint_hook import WholeCheckpointHook
from .collect_dir_hook import CollectDirHook
from .epoch_seed_hook import EpochSeedHook

__all__ = ['AttentionVisualizationHook', 'CollectDirHook', 'EpochSeedHook', 'WholeCheckpointHook']
