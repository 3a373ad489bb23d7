"""Stand-alone self-attention for object detection, in MMDetection.

``custom_imports = dict(imports=['sasa_det'])`` is all that a config needs. The import is quick and needs only
Python: ``sasa_det.ops`` and ``sasa_det.layers`` need torch, ``sasa_det.models`` needs mmdet.
"""

from .plugin import connect, register
from .version import __version__

__all__ = ['__version__', 'register']

connect()
