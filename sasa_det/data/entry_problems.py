"""Which problems do the entries of a COCO annotation file have? All of them at once."""

import math
from collections import Counter
from typing import Dict, Iterator, List, NamedTuple, Optional

_SHOWN = 10


class Problem(NamedTuple):
    """A problem of one entry.

    Attributes:
        entry: The entry, such as ``annotations[3] (id 17)``.
        text: The problem.
        refused: Whether training is refused. Otherwise mmdet silently leaves the entry out.
    """

    entry: str
    text: str
    refused: bool = True

    def __str__(self) -> str:
        return f'{self.entry}: {self.text}' + ('' if self.refused else ' (it is left out)')


def find_entry_problems(content: dict) -> Iterator[Problem]:
    """Check all entries.

    Args:
        content: The file's content, from :func:`load_annotations`: lists of dicts with the needed keys.

    Returns:
        Iterator over the problems, in the order of the file.

    Examples:
        >>> image = {'id': 1, 'file_name': 'a.jpg', 'width': 8, 'height': 8}
        >>> box = {'id': 5, 'image_id': 1, 'category_id': 2, 'bbox': [0, 0, 4, 4], 'area': 16}
        >>> content = {'images': [image], 'annotations': [box], 'categories': [{'id': 3, 'name': 'a'}]}
        >>> for problem in find_entry_problems(content):
        ...     print(problem)
        annotations[0] (id 5): category_id 2 is the id of no category
    """
    for key in ('images', 'categories', 'annotations'):
        yield from _id_problems(key, content.get(key, []))
    sizes = {}
    for name, image in _named('images', content['images']):
        problem = _image_problem(image)
        if problem:
            yield Problem(name, problem)
        elif _hashable(image['id']):
            sizes[image['id']] = (image['width'], image['height'])
    for name, category in _named('categories', content['categories']):
        if not isinstance(category['name'], str):
            yield Problem(name, f'name {category["name"]!r} is no text')
    images = {image['id'] for image in content['images'] if _hashable(image['id'])}
    categories = {entry['id'] for entry in content['categories'] if _hashable(entry['id'])}
    for name, entry in _named('annotations', content.get('annotations', [])):
        for key, known, of in (
            ('image_id', images, 'image'),
            ('category_id', categories, 'category'),
        ):
            if not _hashable(entry[key]) or entry[key] not in known:
                yield Problem(name, f'{key} {entry[key]!r} is the id of no {of}')
        size = sizes.get(entry['image_id']) if _hashable(entry['image_id']) else None
        problem = _box_problem(name, entry, size)
        if problem:
            yield problem


def find_evaluation_problems(content: dict) -> Iterator[Problem]:
    """Check the ids as pycocotools needs them, which evaluates.

    It sorts the ids of images and of categories. It notes the annotation that a box was matched with by its id,
    in an array of zeros: a box matched with annotation 0 would count as a false one.

    Args:
        content: As for :func:`find_entry_problems`.

    Returns:
        Iterator over the problems.

    Examples:
        >>> content = {'images': [], 'categories': [], 'annotations': [{'id': 0}]}
        >>> [problem.entry for problem in find_evaluation_problems(content)]
        ['annotations[0] (id 0)']
    """
    for key in ('images', 'categories'):
        if len({isinstance(entry['id'], str) for entry in content.get(key, [])}) > 1:
            yield Problem(
                key, 'in a set that is tested, their ids must be all numbers or all texts'
            )
    for name, entry in _named('annotations', content.get('annotations', [])):
        if isinstance(entry['id'], str) or entry['id'] == 0:
            yield Problem(name, 'in a set that is tested, its id must be a number other than 0')


def check_entries(path, content: dict, tested: bool = False) -> None:
    """Raise a ValueError that lists the problems of :func:`find_entry_problems`, if one refuses training.

    Args:
        path: The annotation file, for the message.
        content: Its content, from :func:`load_annotations`.
        tested: Whether a detector is tested on it: also list those of :func:`find_evaluation_problems`.

    Raises:
        ValueError: Entries have problems that would make a run fail or learn nonsense, or its numbers wrong.
    """
    problems = [problem for problem in find_entry_problems(content) if problem.refused]
    problems += find_evaluation_problems(content) if tested else ()
    if problems:
        lines = [f'  {problem}' for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            lines.append(f'  ... `sasa-det check-data {path} FOLDER` lists all {len(problems)}')
        raise ValueError('\n'.join([f'annotation file {path} has wrong entries', *lines]))


def describe_corners(content: dict) -> Optional[str]:
    """Tell boxes that look like two corners, [x1, y1, x2, y2]. They may still be right.

    Two signs are taken: most areas are those of corners, (x2 - x1) * (y2 - y1), and not width * height; or
    each box could be corners, and many reach beyond the right or lower edge of their image.

    Args:
        content: The file's content, from :func:`load_annotations`.

    Returns:
        A sentence with the number of boxes; None if there is no such sign.

    Examples:
        >>> boxes = [{'image_id': 1, 'bbox': [4, 4, 8, 8], 'area': 16}]
        >>> print(describe_corners({'images': [], 'annotations': boxes}))
        1 of 1 boxes have the area of corners [x1, y1, x2, y2]; COCO's boxes are [x, y, width, height]
    """
    images = {image['id']: image for image in content['images'] if _hashable(image['id'])}
    boxes = [
        entry
        for entry in content.get('annotations', [])
        if _box_problem('', entry, None) is None and _hashable(entry['image_id'])
    ]
    possible = areas = beyond = 0
    for entry in boxes:
        x, y, right, lower = entry['bbox']
        if right <= x or lower <= y:
            continue
        possible += 1
        areas += math.isclose(entry['area'], (right - x) * (lower - y), rel_tol=0.01) and not (
            math.isclose(entry['area'], right * lower, rel_tol=0.01)
        )
        image = images.get(entry['image_id'])
        if image is not None and _image_problem(image) is None:
            # A few pixels beyond an image are common.
            beyond += x + right > image['width'] + 2 or y + lower > image['height'] + 2
    if 2 * areas > len(boxes):
        sign = f'{areas} of {len(boxes)} boxes have the area of'
    elif boxes and possible == len(boxes) and 4 * beyond >= len(boxes):
        sign = f'{beyond} of {len(boxes)} boxes reach beyond their image, and all could be'
    else:
        return None
    return f"{sign} corners [x1, y1, x2, y2]; COCO's boxes are [x, y, width, height]"


def _named(key: str, entries: List[dict]) -> Iterator:
    for place, entry in enumerate(entries):
        yield f'{key}[{place}] (id {entry["id"]!r})', entry


def _id_problems(key: str, entries: List[dict]) -> Iterator[Problem]:
    counts: Dict[object, int] = Counter(e['id'] for e in entries if _hashable(e['id']))
    for name, entry in _named(key, entries):
        if not _hashable(entry['id']):
            yield Problem(name, 'its id is neither a number nor a text')
        elif counts[entry['id']] > 1:
            yield Problem(name, f'{counts[entry["id"]]} entries have this id')


def _image_problem(image: dict) -> Optional[str]:
    if not isinstance(image['file_name'], str) or not image['file_name']:
        return f'file_name {image["file_name"]!r} is no text'
    for key in ('width', 'height'):
        if not _is_number(image[key]) or image[key] < 1:
            return f'{key} {image[key]!r} is no number of pixels'
    return None


def _box_problem(name: str, entry: dict, size: Optional[tuple]) -> Optional[Problem]:
    box = entry['bbox']
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(_is_number, box)):
        return Problem(
            name, f'bbox {shortened(box)} is not [x, y, width, height] in finite numbers'
        )
    if not _is_number(entry['area']):
        return Problem(name, f'area {entry["area"]!r} is no finite number')
    if 'iscrowd' in entry and entry['iscrowd'] not in (0, 1):
        # mmdet and pycocotools take the truth of any value, and that of the text '0' is true.
        return Problem(name, f'iscrowd {shortened(entry["iscrowd"])} is neither 0 nor 1')
    x, y, width, height = box
    if width < 1 or height < 1 or entry['area'] <= 0:
        return Problem(name, f'bbox {shortened(box)} of area {entry["area"]} has no pixel', False)
    if size is None:
        return None
    if x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
        return Problem(
            name, f'bbox {shortened(box)} lies outside of its image, {_size(size)}', False
        )
    # A few pixels beyond the image are common, and clipped when images are scaled.
    if min(x + size[0], y + size[1], 2 * size[0] - x - width, 2 * size[1] - y - height) < 0:
        return Problem(name, f'bbox {shortened(box)} is far larger than its image, {_size(size)}')
    return None


def _is_number(value) -> bool:
    # torch cannot hold an integer of hundreds of digits.
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < 1e30 and math.isfinite(value)


def _hashable(value) -> bool:
    return isinstance(value, (int, float, str)) and value == value


def _size(size: tuple) -> str:
    return f'{size[0]} x {size[1]} pixels'


def shortened(value) -> str:
    """Write a value for a message, in at most 80 characters."""
    text = repr(value)
    return text if len(text) < 80 else f'{text[:76]} ...'
