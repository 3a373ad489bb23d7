"""The parts for mmdet: detectors, backbone, neck and bbox_head, registered in ``mmdet.registry.MODELS``."""

from mmdet.registry import MODELS

from ..layers import AttentionStem
from .attending_detector import AttendingDetector
from .sasa_fpn import SASAFPN
from .sasa_resnet import SASAResNet
from .sasa_retina_head import SASARetinaHead

MODELS.register_module(module=AttentionStem)

__all__ = ['AttendingDetector', 'SASAFPN', 'SASAResNet', 'SASARetinaHead']
