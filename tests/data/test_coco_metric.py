"""The figures that COCO's authors publish for their sample results, by mmdet's own metric."""

import json

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmdet.evaluation.metrics import coco_metric

# AP of all, at 0.5 and 0.75, small, medium, large; AR of 1, 10 and 100 boxes, small, medium, large.
PUBLISHED = [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564]


@pytest.fixture
def evaluated(monkeypatch):
    """What pycocotools computes inside of the metric, which rounds it to three digits."""
    made = []

    class Recorded(coco_metric.COCOeval):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(coco_metric, 'COCOeval', Recorded)
    return made


def predictions(results, image_ids, category_ids):
    """Official results as a detector hands them over: for each image corners, scores and labels."""
    for image_id in image_ids:
        mine = [result for result in results if result['image_id'] == image_id]
        boxes = torch.tensor([result['bbox'] for result in mine], dtype=torch.float64).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [category_ids.index(result['category_id']) for result in mine]
        scores = torch.tensor([result['score'] for result in mine], dtype=torch.float64)
        instances = dict(bboxes=boxes, scores=scores, labels=torch.tensor(labels, dtype=torch.long))
        yield dict(img_id=image_id, ori_shape=(480, 640), pred_instances=instances)


def test_cocos_sample_results(shared, evaluated):
    truth = shared('coco_eval') / 'instances_val2014_100.json'
    results = shared('coco_eval') / 'instances_val2014_fakebbox100_results.json'
    content = json.loads(truth.read_text())
    image_ids = [image['id'] for image in content['images']]
    category_ids = [category['id'] for category in content['categories']]

    metric = CocoMetric(ann_file=str(truth), metric='bbox', proposal_nums=(1, 10, 100))
    metric.dataset_meta = dict(classes=[category['name'] for category in content['categories']])
    for sample in predictions(json.loads(results.read_text()), image_ids, category_ids):
        metric.process({}, [sample])
    numbers = metric.evaluate(size=len(image_ids))

    (evaluation,) = evaluated
    np.testing.assert_allclose(evaluation.stats[:3], [0.504581, 0.696973, 0.572982], atol=5e-7)
    np.testing.assert_allclose(evaluation.stats, PUBLISHED, atol=5e-4)
    names = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
    assert [numbers[f'coco/bbox_{name}'] for name in names] == PUBLISHED[:6]
