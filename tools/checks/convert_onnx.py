#!/usr/bin/env python
"""Convert a detector that others have trained, and print the variance that each layer leaves unexplained.

    pip install --no-deps ddddocr==1.6.1
    python tools/checks/convert_onnx.py FOLDER

The detector is that of ddddocr, which has the MIT licence: a YOLOX with SiLU, trained to find characters in
pictures. Its ONNX file, 20 MB, is part of the package. FOLDER holds any images. The last quarter of them is
held out, and each number is of these. The PyTorch network is first compared with onnxruntime.
"""

import argparse
import random
from importlib.util import find_spec
from pathlib import Path
from typing import List

import cv2
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasa_det.convert import convert
from sasa_det.convert.conversion import HELD_OUT
from sasa_det.convert.detectors import IMAGE_ENDINGS

EDGE = 416  # of the detector's input, in pixels
PADDING = 114  # grey


class OnnxNetwork(nn.Module):
    """A network that an ONNX file describes, of the few operators that a YOLOX has.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        graph = onnx.load(path).graph
        self._input, self._outputs = graph.input[0].name, [each.name for each in graph.output]
        self._constants = {
            each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy())
            for each in graph.initializer
        }
        self._nodes = [
            (
                node,
                {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute},
            )
            for node in graph.node
        ]
        for node, attributes in self._nodes:
            if node.op_type == 'Conv':
                self.add_module(node.name, self._convolution(node, attributes))
        # By the last node that reads it: what is not needed after that.
        last = {name: index for index, (node, _) in enumerate(self._nodes) for name in node.input}
        self._unneeded = [[] for _ in self._nodes]
        for name, index in last.items():
            self._unneeded[index].append(name)

    def _convolution(self, node, attributes) -> nn.Conv2d:
        weight, bias = (self._constants[name] for name in node.input[1:])
        conv = nn.Conv2d(
            weight.shape[1] * attributes['group'], len(weight), weight.shape[2:], attributes['strides'],
            attributes['pads'][:2], attributes['dilations'], attributes['group'],
        )  # fmt: skip
        conv.load_state_dict(dict(weight=weight, bias=bias))
        return conv

    def forward(self, images: Tensor) -> List[Tensor]:
        """Run the nodes in the file's order."""
        values = {**self._constants, self._input: images}
        for (node, attributes), unneeded in zip(self._nodes, self._unneeded):
            inputs = [values[name] for name in node.input if name]
            if node.op_type == 'Conv':
                result = self.get_submodule(node.name)(inputs[0])
            else:
                result = _OPERATORS[node.op_type](*inputs, **attributes)
            values[node.output[0]] = result
            for name in unneeded:
                values.pop(name, None)
        return [values[name] for name in self._outputs]


def _slice(x, starts, ends, axes, steps):
    for start, end, axis, step in zip(*(each.tolist() for each in (starts, ends, axes, steps))):
        x = x[(slice(None),) * axis + (slice(start, end, step),)]
    return x


def _reshape(x, shape):
    # The file's batch is 1; ours is larger.
    return x.reshape(len(x), *shape.tolist()[1:])


_OPERATORS = dict(
    Add=torch.add,
    Concat=lambda *parts, axis: torch.cat(parts, axis),
    MaxPool=lambda x, kernel_shape, pads, strides, ceil_mode: F.max_pool2d(
        x, kernel_shape, strides, pads[:2]
    ),
    Mul=torch.mul,
    Reshape=_reshape,
    Resize=lambda x, *_, **__: F.interpolate(x, scale_factor=2.0),
    Sigmoid=torch.sigmoid,
    Slice=_slice,
    Transpose=lambda x, perm: x.permute(perm),
)


def load(folder: Path, count: int, seed: int) -> Tensor:
    """Load images as ddddocr does: resized, and padded to a square."""
    paths = sorted(each for each in folder.rglob('*') if each.suffix.lower() in IMAGE_ENDINGS)
    random.Random(seed).shuffle(paths)
    images = []
    for path in paths[:count]:
        image = cv2.imread(str(path))
        scale = EDGE / max(image.shape)
        image = cv2.resize(image, None, fx=scale, fy=scale)[:EDGE, :EDGE]
        padded = np.full((EDGE, EDGE, 3), PADDING, np.uint8)
        padded[: image.shape[0], : image.shape[1]] = image
        images.append(torch.from_numpy(padded).permute(2, 0, 1).float())
    return torch.stack(images)


def unexplained(truth: Tensor, found: Tensor) -> float:
    """Compute the share of the variance that is left."""
    return ((found - truth).square().mean() / truth.var(correction=0)).item()


@torch.no_grad()
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path, help='images')
    parser.add_argument('--num-images', type=int, default=32)
    parser.add_argument('--seed', type=int, default=0, help='of the choice of images')
    options = parser.parse_args()
    package = find_spec('ddddocr')
    if package is None:
        parser.error('ddddocr is not installed; pip install --no-deps ddddocr==1.6.1')
    file = Path(package.submodule_search_locations[0], 'common_det.onnx')
    network = OnnxNetwork(file).eval()
    images = load(options.folder, options.num_images, options.seed)

    import onnxruntime

    (expected,) = onnxruntime.InferenceSession(file).run(None, {'images': images[:1].numpy()})
    torch.testing.assert_close(
        network(images[:1])[0], torch.from_numpy(expected), rtol=1e-3, atol=1e-3
    )

    found = convert(network, images, seed=options.seed)
    print(
        '| layer | channels | stride | unexplained | of a free convolution |\n|---|---|---|---|---|'
    )
    for name, fitted in found.fitted.items():
        conv = network.get_submodule(name)
        print(
            f'| {name} | {conv.in_channels} to {conv.out_channels} | {conv.stride[0]} | '
            f'{fitted.unexplained:.3f} | {fitted.unavoidable:.3f} |'
        )
    shares = [fitted.unexplained for fitted in found.fitted.values()]
    print(f'\nmean of {len(shares)} layers: {sum(shares) / len(shares):.4f}')
    others = images[-max(1, round(len(images) * HELD_OUT)) :]
    truth, result = network(others)[0], found.model(others)[0]
    for name, part in (('boxes', slice(0, 4)), ('objectness', slice(4, 5))):
        print(f'{name}: {unexplained(truth[..., part], result[..., part]):.4f}')


if __name__ == '__main__':
    main()
