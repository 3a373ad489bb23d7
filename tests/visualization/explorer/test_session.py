import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector
from torch import nn

from sasa_det.evaluation.attention_maps import attention_maps
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.visualization.explorer.layers import find_layers
from sasa_det.visualization.explorer.session import Explorer
from sasa_det.visualization.explorer.summary import HEADERS, head_rows


def test_layers_are_named_for_people(explorer):
    titles = {layer.title: layer for layer in explorer.layers}
    assert len(titles) == len(explorer.layers) == 20
    assert titles['Backbone, stage 3, block 4'].name == 'backbone.layer3.3.conv2'
    fpn = [title for title in titles if title.startswith('FPN')]
    assert fpn == ['FPN, P3', 'FPN, P4', 'FPN, P5', 'FPN, P6']
    assert titles['Head, class tower, layer 1'].levels == ('P3', 'P4', 'P5', 'P6')
    assert titles['Head, box tower, layer 1'].levels == ('P3', 'P4', 'P5', 'P6')
    assert all(layer.levels == () for layer in explorer.layers if 'Head' not in layer.title)


def test_layers_that_would_share_a_title_show_their_names(model, monkeypatch):
    names = ['backbone.layer1.0.conv1', 'backbone.layer1.0.conv2', 'other.part']
    found = dict.fromkeys(names, LocalSelfAttention2d(16))
    monkeypatch.setattr('sasa_det.visualization.explorer.layers.attention_layers', lambda _: found)
    monkeypatch.setattr(
        'sasa_det.visualization.explorer.layers.layer_strides', lambda *_: dict.fromkeys(found, [4])
    )
    assert [layer.title for layer in find_layers(model)] == [
        'Backbone, stage 1, block 1 (backbone.layer1.0.conv1)',
        'Backbone, stage 1, block 1 (backbone.layer1.0.conv2)',
        'other.part',
    ]


def test_detections_are_mmdets_by_score(explorer, model, image):
    found = inference_detector(model, image).pred_instances
    detections = explorer.detect(image)
    assert len(detections) == len(found) == 5
    assert [d.score for d in detections] == sorted(found.scores.tolist(), reverse=True)
    best = found[int(found.scores.argmax())]
    assert detections[0].box == tuple(best.bboxes[0].tolist())
    assert detections[0].name == model.dataset_meta['classes'][int(best.labels)]
    score = detections[2].score
    explorer = Explorer(model, score_thr=score)
    assert (
        all(d.score >= score for d in explorer.detect(image)) and len(explorer.detect(image)) >= 3
    )


def test_a_look_is_the_analysis_own(explorer, model, image):
    name = 'bbox_head.reg_convs.0.conv'
    found = explorer.look(image, name, 'P4', (30, 100))
    (expected,) = attention_maps(model, image, [name], [(30, 100)], level=1)
    assert found.stride == expected.stride == 16
    torch.testing.assert_close(found.weights, expected.weights)
    torch.testing.assert_close(found.position, expected.position)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('nowhere', None, (0, 0)), "There is no attention layer 'nowhere'."),
        (('bbox_head.cls_convs.0.conv', 'P9', (0, 0)), "no level 'P9'; there are P3, P4, P5, P6."),
        (
            ('backbone.layer1.0.conv2', None, (120, 0)),
            'no pixel x = 0, y = 120: x goes from 0 to 179, y from 0 to 119.',
        ),
        (('backbone.layer1.0.conv2', None, (0, -1)), 'There is no pixel x = -1, y = 0'),
    ],
)
def test_what_there_is_not(explorer, image, arguments, message):
    with pytest.raises(ValueError) as raised:
        explorer.look(image, *arguments)
    assert message in str(raised.value)


def test_a_detector_without_attention(model, monkeypatch):
    monkeypatch.setattr('sasa_det.visualization.explorer.session.find_layers', lambda _: [])
    with pytest.raises(ValueError, match='no layer of this detector attends'):
        Explorer(nn.Identity())


def test_head_rows_tell_the_largest_weight_and_the_term_that_makes_it(explorer, image):
    found = explorer.look(image, 'backbone.layer2.0.conv2', None, (60, 90))
    content = torch.zeros(1, 4, 5, 5)
    position = torch.zeros(1, 4, 5, 5)
    content[0, 1, 0, 4] = 3
    position[0, 2, 3, 2] = -float('inf')
    position[0, 2, 4, 2] = 5
    both = (content + position).flatten(2).softmax(-1).view(1, 4, 5, 5)
    rows = head_rows(found._replace(weights=both, content=content, position=position))
    assert all(len(row) == len(HEADERS) for row in rows)
    e = np.exp
    assert rows[1] == [2, '2 up, 2 right', f'{e(3) / (24 + e(3)):.3f}',
                       f'{1 / (24 + e(3)):.3f}', '3.00', '0.00']  # fmt: skip
    assert rows[2][1] == '2 down' and rows[2][4:] == ['0.00', '5.00']
    assert head_rows(found._replace(weights=both, dilation=3))[1][1] == '6 up, 6 right'
