import numpy as np
import pytest
import torch

from sasa_det.visualization.explorer.pictures import draw_detections, draw_grids, draw_heat, zoom
from sasa_det.visualization.explorer.session import Detection

LAYER = 'backbone.layer2.0.conv2'


def at(picture, row, col):
    return tuple(int(value) for value in picture[row, col])


def test_a_small_image_is_enlarged_and_marked():
    image = np.full((100, 160, 3), 90, np.uint8)
    found = [Detection('owl', 0.9, (20.0, 40.0, 80.0, 90.0))]
    picture = draw_detections(image, found, (20, 120), (10, 110, 31, 131))
    assert zoom(image) == 4 and picture.shape == (400, 640, 3)
    assert at(picture, 4 * 20 + 2, 4 * 120 + 2) == (255, 0, 0)  # the cross
    assert at(picture, 4 * 10, 4 * 115) == (0, 255, 255)  # the window
    assert at(picture, 4 * 60, 4 * 20) == (31, 119, 180)  # the box
    assert at(picture, 4 * 60, 4 * 50) == (90, 90, 90)
    assert zoom(np.zeros((2000, 100, 3))) == 1


def test_a_box_beyond_the_image_is_drawn_as_far_as_it_goes():
    image = np.zeros((64, 64, 3), np.uint8)
    boxes = [(-9.0, -9.0, 99.0, 99.0), (60.0, 0.0, 60.0, 0.0)]
    found = [Detection('a name that is long', 1.0, box) for box in boxes]
    assert draw_detections(image, found, (0, 0)).shape == (640, 640, 3)


def test_heat_is_where_the_weight_is(explorer, image):
    found = explorer.look(image, LAYER, None, (60, 90))
    heads, size = found.weights.shape[1:3]
    weights = torch.zeros(1, heads, size, size)
    weights[:, :, 2, 0] = 1  # two cells to the left of the query
    black = found._replace(weights=weights, image=np.zeros_like(found.image))
    picture = draw_heat(black).astype(int)
    # inferno's end is a pale yellow; the frame is cyan, the cross red, the ground black.
    yellow = (picture[..., 0] > 150) & (picture[..., 1] > 150) & (picture[..., 2] < 140)
    columns = np.flatnonzero(yellow[:, : picture.shape[1] // heads].any(0))
    red = (picture[..., 0] > 200) & (picture[..., 1] < 60) & (picture[..., 2] < 60)
    cross = np.flatnonzero(red[:, : picture.shape[1] // heads].any(0))
    assert len(columns) and columns.max() < cross.mean()


@pytest.mark.parametrize('missing', ['content', 'position'])
def test_a_term_that_a_layer_lacks_is_named(explorer, image, missing):
    found = explorer.look(image, LAYER, None, (0, 0))
    whole, without = draw_grids(found), draw_grids(found._replace(**{missing: None}))
    assert whole.shape == without.shape and not np.array_equal(whole, without)


def test_masked_places_and_equal_logits_are_drawn(explorer, image):
    found = explorer.look(image, LAYER, None, (0, 0))
    content = torch.zeros_like(found.weights)
    content[..., 0, :] = -float('inf')
    assert draw_grids(found._replace(content=content, position=content)).ndim == 3
