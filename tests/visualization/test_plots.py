import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from mmengine.config import Config

from sasa_det.evaluation.attention_maps import AttentionMap
from sasa_det.evaluation.coco_numbers import coco_numbers, evaluate, load_truth
from sasa_det.evaluation.training_log import TrainingLog
from sasa_det.visualization.plots import (
    draw_attention,
    draw_curves,
    draw_detections,
    draw_precision_recall,
    smooth,
)


@pytest.fixture
def truth(make_config):
    return load_truth(Config.fromfile(make_config()))


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def rectangles(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def test_curves_show_the_log():
    train = [
        dict(step=10 * i, loss=3.0 / i, loss_cls=2.0 / i, loss_bbox=1.0 / i, epoch=1 + i // 20)
        for i in range(1, 41)
    ]
    val = [{'step': i, 'coco/bbox_mAP': 0.1 * i, 'coco/bbox_mAP_50': 0.2 * i} for i in (1, 2, 3)]
    losses, metrics = draw_curves(TrainingLog(train, val, [])).axes
    assert legend(losses) == ['total', 'classes', 'boxes']
    raw, smoothed = losses.lines[4:6]
    steps = np.arange(10, 401, 10)
    np.testing.assert_allclose(raw.get_xydata(), np.stack([steps, 10.0 / steps], 1))
    np.testing.assert_allclose(smoothed.get_ydata(), smooth(10.0 / steps))
    assert legend(metrics) == ['AP', 'AP50']
    np.testing.assert_allclose(metrics.lines[1].get_xydata(), [(1, 0.2), (2, 0.4), (3, 0.6)])
    assert metrics.get_xlabel() == 'epoch'


def test_smoothing_averages_and_leaves_out_what_is_not_finite():
    values = np.arange(30, dtype=float)
    np.testing.assert_allclose(smooth(values)[1:-1], values[1:-1])
    values[10] = np.nan
    np.testing.assert_allclose(smooth(values)[9:12], [8.5, 10, 11.5])


def test_precision_recall_shows_the_evaluation(truth, predictions):
    evaluation = evaluate(predictions, truth)
    numbers = coco_numbers(evaluation)
    axes = draw_precision_recall(evaluation).axes
    assert [one.get_title() for one in axes] == ['IoU 0.50', 'IoU 0.75']
    for one, name, index in zip(axes, ('AP50', 'AP75'), (0, 5), strict=True):
        mean, *classes = one.lines
        assert mean.get_ydata().mean() == pytest.approx(numbers[name])
        for label, line in enumerate(classes):
            np.testing.assert_array_equal(line.get_xdata(), np.linspace(0, 1, 101))
            expected = evaluation.eval['precision'][index, :, label, 0, -1]
            np.testing.assert_array_equal(line.get_ydata(), expected)
        assert legend(one)[0] == f'mean of classes, AP {numbers[name]:.3f}'
        assert [text.split(',')[0] for text in legend(one)[1:]] == ['cat', 'dog', 'owl']


def test_detections_show_truth_beside_prediction(truth, predictions):
    figure = draw_detections(truth, predictions, count=3)
    shown = [axes for axes in figure.axes if axes.images]
    titles = [axes.get_title() for axes in shown]
    # The first with boxes, in the file's order; one of three predictions of the second is too weak.
    assert titles == [
        'image_20.jpg: truth', 'prediction: 2 with score ≥ 0.3',
        'image_30.jpg: truth', 'prediction: 2 with score ≥ 0.3',
        'image_40.jpg: truth', 'prediction: 1 with score ≥ 0.3',
    ]  # fmt: skip
    true, predicted = rectangles(shown[4]), rectangles(shown[5])
    assert [box.get_bbox().bounds for box in true] == [(50, 4, 40, 50)]
    assert [box.get_bbox().bounds for box in predicted] == [(50, 4, 40, 45)]
    assert [text.get_text() for text in shown[4].texts] == ['owl']
    assert [text.get_text() for text in shown[5].texts] == ['owl 0.85']
    assert [text.get_text() for text in shown[2].texts] == ['cat', 'owl']


def test_detections_mark_crowds(truth, predictions):
    axes = draw_detections(truth, predictions).axes[6]
    assert [text.get_text() for text in axes.texts] == ['cat', 'dog (crowd)']
    assert [box.get_linestyle() for box in rectangles(axes)] == ['-', '--']


def test_a_missing_image_is_named(truth, predictions, data_root):
    (data_root / 'val' / 'image_30.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='image_30.jpg'):
        draw_detections(truth, predictions)
    (data_root / 'val' / 'image_30.jpg').write_bytes(b'no image')
    with pytest.raises(ValueError, match='image_30.jpg: not an image'):
        draw_detections(truth, predictions)


def test_attention_lies_over_its_window():
    weights = torch.zeros(1, 2, 3, 3)
    weights[0, 0, 0, 2] = weights[0, 1, 1, 1] = 1
    image = np.zeros((40, 60, 3), np.uint8)
    point, cell = torch.tensor([[21.0, 33.0]]), torch.tensor([[2, 3]])
    found = AttentionMap('neck.conv', weights, point, cell, (4, 6), 10, 2, image)
    figure = draw_attention([found])
    overview, first, second = figure.axes[:3]
    # Cell (2, 3) with one position of distance 2 to each side, 10 pixels a cell.
    assert rectangles(overview)[0].get_bbox().bounds == (10, 0, 50, 50)
    assert overview.lines[0].get_xydata().tolist() == [[33, 21]]
    for axes, peak in ((first, (0, 4)), (second, (2, 2))):
        heat = axes.images[-1]
        assert heat.get_extent() == [10, 60, 50, 0]
        shown = np.ma.filled(heat.get_array(), np.nan)
        assert shown.shape == (5, 5) and np.isnan(shown).sum() == 25 - 9
        assert np.unravel_index(np.nanargmax(shown), shown.shape) == peak
        assert rectangles(axes)[1].get_bbox().bounds == (30, 20, 10, 10)
    assert 'neck.conv' in figure.subfigs[0].get_suptitle()
