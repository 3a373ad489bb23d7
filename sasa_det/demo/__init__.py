"""The small trained detector that ships with the package, and images for it; README.md has their sources."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# The checkpoint, and the name of the config that it was trained with.
CHECKPOINT = FOLDER / 'digits.pth'
CONFIG = 'retinanet_sasa-tiny_digits'


def images() -> list:
    """List the files of the images, none of which was trained on.

    Examples:
        >>> [path.suffix for path in images()]
        ['.jpg', '.jpg', '.jpg']
    """
    return sorted(FOLDER.glob('*.jpg'))
