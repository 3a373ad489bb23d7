import mmcv
import numpy as np
import pytest
import torch
from mmdet.apis import init_detector
from torch import nn

from sasa_det.evaluation.attention_maps import attention_layers, attention_maps, layer_strides
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.layers.projection import project_by


@pytest.fixture
def detector(make_config, checkpoint):
    config = make_config()
    return init_detector(str(config), str(checkpoint(config)), device='cpu')


def rigged(position, **kwargs):
    """An attention layer whose queries are all ones, whatever the image."""
    layer = LocalSelfAttention2d(3, 4, num_heads=2, bias=True, position=position, **kwargs)
    with torch.no_grad():
        layer.query.weight.zero_()
        layer.query.bias.fill_(1)
    return layer


@pytest.mark.parametrize('dilation', [1, 2])
def test_a_bright_cell_is_found_where_it_is(dilation):
    layer = rigged('none', kernel_size=5, dilation=dilation)
    with torch.no_grad():
        layer.key.weight.fill_(30)
    model = nn.Sequential(nn.AvgPool2d(4), layer)
    row, col = 5, 9  # the bright cell; 4 x 4 pixels of the image
    image = torch.zeros(1, 3, 60, 80)
    image[:, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4] = 1
    # Two cells above and four to the right of it, at odd places in their cells.
    query = (4 * (row - 2) + 3, 4 * (col + 4) + 1)
    (found,) = attention_maps(model, image, points=[query])
    assert found.stride == 4 and found.map_size == (15, 20) and found.cells.tolist() == [[3, 13]]
    expected = torch.zeros(5, 5)
    if dilation == 2:
        expected[2 + 1, 2 - 2] = 1  # steps of two cells: one down, two left
    else:
        expected.fill_(1 / 25)  # out of a 5 x 5 window's reach
    torch.testing.assert_close(found.weights, expected.expand(1, 2, 5, 5))
    top, left, bottom, right = found.window(0)
    radius = 2 * dilation
    assert (top, left) == (4 * (3 - radius), 4 * (13 - radius))
    assert (bottom, right) == (4 * (4 + radius), 4 * (14 + radius))


def test_a_rigged_relative_position_is_seen_there():
    layer = rigged('relative', kernel_size=7, logits='qr', position_per_head=True)
    with torch.no_grad():
        layer.rel_row.zero_()[:, :, 1] = 50
        layer.rel_col.zero_()
        layer.rel_col[0, :, 6] = layer.rel_col[1, :, 2] = 50
    (found,) = attention_maps(layer, torch.rand(1, 3, 20, 30), points=[(0, 0), (10, 20)])
    expected = torch.zeros(2, 2, 7, 7)
    expected[:, 0, 1, 6] = expected[:, 1, 1, 2] = 1  # outside of the map for the first point, too
    torch.testing.assert_close(found.weights, expected)


def test_weights_are_those_of_the_layers_forward():
    model = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), LocalSelfAttention2d(8, num_heads=2))
    image = torch.randn(1, 3, 32, 32)
    layer = model[1]
    (found,) = attention_maps(model, image, points=[(16, 12)])
    x = model[0](image)
    values = project_by(layer.value, x)[0, :, 8 - 3 : 8 + 4, 6 - 3 : 6 + 4].reshape(2, 4, 7, 7)
    expected = torch.einsum('hij,hcij->hc', found.weights[0], values).flatten()
    torch.testing.assert_close(model(image)[0, :, 8, 6], expected)


def test_a_detector_by_parts(detector, data_root):
    image = str(data_root / 'val' / 'image_30.jpg')
    maps = attention_maps(detector, image, points=[(42, 55), (0, 0), (63, 95)])
    assert [found.part for found in maps] == ['backbone', 'neck', 'bbox_head']
    for found in maps:
        assert found.weights.shape == (3, 2, 3, 3)
        torch.testing.assert_close(found.weights.sum((-2, -1)), torch.ones(3, 2))
        assert (found.weights >= 0).all()
        # The pipeline enlarges 96 x 64 to 192 x 128.
        assert found.points.tolist() == [[84, 110], [0, 0], [126, 190]]
        height, width = found.map_size
        assert found.cells[1].tolist() == [0, 0]
        assert found.cells[2].tolist() == [height - 1, width - 1]
    pixels = mmcv.imresize(mmcv.imread(image), (192, 128))[..., ::-1]
    difference = maps[0].image.astype(int) - pixels.astype(int)
    assert maps[0].image.shape == (128, 192, 3) and np.abs(difference).max() <= 1


def test_by_default_a_map_that_is_larger_than_its_window(detector, data_root):
    layers = list(attention_layers(detector))
    neck = [name for name in layers if name.startswith('neck')]
    strides = [
        attention_maps(detector, str(data_root / 'val' / 'image_30.jpg'), layers=[name])[0]
        for name in neck
    ]
    # P3 to P5, then P6 and P7, whose inputs are P5 and P6.
    assert [(found.stride, found.map_size) for found in strides] == [
        (8, (16, 24)), (16, (8, 12)), (32, (4, 6)), (32, (4, 6)), (64, (2, 3))
    ]  # fmt: skip
    chosen = attention_maps(detector, str(data_root / 'val' / 'image_30.jpg'))
    assert chosen[1].layer == neck[3]
    assert chosen[0].layer == [name for name in layers if name.startswith('backbone')][-1]
    assert chosen[2].layer == layers[-1]


def test_levels_of_the_shared_head(detector, data_root):
    image = str(data_root / 'val' / 'image_30.jpg')
    head = list(attention_layers(detector))[-1]
    strides = [attention_maps(detector, image, [head], level=level)[0].stride for level in range(5)]
    assert strides == [8, 16, 32, 64, 128]
    with pytest.raises(ValueError, match='level: 5, but bbox_head.* is called for 5 levels'):
        attention_maps(detector, image, [head], level=5)


def test_strides_of_every_call(detector, data_root):
    strides = layer_strides(detector, str(data_root / 'val' / 'image_30.jpg'))
    assert list(strides) == list(attention_layers(detector))
    head = {name: found for name, found in strides.items() if name.startswith('bbox_head')}
    assert head and all(found == [8, 16, 32, 64, 128] for found in head.values())
    neck = [found for name, found in strides.items() if name.startswith('neck')]
    assert neck == [[8], [16], [32], [32], [64]]


def test_terms_make_the_weights(detector, data_root):
    image = str(data_root / 'val' / 'image_30.jpg')
    for found in attention_maps(detector, image, points=[(42, 55), (0, 0)]):
        logits = (found.content + found.position).flatten(2)
        torch.testing.assert_close(found.weights.flatten(2), logits.softmax(-1))


def test_a_batch_of_a_dataloader_is_taken(detector, data_root):
    from mmdet.registry import DATASETS
    from mmengine.dataset import pseudo_collate

    dataset = DATASETS.build(detector.cfg.test_dataloader.dataset)
    batch = pseudo_collate([dataset[2]])
    image = str(data_root / 'val' / 'image_30.jpg')
    for one, other in zip(
        attention_maps(detector, batch), attention_maps(detector, image), strict=True
    ):
        assert one.layer == other.layer
        torch.testing.assert_close(one.weights, other.weights)
    with pytest.raises(ValueError, match='image: must be one image'):
        attention_maps(detector, pseudo_collate([dataset[1], dataset[2]]))


def test_the_model_is_left_as_it_was(detector, data_root):
    detector.train()
    before = [dict(module._forward_pre_hooks) for module in detector.modules()]
    attention_maps(detector, str(data_root / 'val' / 'image_30.jpg'))
    assert detector.training
    assert [dict(module._forward_pre_hooks) for module in detector.modules()] == before


def test_without_attention_there_is_nothing():
    assert attention_maps(nn.Conv2d(3, 3, 1), torch.rand(1, 3, 8, 8)) == []


def test_bad_arguments_are_named():
    model = nn.Sequential(LocalSelfAttention2d(3, 4, num_heads=2))
    image = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="layers: .'1'. are no attention layers; .*'0'"):
        attention_maps(model, image, layers=['1'])
    for point in ((8, 0), (0, -1)):
        with pytest.raises(ValueError, match='points: .* not all inside .* width are .8, 8'):
            attention_maps(model, image, points=[point])
    with pytest.raises(ValueError, match='image: must be one image'):
        attention_maps(model, image.expand(2, 3, 8, 8))
