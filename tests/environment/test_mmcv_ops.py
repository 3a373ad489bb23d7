"""mmcv's compiled operators, as this environment has them, against plain torch.

The set-up compiles them in a way of its own: see tools/pch_cxx.sh.
"""

import torch
from mmcv.ops import deform_conv2d, nms, roi_align


def draw(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def sample(x, rows, cols):
    """Interpolate maps (C, H, W) at positions of any shape, in pixels; zero from a pixel outside on."""
    height, width = x.shape[1:]
    result = torch.zeros(len(x), *rows.shape, dtype=x.dtype)
    for row in range(height):
        for col in range(width):
            weight = (1 - (rows - row).abs()).clamp(min=0) * (1 - (cols - col).abs()).clamp(min=0)
            result = result + weight * x[:, row, col].view(-1, *[1] * rows.dim())
    return result


def test_nms():
    corner, size, scores = draw(200, 2) * 60, draw(201, 2)[:200] * 30 + 1, draw(200)
    boxes = torch.cat([corner, corner + size], 1)
    left, kept = scores.argsort(descending=True).tolist(), []
    while left:
        best, left = left[0], left[1:]
        kept.append(best)
        begin = torch.maximum(boxes[best, :2], boxes[left, :2])
        end = torch.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = (end - begin).clamp(min=0).prod(1)
        area = size.prod(1)
        overlap = shared / (area[best] + area[left] - shared)
        left = [box for box, iou in zip(left, overlap.tolist()) if iou <= 0.4]
    found, indices = nms(boxes, scores, 0.4)
    assert 20 < len(kept) < 180 and indices.tolist() == kept
    assert torch.equal(found, torch.cat([boxes, scores[:, None]], 1)[kept])


def test_roi_align():
    x = draw(2, 3, 9, 8).double().requires_grad_()
    # Of the second image and the first, within the map: one of 12 x 14 pixels of the image, one of 5 x 10.
    rois = torch.tensor([[1, 2, 1, 14, 15], [0, 4.5, 3, 9.5, 13]], dtype=torch.float64)
    result = roi_align(x, rois, (3, 2), 0.5, 2, 'avg', True)
    expected = []
    for image, left, top, right, bottom in rois.tolist():
        # Two samples per cell and direction, in the middle of halves of a cell. Aligned: less half a pixel.
        rows = top * 0.5 - 0.5 + (torch.arange(6).double() + 0.5) / 6 * (bottom - top) * 0.5
        cols = left * 0.5 - 0.5 + (torch.arange(4).double() + 0.5) / 4 * (right - left) * 0.5
        samples = sample(x[int(image)], *torch.meshgrid(rows, cols, indexing='ij'))
        expected.append(torch.nn.functional.avg_pool2d(samples, 2))
    torch.testing.assert_close(result, torch.stack(expected))
    weight = draw(2, 3, 3, 2)
    ours, truth = (
        torch.autograd.grad((y * weight).sum(), x)[0] for y in (result, torch.stack(expected))
    )
    torch.testing.assert_close(ours, truth)


def test_deform_conv():
    x = draw(1, 4, 6, 5).double().requires_grad_()
    offset = ((draw(1, 18, 6, 5).double() - 0.5) * 3).requires_grad_()
    weight = draw(3, 4, 3, 3).double().requires_grad_()
    result = deform_conv2d(x, offset, weight, 1, 1)
    rows, cols = torch.meshgrid(torch.arange(6), torch.arange(5), indexing='ij')
    expected = 0
    for tap in range(9):
        samples = sample(
            x[0],
            rows + tap // 3 - 1 + offset[0, 2 * tap],
            cols + tap % 3 - 1 + offset[0, 2 * tap + 1],
        )
        expected = expected + torch.einsum('oc,chw->ohw', weight[:, :, tap // 3, tap % 3], samples)
    torch.testing.assert_close(result[0], expected)
    inputs = (x, offset, weight)
    scale = draw(3, 6, 5)
    ours, truth = (torch.autograd.grad((y * scale).sum(), inputs) for y in (result[0], expected))
    torch.testing.assert_close(ours, truth)
