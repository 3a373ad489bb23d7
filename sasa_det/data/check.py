"""Which problems does a data set have? All of them, in one list."""

from pathlib import Path
from typing import Dict, Iterator, NamedTuple, Optional, Sequence

from mmengine.fileio import join_path

from ..files import printable
from .checked_coco import check_classes, load_annotations
from .entry_problems import describe_corners, find_entry_problems, find_evaluation_problems
from .image_problems import find_image_problem


class DataPlace(NamedTuple):
    """The location of a data set.

    Attributes:
        annotations: Its annotation file.
        images: The folder that the images' names are relative to.
        classes: The config's; None if there is no config.
        tested: Whether the config tests or validates with it; None if there is no config.
    """

    annotations: str
    images: str
    classes: Optional[Sequence[str]] = None
    tested: Optional[bool] = None


class Doubt(str):
    """What looks wrong in a data set and may be right."""


def find_data_problems(place: DataPlace) -> Iterator[str]:
    """List all problems of a data set: its file, each entry, each image.

    Args:
        place: Its location.

    Returns:
        Iterator over one sentence per problem, which names the file and, if it concerns one, the entry.
        What may be right is a :class:`Doubt`.

    Examples:
        >>> list(find_data_problems(DataPlace('no/such.json', 'images')))[0][:45]
        'annotation file no/such.json does not exist; '
    """
    try:
        content = load_annotations(place.annotations)
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if place.classes is not None:
        try:
            check_classes(place.annotations, content, place.classes)
        except ValueError as error:
            yield str(error)
    doubt = describe_corners(content)
    if doubt:
        yield Doubt(f'{place.annotations}: {doubt}')
    for problem in find_entry_problems(content):
        yield f'{place.annotations}: {problem}'
    if place.tested is not False:
        kind = str if place.tested else Doubt
        for problem in find_evaluation_problems(content):
            yield kind(f'{place.annotations}: {problem}')
    used = set()
    for image in content['images']:
        name = image['file_name']
        if not isinstance(name, str) or not name:
            continue  # reported above
        path = Path(place.images, name)
        shown = printable(path)
        if name in used:
            yield f'{shown} is the image of more than one entry'
            continue
        used.add(name)
        problem = find_image_problem(path, (image['width'], image['height']))
        if problem:
            yield f'{shown} {problem}'


def data_places(config) -> Iterator[DataPlace]:
    """Find the data sets that a config trains, validates and tests with, each once.

    Args:
        config: mmengine's Config.

    Returns:
        Iterator over the data sets in COCO's format.

    Examples:
        >>> dataset = {'ann_file': 'a.json', 'data_root': 'data', 'data_prefix': {'img': 'train/'}}
        >>> next(data_places({'train_dataloader': {'dataset': dataset}}))
        DataPlace(annotations='data/a.json', images='data/train/', classes=None, tested=False)
    """
    places: Dict[DataPlace, bool] = {}
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for dataset in _datasets(config.get(key)):
            root = dataset.get('data_root') or ''
            images = (dataset.get('data_prefix') or {}).get('img', '')
            classes = (dataset.get('metainfo') or {}).get('classes')
            place = DataPlace(
                join_path(root, dataset['ann_file']),
                join_path(root, images),
                None if classes is None else tuple(classes),
            )
            places[place] = places.get(place, False) or key != 'train_dataloader'
    for place, tested in places.items():
        yield place._replace(tested=tested)


def _datasets(config) -> Iterator[dict]:
    """The data sets in a part of a config, including those in wrappers such as RepeatDataset."""
    if isinstance(config, dict):
        if config.get('ann_file'):
            yield config
            return
        config = config.values()
    elif not isinstance(config, (list, tuple)):
        return
    for part in config:
        yield from _datasets(part)
