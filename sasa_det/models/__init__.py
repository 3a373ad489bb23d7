"""The parts for mmdet: backbone, neck and bbox_head, registered in ``mmdet.registry.MODELS``."""

from mmdet.registry import MODELS

from ..layers import AttentionStem
from .sasa_fpn import SASAFPN
from .sasa_resnet import SASAResNet
from .sasa_retina_head import SASARetinaHead

MODELS.register_module(module=AttentionStem)

__all__ = ['SASAFPN', 'SASAResNet', 'SASARetinaHead']
