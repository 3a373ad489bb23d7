"""Which COCO metrics do mmdet's saved predictions reach on a config's test set?"""

import contextlib
import json
import os
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Union

import mmengine
import numpy as np
import torch
from mmdet.datasets.api_wrappers import COCO, COCOeval
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from ..data.entry_problems import find_evaluation_problems

COCO_NUMBERS = (
    'AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100', 'ARs', 'ARm', 'ARl'
)  # fmt: skip


class Truth(NamedTuple):
    """The images and boxes of a config's test set.

    Args:
        coco: The annotation file's content.
        ann_file: Path of the annotation file.
        image_dir: Folder that its file names are relative to.
        category_ids: Category id of each label. mmdet counts labels in the order of the file.
    """

    coco: COCO
    ann_file: str
    image_dir: str
    category_ids: Sequence[int]

    @property
    def classes(self) -> List[str]:
        """Class name of each label."""
        return [self.coco.cats[i]['name'] for i in self.category_ids]

    def images(self) -> List[dict]:
        """Image entries that have at least one box that is not a crowd, in the file's order."""
        return [
            image
            for image_id, image in self.coco.imgs.items()
            if self.coco.get_ann_ids([image_id], iscrowd=False)
        ]

    def path(self, image: dict) -> str:
        """Path of an image entry's file."""
        return os.path.join(self.image_dir, image['file_name'])


def load_truth(config: Config) -> Truth:
    """Read the annotations of a config's test set.

    Args:
        config: An mmdet config whose test_dataloader reads one set in COCO format.

    Raises:
        FileNotFoundError: The annotation file is not there.
        ValueError: It is not a COCO annotation file, or lacks classes of the config. Or the config
            has no such test set.

    Examples:
        >>> truth = load_truth(Config.fromfile('configs/bccd.py'))  # doctest: +SKIP
        >>> truth.classes  # doctest: +SKIP
        ['Platelets', 'RBC', 'WBC']
    """
    dataset = config.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    init_default_scope(config.get('default_scope', 'mmdet'))
    # With lazy_init mmdet joins data_root and file names, and knows the classes, but reads nothing.
    try:
        dataset = DATASETS.build({**dataset, 'lazy_init': True})
    except (KeyError, TypeError) as error:
        raise ValueError(f'{config.filename}: test_dataloader.dataset: {error}') from error
    path = dataset.ann_file
    try:
        with _quiet():
            coco = COCO(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f'{path}: no such annotation file, which the test_dataloader of the config names'
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, AssertionError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: not an annotation file in COCO format ({error})') from error
    problem = next(find_evaluation_problems(coco.dataset), None)
    if problem:
        raise ValueError(f'{path}: {problem}')
    classes = dataset.metainfo.get('classes') or ()
    names = [category['name'] for category in coco.cats.values()]
    missing = [name for name in classes if name not in names]
    if missing or not classes:
        raise ValueError(
            f'{path}: its categories are {names}, but the config names {list(classes)}; '
            f'missing are {missing}. Set metainfo.classes of the test dataset'
        )
    category_ids = coco.get_cat_ids(cat_names=classes)
    return Truth(coco, path, dataset.data_prefix.get('img', ''), category_ids)


def load_predictions(path: Union[str, Path]) -> List[dict]:
    """Load the predictions that mmdet's ``tools/test.py --out`` wrote.

    A pickle runs any code that it names: only load files that you trust.

    Args:
        path: The pickle: a list with one dict per image, of ``img_id`` and ``pred_instances``. The
            latter has ``bboxes`` (N, 4), ``scores`` (N,) and ``labels`` (N,). Boxes are x1, y1, x2,
            y2 in pixels of the original image.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a pickle, or holds something else.

    Examples:
        >>> import pickle, tempfile
        >>> with tempfile.NamedTemporaryFile(suffix='.pkl') as file:
        ...     _ = file.write(pickle.dumps([])), file.flush()
        ...     load_predictions(file.name)
        Traceback (most recent call last):
        ...
        ValueError: ...: no predictions in it; accepted is a pickle written by mmdet's tools/test.py --out
    """  # noqa: E501
    accepted = "accepted is a pickle written by mmdet's tools/test.py --out"
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: no such predictions; {accepted}')
    try:
        predictions = mmengine.load(path, file_format='pkl')
    except Exception as error:  # a broken pickle can raise almost any error
        raise ValueError(f'{path}: not a pickle ({error}); {accepted}') from error
    if not isinstance(predictions, list) or not predictions:
        raise ValueError(f'{path}: no predictions in it; {accepted}')
    for index, prediction in enumerate(predictions):
        boxes = prediction.get('pred_instances') if isinstance(prediction, dict) else None
        if boxes is None or 'img_id' not in prediction:
            raise ValueError(f'{path}: entry {index} has no img_id and pred_instances; {accepted}')
        missing = {'bboxes', 'scores', 'labels'} - set(boxes)
        if missing:
            raise ValueError(f'{path}: entry {index} lacks {sorted(missing)}; {accepted}')
    return predictions


def evaluate(predictions: Sequence[dict], truth: Truth) -> COCOeval:
    """Match predictions with the ground truth by pycocotools, as mmdet's CocoMetric does.

    Args:
        predictions: From :func:`load_predictions`.
        truth: From :func:`load_truth`.

    Returns:
        pycocotools' COCOeval after its summary; :func:`coco_numbers` reads it.

    Raises:
        ValueError: The predictions are of other images or classes than the truth, of an image twice, or not
            finite.
    """
    category_ids = truth.category_ids
    boxes, seen = [], set()
    for prediction in predictions:
        image_id, instances = prediction['img_id'], prediction['pred_instances']
        if image_id not in truth.coco.imgs:
            raise ValueError(
                f'{truth.ann_file}: has no image with id {image_id!r}, of which there are '
                'predictions; were they made on another data set?'
            )
        if image_id in seen:
            raise ValueError(f'the predictions have image {image_id!r} twice')
        seen.add(image_id)
        corners = torch.as_tensor(instances['bboxes']).double().reshape(-1, 4)
        sizes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
        scores = torch.as_tensor(instances['scores'])
        labels = torch.as_tensor(instances['labels']).tolist()
        if not (corners.isfinite().all() and scores.isfinite().all()):
            raise ValueError(
                f'the predictions of image {image_id!r} have numbers that are not finite'
            )
        wrong = [label for label in labels if not 0 <= label < len(category_ids)]
        if wrong:
            raise ValueError(
                f'{truth.ann_file}: has {len(category_ids)} classes, but the predictions of image '
                f'{image_id!r} have label {wrong[0]}'
            )
        boxes += [
            {'image_id': image_id, 'category_id': category_ids[label], 'bbox': box, 'score': score}
            for box, score, label in zip(sizes, scores.tolist(), labels, strict=True)
        ]
    with _quiet():
        evaluation = COCOeval(truth.coco, _as_detections(truth.coco, boxes), 'bbox')
        evaluation.params.catIds = category_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def coco_numbers(evaluation: COCOeval) -> Dict[str, float]:
    """Name the 12 numbers of an evaluation by :func:`evaluate`.

    Returns:
        AP to ARl as in :data:`COCO_NUMBERS`, from 0 to 1. As in pycocotools, -1 for a size without
        ground-truth boxes.
    """
    return dict(zip(COCO_NUMBERS, evaluation.stats.tolist(), strict=True))


def precision(evaluation: COCOeval, iou: float) -> Dict[str, np.ndarray]:
    """Read the precision-recall curve of each class at one IoU, over objects of all sizes.

    Args:
        evaluation: An evaluation by :func:`evaluate`.
        iou: One of 0.50, 0.55 ... 0.95.

    Returns:
        Class name to precision (101,) at recall 0, 0.01 ... 1. Classes without ground truth are left out.
    """
    threshold = int(np.argmin(np.abs(evaluation.params.iouThrs - iou)))
    return {name: curves[threshold] for name, curves in _class_curves(evaluation).items()}


def per_class_ap(evaluation: COCOeval) -> Dict[str, float]:
    """Average the precision of each class over recall and IoUs; -1 for a class without ground truth."""
    names = [evaluation.cocoGt.cats[i]['name'] for i in evaluation.params.catIds]
    curves = _class_curves(evaluation)
    return {name: float(curves[name].mean()) if name in curves else -1.0 for name in names}


def _class_curves(evaluation: COCOeval) -> Dict[str, np.ndarray]:
    # (IoU, recall, class, size, boxes per image); -1 without ground truth.
    curves = evaluation.eval['precision'][:, :, :, 0, -1]
    names = [evaluation.cocoGt.cats[i]['name'] for i in evaluation.params.catIds]
    return {n: curves[:, :, i] for i, n in enumerate(names) if (curves[:, :, i] > -1).all()}


def _as_detections(truth: COCO, boxes: List[dict]) -> COCO:
    if boxes:
        return truth.loadRes(boxes)
    # pycocotools cannot load an empty list, but a detector may find nothing.
    detections = COCO()
    detections.dataset = {**truth.dataset, 'annotations': []}
    detections.createIndex()
    return detections


@contextlib.contextmanager
def _quiet():
    """Suppress pycocotools' progress messages."""
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        yield
