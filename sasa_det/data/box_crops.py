"""How the boxes of COCO-format data become a classification data set.

``sasa-det box-crops data/digits data/digit-crops`` cuts every box out of the images and
writes ``{train,val}/CLASS/*.jpg``, which mmpretrain's CustomDataset reads.
"""

import math
import sys
from pathlib import Path
from typing import Dict, Optional

import cv2
import numpy as np
from rich.progress import track

from ..cli.parsers import box_crops as parser
from ..files import find_path_problem, written_whole
from .checked_coco import load_annotations
from .entry_problems import check_entries, shortened

SPLITS = ('train', 'val')


def crop_boxes(
    data_root, out, *, size: int = 48, context: float = 1.25, quiet: bool = False
) -> Dict[str, int]:
    """Crop the boxes of both splits, and write one folder per class.

    Crowds, and boxes narrower or lower than 8 pixels, are left out. The set is made in
    ``<out>.partial`` and renamed at the end.

    Args:
        data_root: Holds ``annotations/instances_{train,val}.json``, ``train/`` and ``val/``.
        out: Folder of the new set; must not exist yet.
        size: Width and height of the crops in pixels, to which squares around the boxes are scaled.
        context: Ratio of a square's edge to the longer edge of its box.
        quiet: Show no progress bar.

    Returns:
        Number of crops in each split.

    Raises:
        FileExistsError: ``out`` exists already.
        FileNotFoundError: The data are missing.
        ValueError: ``size`` or ``context`` is out of range. Or a split has wrong entries, no box, or a
            category whose name cannot be a folder of its own; nothing is written then.

    Examples:
        >>> crop_boxes('data/digits', 'data/digit-crops')  # doctest: +SKIP
        {'train': 10880, 'val': 2138}
    """
    if not isinstance(size, int) or size < 8:
        raise ValueError(f'size must be an integer of at least 8, but is {size!r}')
    if not 0 < context < math.inf:
        raise ValueError(f'context must be a number above 0, but is {context!r}')
    data_root, out = Path(data_root), Path(out)
    if out.exists():
        raise FileExistsError(f'{out} is there already; name another folder or remove it')
    contents = {split: _load_split(data_root, split) for split in SPLITS}
    # One name for all runs: what a killed one left is removed by the next.
    with written_whole(out, partial=out.with_name(f'{out.name}.partial')) as partial:
        return {
            split: _crop_split(content, data_root / split, partial / split, size, context, quiet)
            for split, content in contents.items()
        }


def _load_split(data_root: Path, split: str) -> dict:
    """Read a split's annotations, with only the boxes to cut; refuse what cannot be written."""
    path = data_root / 'annotations' / f'instances_{split}.json'
    content = load_annotations(path)
    check_entries(path, content)
    names = set()
    for category in content['categories']:
        name = category['name']
        if not _is_folder_name(name):
            raise ValueError(
                f'annotation file {path}: category {shortened(name)} cannot be the name of a folder; '
                'give it a name of at most 255 bytes without a slash'
            )
        if name in names:
            raise ValueError(
                f'annotation file {path} has more than one category named {shortened(name)}'
            )
        names.add(name)
    boxes = [
        box
        for box in content.get('annotations', [])
        if not box.get('iscrowd') and min(box['bbox'][2:]) >= 8
    ]
    if not boxes:
        raise ValueError(f'{path} has no box of at least 8 pixels along each edge')
    for box in boxes:
        if not isinstance(box['id'], int):
            raise ValueError(
                f'annotation file {path}: id {shortened(box["id"])} of an annotation is no integer, '
                'and it names the crop'
            )
    return {**content, 'annotations': boxes}


def _is_folder_name(name: str) -> bool:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 1 <= size <= 255 and name not in ('.', '..') and not set('/\0') & set(name)


def _crop_split(coco: dict, source: Path, out: Path, size, context, quiet) -> int:
    classes = {category['id']: category['name'] for category in coco['categories']}
    # Every class has a folder in both splits: mmpretrain numbers classes by the existing folders.
    for name in classes.values():
        (out / name).mkdir(parents=True)
    boxes = {}
    for annotation in coco['annotations']:
        boxes.setdefault(annotation['image_id'], []).append(annotation)
    images = [image for image in coco['images'] if image['id'] in boxes]
    for image in track(images, f'Cutting {source.name}', disable=quiet, transient=True):
        file = source / image['file_name']
        pixels = None if find_path_problem(file) else cv2.imread(str(file))
        if pixels is None:
            raise FileNotFoundError(f'{file} is missing or no image')
        for annotation in boxes[image['id']]:
            crop_file = out / classes[annotation['category_id']] / f'{annotation["id"]:06d}.jpg'
            crop = _square(pixels, annotation['bbox'], context)
            crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
            if not cv2.imwrite(str(crop_file), crop):
                raise OSError(f'{crop_file} cannot be written; is the disk full?')
    return len(coco['annotations'])


def _square(pixels: np.ndarray, box, context: float) -> np.ndarray:
    """Crop a square around a box; beyond the image its edge pixels are repeated."""
    x, y, width, height = box
    edge = max(1, round(max(width, height) * context))
    left, top = round(x + (width - edge) / 2), round(y + (height - edge) / 2)
    rows = np.arange(top, top + edge).clip(0, pixels.shape[0] - 1)
    cols = np.arange(left, left + edge).clip(0, pixels.shape[1] - 1)
    return pixels[rows][:, cols]


def main(argv: Optional[list] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments instead of the command line's.

    Returns:
        The exit status.
    """
    try:
        counts = crop_boxes(**vars(parser().parse_args(argv)))
    except (OSError, ValueError) as error:
        print(f'sasa-det box-crops: {error}', file=sys.stderr)
        return 1
    print(', '.join(f'{split}: {count} crops' for split, count in counts.items()))
    return 0
