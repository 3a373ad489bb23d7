"""A COCO-format data set that reports its problems before training starts."""

import difflib
import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import cv2
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.fileio import get_local_path
from mmengine.logging import print_log

from ..files import find_path_problem
from .entry_problems import check_entries, describe_corners, shortened
from .image_problems import find_image_problem

_NEEDED = {
    'images': ('id', 'file_name', 'width', 'height'),
    'categories': ('id', 'name'),
    'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area'),
}


def load_annotations(path) -> dict:
    """Read an annotation file and check its format.

    Args:
        path: A JSON file in COCO's format. 'annotations' may be absent, as in COCO's test sets.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: There is no such file, or it is no regular file.
        ValueError: It is not JSON, or not in COCO's format.

    Examples:
        >>> load_annotations('no/such.json')  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        FileNotFoundError: annotation file no/such.json does not exist; set data_root and ...
    """
    problem = find_path_problem(path)
    if problem is not None:
        raise FileNotFoundError(
            f'annotation file {path} {problem}; set data_root and ann_file of the dataset '
            f'(working folder: {os.getcwd()})'
        )
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except ValueError as error:  # undecodable bytes as well
        raise ValueError(
            f'annotation file {path} is not JSON: {error}; was its download or export cut short?'
        ) from None
    except RecursionError:
        raise ValueError(
            f"annotation file {path} nests lists or dicts too deeply for COCO's format"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"annotation file {path} holds a {type(content).__name__}, but COCO's format is a dict"
        )
    for key, fields in _NEEDED.items():
        if key == 'annotations' and key not in content:
            continue
        _check_entries(path, content, key, fields)
    return content


def _check_entries(path, content: dict, key: str, fields: Sequence[str]) -> None:
    """Raise a ValueError unless `content[key]` is a list of dicts with these fields."""
    entries = content.get(key)
    if not isinstance(entries, list):
        raise ValueError(
            f"annotation file {path} has no list {key!r}; COCO's format is a dict with "
            "'images', 'annotations' and 'categories'"
        )
    if not entries and key != 'annotations':
        raise ValueError(f'annotation file {path} has an empty list {key!r}')
    for place, entry in enumerate(entries):
        lacking = [field for field in fields if not isinstance(entry, dict) or field not in entry]
        if lacking:
            raise ValueError(
                f'annotation file {path}: {key}[{place}] lacks {_some(lacking)}; each needs '
                f'{_some(fields)}'
            )


def check_classes(path, content: dict, classes: Sequence[str]) -> None:
    """Raise a ValueError if the config's classes are not the file's categories.

    The classes may be a subset of the categories. mmdet itself would train with those that match,
    and ignore the others. It also numbers labels in the order of the file, but names them in the
    order of the config. So another order would swap names.

    Args:
        path: The annotation file, for the message.
        content: Its content, from :func:`load_annotations`.
        classes: ``metainfo['classes']``.

    Raises:
        ValueError: The classes are not a tuple or list, or some are only in the config, given
            twice, or in another order.

    Examples:
        >>> check_classes('a.json', {'categories': [{'name': 'cat'}]}, ('cats',))
        Traceback (most recent call last):
            ...
        ValueError: annotation file a.json has no category 'cats', which the config names as a class
          'cats' may be meant to be 'cat'
          categories of the file that the config does not name: 'cat'
        set metainfo=dict(classes=('cat',)) in each dataset and model.bbox_head.num_classes=1
    """
    if isinstance(classes, str):
        raise ValueError(
            f"metainfo['classes'] must be a tuple of names, got the string {classes!r}; "
            f'a tuple of one has a comma: classes=({classes!r},)'
        )
    for name in classes:
        if not isinstance(name, str):
            raise ValueError(
                f"metainfo['classes'] must be a tuple of names, but has {shortened(name)}"
            )
    names = [category['name'] for category in content['categories']]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f'annotation file {path} has more than one category named {_some(twice)}; give each '
            'its own name, or merge their annotations into one'
        )
    advice = (
        f'set metainfo=dict(classes={tuple(names) if len(names) <= 100 else "(...)"}) in each '
        f'dataset and model.bbox_head.num_classes={len(names)}'
    )
    unknown = [name for name in classes if name not in names]
    if unknown:
        unused = [str(name) for name in names if name not in classes]
        lines = [
            f'annotation file {path} has no category {_some(unknown)}, which the config names as '
            + ('a class' if len(unknown) == 1 else 'classes')
        ]
        for name in unknown[:5]:
            near = difflib.get_close_matches(str(name), unused, 1)
            if near:
                lines.append(f'  {name!r} may be meant to be {near[0]!r}')
        lines.append(f'  categories of the file that the config does not name: {_some(unused)}')
        raise ValueError('\n'.join([*lines, advice]))
    expected = [name for name in names if name in classes]
    if list(classes) != expected:
        raise ValueError(
            f'the classes {_some(classes)} must each be given once, and in the order of the '
            f'categories of annotation file {path}, by which mmdet numbers the labels; set '
            f'metainfo=dict(classes={tuple(expected)}) in each dataset and '
            f'model.bbox_head.num_classes={len(expected)}'
        )


def check_images(path, content: dict, folder) -> None:
    """Raise an error if images that the file lists are not files in the folder.

    Args:
        path: The annotation file, for the message.
        content: Its content, from :func:`load_annotations`.
        folder: The folder that the images' names are relative to.

    Raises:
        FileNotFoundError: Images are missing; gives their number and the first three.
        ValueError: An image is a folder, a named pipe or the like; names it.

    Examples:
        >>> content = {'images': [{'file_name': 'a.jpg'}]}
        >>> check_images('mine.json', content, 'no/such')  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        FileNotFoundError: 1 of the 1 images of mine.json are not in no/such (no such folder), ...
    """
    # One listing per folder: a stat of each of COCO's 118,000 images takes minutes on network disks.
    listings: Dict[str, Dict[str, bool]] = {}
    missing = []
    for image in content['images']:
        head, tail = os.path.split(image['file_name'])
        if head not in listings:
            place = Path(folder, head)
            listings[head] = _listing(place) if place.is_dir() else {}
        if tail not in listings[head]:
            missing.append(image['file_name'])
        elif not listings[head][tail]:
            raise ValueError(f'image {Path(folder, head, tail)} of {path} is no regular file')
    if missing:
        place = f'{folder}' if os.path.isdir(folder) else f'{folder} (no such folder)'
        raise FileNotFoundError(
            f'{len(missing)} of the {len(content["images"])} images of {path} are not in {place}, '
            f"such as {_some(missing, 3)}; set data_root and data_prefix=dict(img='...') of the "
            'dataset, or complete the download'
        )


def _listing(folder: Path) -> Dict[str, bool]:
    """What is in a folder, and whether it is a file, which most systems tell without a stat of each."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.is_file() for entry in entries}


def _some(names: Sequence[str], most: int = 10) -> str:
    shown = ', '.join(repr(name) for name in names[:most])
    return (shown or 'none') + (', ...' if len(names) > most else '')


def _index(api: type, content: dict, path):
    """Build `api(path)` from parsed content: to parse COCO's files again takes many seconds."""
    coco = api()
    coco.dataset = content
    coco.createIndex()
    coco.img_ann_map, coco.cat_img_map = coco.imgToAnns, coco.catToImgs  # mmdet's names for them
    return coco


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """mmdet's CocoDataset, which checks its annotation file and images when it is loaded.

    It is loaded when built, thus before training starts; with ``lazy_init=True``, at first use. Training skips
    a damaged image and names it in the log. A test stops there, since its numbers would be of other images.
    Images that are read through ``backend_args`` lie elsewhere, and their existence is not checked.

    Args:
        args, kwargs: Those of :class:`mmdet.datasets.CocoDataset`.

    A file whose boxes look like corners is told in the log.

    Raises:
        FileNotFoundError: The annotation file or images are missing.
        ValueError: The file is not in COCO's format, or its categories are not the config's
            classes. Or no image with a box is left to train on, or entries are wrong, see
            :func:`check_entries`. One message names the file and the remedy.

    Examples:
        >>> CheckedCocoDataset(ann_file='no/such.json', lazy_init=True).metainfo['classes'][0]
        'person'
    """

    def load_data_list(self) -> List[dict]:
        """Check, then load as CocoDataset does.

        Returns:
            CocoDataset's entry of each image.

        Raises:
            FileNotFoundError, ValueError: See the class.
        """
        with get_local_path(self.ann_file, backend_args=self.backend_args) as local_path:
            content = load_annotations(local_path)
            check_entries(self.ann_file, content, tested=self.test_mode)
            check_classes(self.ann_file, content, self.metainfo['classes'])
            doubt = describe_corners(content)
            if doubt:
                text = f'annotation file {self.ann_file}: {doubt}'
                print_log(text, logger='current', level=logging.WARNING)
            if self.backend_args is None:
                check_images(self.ann_file, content, self.data_prefix.get('img') or '.')
        self.COCOAPI = partial(_index, type(self).COCOAPI, content)
        try:
            return super().load_data_list()
        finally:
            del self.COCOAPI  # restores the class's own, and frees the content

    def filter_data(self) -> List[dict]:
        """Filter as CocoDataset does, and raise if no image is left to train on.

        Returns:
            The images that are left.

        Raises:
            ValueError: In a training set no image has a box that is not a crowd.
        """
        left = super().filter_data()
        if not self.test_mode and not any(
            box['ignore_flag'] == 0 for image in left for box in image['instances']
        ):
            raise ValueError(
                f'annotation file {self.ann_file} has no image with a box of the classes '
                f'{_some(self.metainfo["classes"])} to train on (filter_cfg={self.filter_cfg}); '
                'is it the file of the training set, and are its boxes [x, y, width, height] in '
                'pixels?'
            )
        return left

    def prepare_data(self, idx: int) -> Optional[dict]:
        """Load and transform an image; a damaged one does not end a training run.

        Args:
            idx: The image's index.

        Returns:
            The pipeline's result. None for a damaged image, for which another image is taken.

        Raises:
            ValueError: This is a test set, and the image is damaged. Names the file.
        """
        try:
            return super().prepare_data(idx)
        except (
            Exception
        ) as error:  # each reader raises its own errors, and a transform may fail too
            path = self.get_data_info(idx)['img_path']
            problem = find_image_problem(path) if self.backend_args is None else None
            if problem is None and isinstance(error, cv2.error):
                problem = f'cannot be transformed: {error.err}'
            if problem is None:
                raise
            if self.test_mode:
                raise ValueError(f'image {path} of {self.ann_file} {problem}') from error
            text = f'Passed over: image {path} of {self.ann_file} {problem}'
            print_log(text, logger='current', level=logging.WARNING)
            return None
