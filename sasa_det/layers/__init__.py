"""The learned layers: attention and its positions."""

from .attention_stem import AttentionStem
from .conv_cfg import build_sasa
from .depthwise_separable import DepthwiseSeparableConv2d, build_depthwise_separable
from .local_self_attention import LocalSelfAttention2d

__all__ = [
    'AttentionStem',
    'DepthwiseSeparableConv2d',
    'LocalSelfAttention2d',
    'build_depthwise_separable',
    'build_sasa',
]
