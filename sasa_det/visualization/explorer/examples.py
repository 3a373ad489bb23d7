"""Example images for the page: three of the digits that no training has seen."""

import tempfile
from pathlib import Path
from typing import List

NUMBERS = (1, 4, 8)  # indices of validation images, with large and small objects


def make_examples(folder: Path) -> List[Path]:
    """Draw the example images.

    Args:
        folder: A new or empty folder to write to.

    Returns:
        Their files.

    Raises:
        ImportError: scikit-learn, which ships the source images, is missing.

    Examples:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in make_examples(Path(folder))]
        ['example_1.jpg', 'example_2.jpg', 'example_3.jpg']
    """
    try:
        from ...data.digits import make_digits
    except ImportError as error:
        raise ImportError(
            f"the example images need {error.name}: pip install 'sasa_det[demo]'"
        ) from error
    examples = []
    with tempfile.TemporaryDirectory() as scratch:
        digits = make_digits(Path(scratch) / 'digits', num_train=10, num_val=10, quiet=True)
        for place, number in enumerate(NUMBERS, 1):
            example = Path(folder) / f'example_{place}.jpg'
            example.write_bytes((digits / 'val' / f'{number:06d}.jpg').read_bytes())
            examples.append(example)
    return examples
