"""What plugs into mmdet: backbone, neck and head, registered in ``mmdet.registry.MODELS``."""

from .sasa_fpn import SASAFPN
from .sasa_resnet import SASAResNet
from .sasa_retina_head import SASARetinaHead

__all__ = ['SASAFPN', 'SASAResNet', 'SASARetinaHead']
