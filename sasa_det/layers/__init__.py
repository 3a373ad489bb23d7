"""What is learned: attention and its positions as layers."""

from .conv_cfg import build_sasa
from .local_self_attention import LocalSelfAttention2d

__all__ = ['LocalSelfAttention2d', 'build_sasa']
