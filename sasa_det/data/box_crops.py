"""How the boxes of COCO-format data become a classification data set.

``sasa-det box-crops data/digits data/digit-crops`` cuts every box out of the images and
writes ``{train,val}/CLASS/*.jpg``, which mmpretrain's CustomDataset reads.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Dict, Optional

import cv2
import numpy as np
from rich.progress import track

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
        ValueError: ``size`` or ``context`` is out of range, or a split has no box.

    Examples:
        >>> crop_boxes('data/digits', 'data/digit-crops')  # doctest: +SKIP
        {'train': 10880, 'val': 2138}
    """
    if not isinstance(size, int) or size < 8:
        raise ValueError(f'size must be an integer of at least 8, but is {size!r}')
    if not context > 0:
        raise ValueError(f'context must be a number above 0, but is {context!r}')
    data_root, out = Path(data_root), Path(out)
    if out.exists():
        raise FileExistsError(f'{out} is there already; name another folder or remove it')
    partial = out.with_name(out.name + '.partial')
    if partial.exists():
        shutil.rmtree(partial)  # left by a run that was interrupted
    counts = {split: _crop_split(data_root, partial, split, size, context, quiet) for split in SPLITS}
    partial.rename(out)
    return counts


def _crop_split(data_root, out, split, size, context, quiet) -> int:
    path = data_root / 'annotations' / f'instances_{split}.json'
    coco = json.loads(path.read_text())
    classes = {category['id']: category['name'] for category in coco['categories']}
    # Every class has a folder in both splits: mmpretrain numbers classes by the existing folders.
    for name in classes.values():
        (out / split / name).mkdir(parents=True)
    boxes = {}
    for annotation in coco['annotations']:
        if not annotation.get('iscrowd') and min(annotation['bbox'][2:]) >= 8:
            boxes.setdefault(annotation['image_id'], []).append(annotation)
    if not boxes:
        raise ValueError(f'{path} has no box of at least 8 pixels along each edge')
    images = [image for image in coco['images'] if image['id'] in boxes]
    for image in track(images, f'Cutting {split}', disable=quiet, transient=True):
        file = data_root / split / image['file_name']
        pixels = cv2.imread(str(file))
        if pixels is None:
            raise FileNotFoundError(f'{file} is missing or no image')
        for annotation in boxes[image['id']]:
            name = f'{annotation["id"]:06d}.jpg'
            crop = _square(pixels, annotation['bbox'], context)
            crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
            cv2.imwrite(str(out / split / classes[annotation['category_id']] / name), crop)
    return sum(map(len, boxes.values()))


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
    parser = argparse.ArgumentParser(
        prog='sasa-det box-crops',
        description='Make a classification data set of the boxes in COCO-format data.',
    )
    parser.add_argument('data_root', help='the COCO-format data, e.g. data/digits')
    parser.add_argument('out', help='folder of the new set, e.g. data/digit-crops')
    parser.add_argument('--size', type=int, default=48, help='pixels; default: %(default)s')
    parser.add_argument('--context', type=float, default=1.25, help='default: %(default)s')
    try:
        counts = crop_boxes(**vars(parser.parse_args(argv)))
    except (OSError, ValueError) as error:
        print(f'sasa-det box-crops: {error}', file=sys.stderr)
        return 1
    print(', '.join(f'{split}: {count} crops' for split, count in counts.items()))
    return 0
