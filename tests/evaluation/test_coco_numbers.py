import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from pycocotools.cocoeval import COCOeval

from sasa_det.evaluation.coco_numbers import (
    COCO_NUMBERS,
    Truth,
    coco_numbers,
    evaluate,
    load_predictions,
    load_truth,
    per_class_ap,
    precision,
)
from tests.outside import outside, why_not

COCO_EVAL = outside('coco_eval')


@pytest.fixture
def truth(make_config):
    return load_truth(Config.fromfile(make_config()))


def test_truth_is_the_configs(truth, data_root):
    assert truth.classes == ['cat', 'dog', 'owl']
    assert truth.category_ids == [3, 7, 9]
    assert [image['id'] for image in truth.images()] == [20, 30, 40, 50]
    assert Path(truth.path(truth.images()[0])) == data_root / 'val' / 'image_20.jpg'


def test_numbers_are_those_of_mmdets_metric(truth, predictions):
    metric = CocoMetric(ann_file=truth.ann_file, classwise=True, proposal_nums=(1, 10, 100),
                        metric_items=['mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l',
                                      'AR@100', 'AR@300', 'AR@1000', 'AR_s@1000', 'AR_m@1000',
                                      'AR_l@1000'])  # fmt: skip
    metric.dataset_meta = dict(classes=('cat', 'dog', 'owl'))
    metric.process({}, predictions)
    expected = metric.evaluate(len(predictions))
    evaluation = evaluate(predictions, truth)
    numbers = coco_numbers(evaluation)
    assert tuple(numbers) == COCO_NUMBERS
    # The metric rounds to three digits, and names the last six by its own defaults.
    by_metric = [value for key, value in expected.items() if '/bbox_' in key]
    assert [round(value, 3) for value in numbers.values()] == by_metric
    assert 0.2 < numbers['AP50'] < 0.9
    assert numbers['APl'] == -1
    for name, value in per_class_ap(evaluation).items():
        assert round(value, 3) == expected[f'coco/{name}_precision']


def test_perfect_predictions_are_perfect(truth, prediction):
    perfect = [
        prediction(20, (1, 0.9, 10, 8, 20, 20)),
        prediction(30, (0, 0.9, 40, 30, 30, 24), (2, 0.9, 5, 5, 12, 10)),
        prediction(40, (2, 0.9, 50, 4, 40, 50)),
        prediction(50, (0, 0.9, 4, 4, 30, 30)),
    ]
    evaluation = evaluate(perfect, truth)
    assert coco_numbers(evaluation)['AP'] == pytest.approx(1)
    assert per_class_ap(evaluation) == pytest.approx(dict(cat=1, dog=1, owl=1))
    # One of the two owls is found: recall stops at a half, 51 of 101 points.
    del perfect[2]
    assert per_class_ap(evaluate(perfect, truth))['owl'] == pytest.approx(51 / 101)


def test_curves_average_to_the_numbers(truth, predictions):
    evaluation = evaluate(predictions, truth)
    for iou, name in ((0.5, 'AP50'), (0.75, 'AP75')):
        curves = precision(evaluation, iou)
        assert list(curves) == ['cat', 'dog', 'owl']
        assert np.mean(list(curves.values())) == pytest.approx(coco_numbers(evaluation)[name])


def test_finding_nothing_is_zero(truth, prediction):
    numbers = coco_numbers(evaluate([prediction(i) for i in (10, 20, 30, 40, 50)], truth))
    assert numbers['AP'] == numbers['AR100'] == 0
    assert numbers['APl'] == -1


def test_official_figures_of_pycocotools():
    if not COCO_EVAL.is_dir():
        pytest.skip(why_not('coco_eval'))
    coco = COCO(str(COCO_EVAL / 'instances_val2014_100.json'))
    truth = Truth(coco, 'instances_val2014_100.json', '', coco.get_cat_ids())
    results = json.loads((COCO_EVAL / 'instances_val2014_fakebbox100_results.json').read_text())
    predictions = []
    for image_id in coco.imgs:
        found = [result for result in results if result['image_id'] == image_id]
        boxes = torch.tensor([r['bbox'] for r in found], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = dict(
            bboxes=boxes,
            scores=torch.tensor([r['score'] for r in found], dtype=torch.float64),
            labels=torch.tensor([truth.category_ids.index(r['category_id']) for r in found]).long(),
        )
        predictions.append(dict(img_id=image_id, pred_instances=instances))
    evaluation = evaluate(predictions, truth)
    assert isinstance(evaluation, COCOeval)
    numbers = coco_numbers(evaluation)
    expected = dict(AP=0.504581, AP50=0.696973, AP75=0.572982)
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_bad_predictions_are_named(tmp_path):
    path = tmp_path / 'predictions.pkl'
    with pytest.raises(FileNotFoundError, match='predictions.pkl: no such predictions'):
        load_predictions(path)
    contents = {
        b'not a pickle at all': 'predictions.pkl: not a pickle',
        b'': 'predictions.pkl: not a pickle',
        pickle.dumps([]): 'predictions.pkl: no predictions',
        pickle.dumps({'a': 1}): 'predictions.pkl: no predictions',
        pickle.dumps([{'img_id': 1}]): 'predictions.pkl: entry 0 has no img_id and pred_instances',
        pickle.dumps([{'img_id': 1, 'pred_instances': {'bboxes': 0}}]): "lacks .'labels', 'scores'",
    }
    for content, message in contents.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_predictions(path)


def test_predictions_of_another_data_set_are_named(truth, prediction):
    with pytest.raises(ValueError, match='instances_val.json: has no image with id 99'):
        evaluate([prediction(99, (0, 0.5, 0, 0, 9, 9))], truth)
    for label in (5, -1):
        with pytest.raises(ValueError, match=f'has 3 classes, but .* image 10 have label {label}'):
            evaluate([prediction(10, (label, 0.5, 0, 0, 9, 9))], truth)


def test_predictions_that_would_be_miscounted_are_named(truth, prediction):
    box = (0, 0.5, 0, 0, 9, 9)
    with pytest.raises(ValueError, match='have image 20 twice'):
        evaluate([prediction(20, box), prediction(20, box)], truth)
    for spoilt in ((0, np.nan, 0, 0, 9, 9), (0, 0.5, 0, 0, np.inf, 9)):
        with pytest.raises(ValueError, match='of image 20 have numbers that are not finite'):
            evaluate([prediction(20, spoilt)], truth)


def test_a_box_that_could_not_be_found_is_named(make_config, data_root):
    path = data_root / 'annotations' / 'instances_val.json'
    content = json.loads(path.read_text())
    content['annotations'][2]['id'] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r'annotations\[2\] .id 0.: .* a number other than 0'):
        load_truth(Config.fromfile(make_config()))


def test_bad_annotations_are_named(make_config, data_root):
    config = Config.fromfile(make_config())
    config.test_dataloader.dataset.metainfo = dict(classes=('cat', 'fish'))
    with pytest.raises(ValueError, match=r"instances_val.json.*missing are \['fish'\]"):
        load_truth(config)
    path = data_root / 'annotations' / 'instances_val.json'
    for content in ('{', '[]', '{"images": [{}]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match='instances_val.json: not an annotation file'):
            load_truth(config)
    path.unlink()
    with pytest.raises(FileNotFoundError, match='instances_val.json: no such annotation file'):
        load_truth(config)
