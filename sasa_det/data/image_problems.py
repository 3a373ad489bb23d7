"""Which problem does an image file have?"""

import os
from typing import Optional, Tuple

from ..files import find_path_problem

# An image of a larger aspect ratio is scaled to less than a pixel in most configs.
_LONGEST = 50


def find_image_problem(path, size: Optional[Tuple[int, int]] = None) -> Optional[str]:
    """Find an image's problem, by reading the whole file.

    Args:
        path: The file.
        size: (width, height) in the annotations.

    Returns:
        The end of a sentence that begins with the file's name; None if there is no problem. Images
        that are grey, 16-bit, CMYK or transparent are read as three 8-bit channels.

    Examples:
        >>> find_image_problem('no/such.jpg')
        'does not exist'
    """
    import cv2
    from PIL import Image, UnidentifiedImageError

    problem = find_path_problem(path)
    if problem is not None:
        return problem
    if not os.path.getsize(path):
        return 'is empty'
    try:
        with Image.open(path) as image:
            image.load()
            found = image.size
    except UnidentifiedImageError:
        return 'is no image, or of a format that is not known'
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f'is damaged or cut short: {error}'
    pixels = cv2.imread(str(path))  # the reader that training uses
    if pixels is None:
        return 'is of a format that OpenCV does not read'
    if max(found) > _LONGEST * min(found):
        return f'is {found[0]} x {found[1]} pixels, too thin to be scaled'
    # Cameras store an orientation by which OpenCV rotates the image, as the annotator's browser does.
    read = pixels.shape[1::-1]
    if size is not None and tuple(size) != read:
        if tuple(size) == found:
            return (
                f'is rotated to {read[0]} x {read[1]} pixels when it is read, by its EXIF orientation, but the '
                f'annotations are of the {found[0]} x {found[1]} pixels that it is stored in'
            )
        return f'is {read[0]} x {read[1]} pixels, but the annotations say {size[0]} x {size[1]}'
    return None
