"""How NMS in ONNX operators is appended to a graph that ends in candidates."""

from onnx import TensorProto, helper

NAMES = ('boxes', 'scores', 'labels')


def suppress(graph, nms: dict, max_per_image: int) -> None:
    """Append NMS to a graph, so that it returns the kept boxes of all images of the batch, concatenated.

    Boxes of different classes are moved apart, as in mmcv's ``batched_nms``, so that one NMS serves
    all classes.

    Args:
        graph: An onnx GraphProto with the outputs of :class:`~sasa_det.export.decoded.Candidates`.
            They become boxes (found, 4), scores (found,), labels (found,), best first, and
            images_of (found,), the batch index of each box's image.
        nms: The detector's ``test_cfg.nms``.
        max_per_image: Boxes to keep per image.
    """
    _rename(graph, {name: f'candidate_{name}' for name in NAMES})
    constants = dict(
        one=[1], first=[0], third=[2], corners=[2], most=[max_per_image], box_axes=[1, 2]
    )
    for name, numbers in constants.items():
        graph.initializer.append(
            helper.make_tensor(f'nms_{name}', TensorProto.INT64, [len(numbers)], numbers)
        )
    floats = dict(iou=nms['iou_threshold'], least=0.0, gap=1.0)
    for name, number in floats.items():
        graph.initializer.append(
            helper.make_tensor(f'nms_{name}', TensorProto.FLOAT, [1], [number])
        )

    boxes, scores, labels = (f'candidate_{name}' for name in NAMES)
    apart = boxes
    if not nms.get('class_agnostic', False):
        edge = _add(graph, 'ReduceMax', boxes, 'nms_box_axes', keepdims=1)
        step = _add(graph, 'Add', edge, 'nms_gap')
        column = _add(graph, 'Unsqueeze', _add(graph, 'Cast', labels, to=1), 'nms_corners')
        apart = _add(graph, 'Add', boxes, _add(graph, 'Mul', column, step))
    by_class = _add(graph, 'Unsqueeze', scores, 'nms_one')
    # Rows of image, class (always one) and candidate.
    kept = _add(graph, 'NonMaxSuppression', apart, by_class, 'nms_most', 'nms_iou', 'nms_least')
    image = _add(graph, 'Gather', kept, 'nms_first', axis=1)
    place = _add(graph, 'Concat', image, _add(graph, 'Gather', kept, 'nms_third', axis=1), axis=1)
    for name in NAMES:
        graph.node.append(
            helper.make_node('GatherND', [f'candidate_{name}', place], [name], f'nms_{name}')
        )
    graph.node.append(
        helper.make_node('Squeeze', [image, 'nms_one'], ['images_of'], 'nms_images_of')
    )
    del graph.output[:]
    graph.output.extend(
        [
            helper.make_tensor_value_info('boxes', TensorProto.FLOAT, ['found', 4]),
            helper.make_tensor_value_info('scores', TensorProto.FLOAT, ['found']),
            helper.make_tensor_value_info('labels', TensorProto.INT64, ['found']),
            helper.make_tensor_value_info('images_of', TensorProto.INT64, ['found']),
        ]
    )


def _add(graph, kind: str, *inputs: str, **attributes) -> str:
    name = f'nms_{len(graph.node)}_{kind}'
    graph.node.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
    return name


def _rename(graph, names: dict) -> None:
    for node in graph.node:
        for values in (node.input, node.output):
            for place, value in enumerate(values):
                values[place] = names.get(value, value)
    # Shape information under the old names belongs to the candidates, so it is renamed too.
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
