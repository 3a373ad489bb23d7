"""How images are found and read: files, folders and videos."""

from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional, Sequence, Union

IMAGES = {'.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp'}
VIDEOS = {'.avi', '.mkv', '.mov', '.mp4', '.webm'}


class Source(NamedTuple):
    """A file to read images from.

    Attributes:
        path: Where it is.
        name: Its name in results: the path below the given folder.
    """

    path: Path
    name: Path


class Image(NamedTuple):
    """An image, or why it could not be read.

    Attributes:
        name: Its name in results.
        pixels: (H, W, 3) BGR, uint8; None if it could not be read.
        error: The reason, with the file's name.
    """

    name: Path
    pixels: Optional[object]
    error: Optional[str] = None


def find_sources(paths: Sequence[Union[str, Path]]) -> List[Source]:
    """Find the image and video files below the paths, in the order of their names.

    Args:
        paths: Files, accepted with any suffix, and folders, searched for images and videos.

    Raises:
        FileNotFoundError: A path does not exist, or a folder holds no image or video; names it.

    Examples:
        >>> find_sources([])
        []
    """
    sources, names = [], set()
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(
                file
                for file in path.rglob('*')
                if file.is_file() and file.suffix.lower() in IMAGES | VIDEOS
            )
            if not files:
                raise FileNotFoundError(f'{path}: neither images nor videos in this folder')
            found = [Source(file, file.relative_to(path)) for file in files]
        elif path.exists():
            found = [Source(path, Path(path.name))]
        else:
            raise FileNotFoundError(f'{path}: no such file or folder')
        for source in found:
            sources.append(source._replace(name=_unused(source.name, names)))
    return sources


def read_images(sources: Sequence[Source]) -> Iterator[Image]:
    """Read the images, and the frames of videos, one after another.

    Args:
        sources: As :func:`find_sources` gives them.

    Returns:
        An iterator. An unreadable file or frame gives an Image with an error.
    """
    for path, name in sources:
        try:
            if path.suffix.lower() in VIDEOS:
                yield from _frames(path, name)
            else:
                yield Image(name, read_image(path))
        except (OSError, ValueError) as error:
            yield Image(name, None, str(error))


def read_image(path: Path):
    """Read an image as mmdet's pipelines do.

    Args:
        path: Its file.

    Returns:
        (H, W, 3) BGR, uint8.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no image that can be decoded; names it.
    """
    import cv2
    import mmcv

    try:
        data = path.read_bytes()
    except OSError as error:
        raise type(error)(f'{path}: {error.strerror}') from None
    try:
        pixels = mmcv.imfrombytes(data) if data else None
    except cv2.error:
        pixels = None
    if pixels is None:
        raise ValueError(f'{path}: not an image that can be decoded')
    return pixels


def count_images(sources: Sequence[Source]) -> int:
    """Count the images that :func:`read_images` will give; an unreadable video counts as one."""
    import mmcv

    total = 0
    for path, _ in sources:
        video = path.suffix.lower() in VIDEOS
        total += max(mmcv.VideoReader(str(path)).frame_cnt, 1) if video else 1
    return total


def _frames(path: Path, name: Path) -> Iterator[Image]:
    import mmcv

    count = 0
    for count, pixels in enumerate(mmcv.VideoReader(str(path)), 1):
        if pixels is None:
            raise ValueError(f'{path}: its frame {count} cannot be decoded')
        yield Image(name / f'{count:06d}.jpg', pixels)
    if not count:
        raise ValueError(f'{path}: not a video that can be decoded')


def _unused(name: Path, names: set) -> Path:
    """Return the name, with a number if another folder has the same name."""
    number, unused = 1, name
    while unused in names:
        number += 1
        unused = name.with_stem(f'{name.stem}_{number}')
    names.add(unused)
    return unused
