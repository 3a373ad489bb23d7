"""How uploaded images, which are untrusted, are kept, and checked before they are decoded."""

from pathlib import Path
from secrets import token_hex
from threading import Lock
from typing import Dict, Union

import cv2
import numpy as np
from PIL import Image, ImageOps

FORMATS = ('BMP', 'JPEG', 'PNG', 'TIFF', 'WEBP')
SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
MEGABYTES = 10
TOGETHER = 200  # megabytes of all uploads that wait to be read
UNREAD_FOR = 600  # seconds that an upload waits; most are read at once
MEGAPIXELS = 25
SHORTEST = 16  # least pixels per edge
LONGEST_RATIO = 10  # ratio of the edges; beyond it resizing leaves nothing of the shorter edge
LARGEST = 1333  # pixels per edge of the shown image, which the detector gets

NO_UPLOAD = 'There is no such upload, or it was kept too long: give the image again.'
_UNREADABLE = f'The file is not an image that can be read. Accepted are {", ".join(FORMATS)}.'
_TOO_MANY_PIXELS = f'The image has more than {MEGAPIXELS} million pixels, which is the limit.'


class Uploads:
    """The uploaded files that wait to be read. Each is read once, and deleted then.

    Args:
        folder: Where they are; it is made if it is missing.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     uploads = Uploads(folder)
        ...     path = uploads.reserve(100)
        ...     path in uploads, folder in uploads
        (True, False)
    """

    def __init__(self, folder: Union[str, Path]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sizes: Dict[str, int] = {}
        self._lock = Lock()

    def __contains__(self, path) -> bool:
        return str(path) in self._sizes

    def reserve(self, size: int) -> Path:
        """Choose the place of a new file, under a name that cannot be guessed.

        Args:
            size: Its bytes.

        Raises:
            ValueError: All uploads together would be larger than ``TOGETHER``.
        """
        path = self._folder / token_hex(16)
        with self._lock:
            if sum(self._sizes.values()) + size > TOGETHER * 2**20:
                raise ValueError(
                    f'The images that wait take up the {TOGETHER} MB that there are for them. Try '
                    'again in some minutes.'
                )
            self._sizes[str(path)] = size
        return path

    def read(self, path: Union[str, Path]) -> np.ndarray:
        """Read an image by :func:`read_upload`, and delete its file.

        Args:
            path: As :meth:`reserve` gave it.

        Raises:
            ValueError: There is no such upload, or :func:`read_upload` refuses it.
        """
        if path not in self or not Path(path).is_file():
            raise ValueError(NO_UPLOAD)
        try:
            return read_upload(path)
        finally:
            self.delete(path)

    def delete(self, path: Union[str, Path]) -> None:
        """Delete a file, if it is still there.

        Args:
            path: As :meth:`reserve` gave it.
        """
        if path in self:
            Path(path).unlink(missing_ok=True)
            self._sizes.pop(str(path), None)


def read_upload(path: Union[str, Path]) -> np.ndarray:
    """Read an uploaded image, scaled down to the size that the page works with.

    Args:
        path: Its file. Name and suffix are not trusted.

    Returns:
        (H, W, 3) BGR, uint8, as mmdet takes it, no edge longer than ``LARGEST``.

    Raises:
        ValueError: It is too large, too narrow or not an image of ``FORMATS``; says which.

    Examples:
        >>> read_upload('/dev/null')
        Traceback (most recent call last):
        ValueError: The file is not an image that can be read. Accepted are BMP, JPEG, PNG, TIFF, WEBP.
    """
    if Path(path).stat().st_size > MEGABYTES * 2**20:
        raise ValueError(f'The file is larger than {MEGABYTES} MB, which is the limit.')
    try:
        # Only the header is read here, so that an image that is too large is never decoded.
        image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(_TOO_MANY_PIXELS) from None
    except Exception:  # Pillow raises errors of many kinds on malformed files
        raise ValueError(_UNREADABLE) from None
    with image:
        _check(image)
        try:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))[..., ::-1]
        except Exception:
            raise ValueError(_UNREADABLE) from None
    scale = LARGEST / max(pixels.shape)
    if scale < 1:
        height, width = (max(1, round(edge * scale)) for edge in pixels.shape[:2])
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(pixels)


def _check(image: Image.Image) -> None:
    shorter, longer = sorted(image.size)
    if shorter * longer > MEGAPIXELS * 10**6:
        raise ValueError(_TOO_MANY_PIXELS)
    if shorter < SHORTEST or longer > LONGEST_RATIO * shorter:
        raise ValueError(
            'The image has {} x {} pixels; accepted are edges of at least {}, the longer at most {} '
            'times the shorter.'.format(*image.size, SHORTEST, LONGEST_RATIO)
        )
    if image.mode[0] in 'IF':  # Pillow would clip values above 255
        raise ValueError('The image has more than 8 bits a pixel; save it with 8 a channel.')
