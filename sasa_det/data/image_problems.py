"""Which problem does an image file have?"""

import os
from typing import Optional, Tuple

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

    if not os.path.isfile(path):
        return 'does not exist'
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
    if cv2.imread(str(path)) is None:  # the reader that training uses
        return 'is of a format that OpenCV does not read'
    if max(found) > _LONGEST * min(found):
        return f'is {found[0]} x {found[1]} pixels, too thin to be scaled'
    if size is not None and tuple(size) != found:
        # Cameras store their orientation; OpenCV rotates the image, as the annotator's browser did.
        if tuple(size) != found[::-1] or cv2.imread(str(path)).shape[1::-1] != tuple(size):
            return (
                f'is {found[0]} x {found[1]} pixels, but the annotations say {size[0]} x {size[1]}'
            )
    return None
