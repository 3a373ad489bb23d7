"""Data sets: the embedded digits, and COCO-format data that is checked before training starts.

``digits`` and ``coco_config`` are not imported here: they are programs. The former needs
scikit-learn, which a detector does not.
"""

from .checked_coco import CheckedCocoDataset, check_classes, check_images, load_annotations
from .entry_problems import check_entries

__all__ = [
    'CheckedCocoDataset',
    'check_classes',
    'check_entries',
    'check_images',
    'load_annotations',
]
