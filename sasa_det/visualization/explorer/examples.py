"""Images to start with: three of the digits that no training has seen."""

import tempfile
from pathlib import Path
from typing import List

NUMBERS = (1, 4, 8)  # of the validation images; with objects large and small


def make_examples(folder: Path) -> List[Path]:
    """Draw the example images.

    Args:
        folder: Where to; a new or empty one.

    Returns:
        Their files.

    Raises:
        ImportError: scikit-learn, which ships what they are made of, is missing.

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
