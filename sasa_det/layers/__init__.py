"""The learned layers: attention and its positions."""

from .attention_stem import AttentionStem
from .conv_cfg import build_sasa
from .local_self_attention import LocalSelfAttention2d

__all__ = ['AttentionStem', 'LocalSelfAttention2d', 'build_sasa']
