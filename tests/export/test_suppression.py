import pytest
import torch
from mmcv.ops import batched_nms

onnx = pytest.importorskip('onnx', reason="the extra 'export' is not installed")
onnxruntime = pytest.importorskip('onnxruntime', reason="the extra 'export' is not installed")


def suppressor(nms, most):
    """A model that is nothing but suppression."""
    from sasa_det.export.suppression import suppress

    helper, kind = onnx.helper, onnx.TensorProto
    shapes = dict(boxes=['b', 'm', 4], scores=['b', 'm'], labels=['b', 'm'])
    types = dict(boxes=kind.FLOAT, scores=kind.FLOAT, labels=kind.INT64)

    def values(prefix):
        return [helper.make_tensor_value_info(prefix + n, types[n], s) for n, s in shapes.items()]

    graph = helper.make_graph(
        [helper.make_node('Identity', [f'in_{name}'], [name]) for name in shapes],
        'suppressor', values('in_'), values(''),
    )  # fmt: skip
    suppress(graph, nms, most)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize('class_agnostic', [False, True])
def test_it_keeps_what_mmcv_keeps(class_agnostic):
    torch.manual_seed(0)
    corners = torch.rand(3, 200, 2) * 50
    boxes = torch.cat([corners, corners + 5 + torch.rand(3, 200, 2) * 30], 2)
    scores, labels = torch.rand(3, 200), torch.randint(0, 4, (3, 200))
    scores[:, ::7] = -1  # these take no part
    scores[1] = -1  # an image in which there is nothing
    nms = dict(type='nms', iou_threshold=0.4, class_agnostic=class_agnostic)
    feed = {
        f'in_{n}': x.numpy() for n, x in dict(boxes=boxes, scores=scores, labels=labels).items()
    }
    found = dict(
        zip(('boxes', 'scores', 'labels', 'images_of'), suppressor(nms, 20).run(None, feed))
    )
    assert set(found['images_of'].tolist()) == {0, 2}
    for image in (0, 2):
        part = scores[image] >= 0
        expected, kept = batched_nms(
            boxes[image][part], scores[image][part], labels[image][part], nms
        )
        of_image = found['images_of'] == image
        assert of_image.sum() == min(len(kept), 20)
        assert found['boxes'][of_image].tolist() == boxes[image][part][kept][:20].tolist()
        assert found['scores'][of_image].tolist() == expected[:20, 4].tolist()
        assert found['labels'][of_image].tolist() == labels[image][part][kept][:20].tolist()
