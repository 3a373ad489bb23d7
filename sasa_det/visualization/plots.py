"""How a detector's training, accuracy, detections and attention are drawn."""

from typing import Optional, Sequence

import cv2
import mmcv
import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmdet.datasets.api_wrappers import COCOeval

from ..evaluation.attention_maps import AttentionMap
from ..evaluation.coco_numbers import Truth, precision
from ..evaluation.training_log import TrainingLog

LOSS_NAMES = {'loss': 'total', 'loss_cls': 'classes', 'loss_bbox': 'boxes'}
UNDERLAY = '0.2'  # grey beneath heat, outside of the image
METRIC_NAMES = {'bbox_mAP': 'AP', 'bbox_mAP_50': 'AP50'}


def draw_curves(log: TrainingLog) -> Figure:
    """Draw losses (as logged and smoothed) and validation AP and AP50 over the training.

    Args:
        log: From :func:`sasa_det.evaluation.training_log.read_training_log`.

    Examples:
        >>> train = [dict(step=i, loss=1 / i) for i in range(1, 9)]
        >>> [axes.get_xlabel() for axes in draw_curves(TrainingLog(train, [], [])).axes]
        ['iteration']
    """
    figure = Figure(figsize=(11 if log.val else 6.5, 4), layout='constrained')
    losses, *others = np.atleast_1d(figure.subplots(1, 2 if log.val else 1))
    for color, (key, name) in zip(('C0', 'C1', 'C2'), LOSS_NAMES.items(), strict=True):
        records = [record for record in log.train if key in record]
        if records:
            steps = [record['step'] for record in records]
            values = np.array([record[key] for record in records], dtype=float)
            losses.plot(steps, values, color=color, alpha=0.3, linewidth=1)
            losses.plot(steps, smooth(values), color=color, linewidth=2, label=name)
    losses.set(title='Loss', xlabel='iteration', ylabel='loss', xlim=(0, None), ylim=(0, None))
    for metrics in others:
        for metric, name in METRIC_NAMES.items():
            points = [
                (record['step'], value)
                for record in log.val
                for key, value in record.items()
                if key.split('/')[-1] == metric
            ]
            if points:
                metrics.plot(*zip(*points, strict=True), marker='o', markersize=4, label=name)
        metrics.set(title='On the validation set', xlabel=log.val_unit, xlim=(0, None), ylim=(0, 1))
    for axes in (losses, *others):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """Average over a centred window of a tenth of the series, ignoring non-finite values.

    Examples:
        >>> smooth(np.array([1.0, 3.0] * 10))[1:].tolist() == [2.0] * 19
        True
    """
    window = np.ones(max(1, len(values) // 10))
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), window, 'same')
    counts = np.convolve(finite.astype(float), window, 'same')
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


# A name of a class or a file may have a `$` in it, which is no formula.
@rc_context({'text.parse_math': False})
def draw_precision_recall(evaluation: COCOeval) -> Figure:
    """Draw precision against recall at IoU 0.50 and 0.75: each class faint, their mean bold.

    Args:
        evaluation: From :func:`sasa_det.evaluation.coco_numbers.evaluate`.

    Raises:
        ValueError: The ground truth has no box, so recall is undefined.
    """
    figure = Figure(figsize=(12, 5), layout='constrained')
    recall = evaluation.params.recThrs
    for axes, iou in zip(figure.subplots(1, 2, sharey=True), (0.50, 0.75), strict=True):
        curves = precision(evaluation, iou)
        if not curves:
            raise ValueError('the truth has no boxes: there is no recall to draw')
        mean = np.mean(list(curves.values()), axis=0)
        axes.plot(recall, mean, color='black', linewidth=2.5, zorder=3,
                  label=f'mean of classes, AP {mean.mean():.3f}')  # fmt: skip
        # With many classes the legend names only the mean.
        for color, (name, curve) in zip(_colors(len(curves)), curves.items(), strict=True):
            label = f'{name}, AP {curve.mean():.3f}' if len(curves) <= 12 else None
            axes.plot(recall, curve, color=color, alpha=0.6, linewidth=1.2, label=label)
        axes.set(title=f'IoU {iou:.2f}', xlabel='recall', xlim=(0, 1.01), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(loc='upper left', bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)
    figure.axes[0].set_ylabel('precision')
    return figure


@rc_context({'text.parse_math': False})
def draw_detections(
    truth: Truth, predictions: Sequence[dict], count: int = 8, score_thr: float = 0.3
) -> Figure:
    """Draw ground truth beside predictions for the first images of the file that have boxes.

    Args:
        truth: From :func:`sasa_det.evaluation.coco_numbers.load_truth`.
        predictions: From :func:`sasa_det.evaluation.coco_numbers.load_predictions`.
        count: Number of images.
        score_thr: Predictions below this score are left out.

    Raises:
        FileNotFoundError: An image is missing.
        ValueError: No image has a box.
    """
    images = truth.images()[:count]
    if not images:
        raise ValueError(f'{truth.ann_file}: no image in it has a box')
    predicted = {p['img_id']: p['pred_instances'] for p in predictions}
    rows = -(-len(images) // 2)
    columns = 2 * min(2, len(images))
    aspect = np.mean([image['height'] / image['width'] for image in images])
    figure = Figure(figsize=(4.2 * columns, rows * (4.2 * aspect + 0.45)), layout='constrained')
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    category_ids = truth.category_ids
    colors = _colors(len(category_ids))
    # With an odd number of images the last pair of axes stays empty.
    for left, right, image in zip(all_axes[::2], all_axes[1::2], images, strict=False):
        pixels = _read_rgb(truth.path(image))
        annotations = truth.coco.load_anns(truth.coco.get_ann_ids([image['id']]))
        left.imshow(pixels)
        for annotation in annotations:
            if annotation['category_id'] in category_ids:
                label = category_ids.index(annotation['category_id'])
                crowd = annotation.get('iscrowd', 0)
                text = truth.classes[label] + (' (crowd)' if crowd else '')
                _draw_box(left, annotation['bbox'], text, colors[label], dashed=crowd)
        left.set_title(f'{image["file_name"]}: truth', fontsize=9)
        right.imshow(pixels)
        shown = 0
        for box, score, label in _boxes(predicted.get(image['id'])):
            if score >= score_thr:
                shown += 1
                x1, y1, x2, y2 = box
                text = f'{truth.classes[label]} {score:.2f}'
                _draw_box(right, (x1, y1, x2 - x1, y2 - y1), text, colors[label])
        right.set_title(f'prediction: {shown} with score ≥ {score_thr}', fontsize=9)
    for axes in all_axes:
        axes.set_axis_off()
    return figure


def draw_attention(maps: Sequence[AttentionMap]) -> Figure:
    """Draw attention weights: a block per layer, a row per query pixel, a column per head.

    Args:
        maps: From :func:`sasa_det.evaluation.attention_maps.attention_maps`, at least one.
    """
    heads = max(found.weights.shape[1] for found in maps)
    queries = max(len(found.points) for found in maps)
    size = (2.6 + 1.5 * heads + 0.8, len(maps) * (queries * 1.75 + 0.7))
    figure = Figure(figsize=size, layout='constrained')
    blocks = np.atleast_1d(figure.subfigures(len(maps), 1, hspace=0.04))
    for block, found in zip(blocks, maps, strict=True):
        _draw_layer(block, found, heads)
    return figure


def as_pixels(figure: Figure) -> np.ndarray:
    """Draw a figure into an array.

    Args:
        figure: The figure.

    Returns:
        (H, W, 3) RGB, uint8.

    Examples:
        >>> as_pixels(Figure(figsize=(2, 1))).shape
        (110, 220, 3)
    """
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(110)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_layer(block, found: AttentionMap, columns: int) -> None:
    size = found.weights.shape[-1]
    height, width = found.map_size
    block.suptitle(
        f'{found.layer}\nmap of {height} x {width} cells, each {found.stride} x {found.stride} '
        f'pixels; window of {size} x {size} cells',
        fontsize=11,
    )
    grid = block.subplots(
        len(found.points), columns + 1, squeeze=False, width_ratios=[1.6] + [1] * columns
    )
    for index, (overview, *axes_of_heads) in enumerate(grid):
        weights = found.weights[index].numpy()
        top, left, bottom, right = found.window(index)
        # Beneath the heat the window gets its own contrast, in dark tones, so that bright is heat.
        grey = found.image.mean(-1)
        inside = grey[max(top, 0) : bottom, max(left, 0) : right]
        grey_low, grey_high = inside.min(), inside.min() + 2 * max(np.ptp(inside), 20)
        overview.imshow(found.image, extent=_extent(found.image))
        overview.set_facecolor('0.85')
        overview.add_patch(outline(top, left, bottom, right, 'cyan'))
        row, col = found.points[index].tolist()
        overview.plot(col, row, marker='+', color='red', markersize=9, markeredgewidth=2)
        rows, cols = found.image.shape[:2]
        overview.set(xlim=(min(0, left), max(cols, right)), ylim=(max(rows, bottom), min(0, top)))
        for head, axes in enumerate(axes_of_heads):
            if head >= len(weights):
                axes.set_axis_off()
                continue
            axes.imshow(
                grey, extent=_extent(found.image), cmap='gray', vmin=grey_low, vmax=grey_high
            )
            axes.add_patch(outline(0, 0, *found.image.shape[:2], 'white', linestyle='--'))
            heat = axes.imshow(
                spread_weights(weights[head], found.dilation),
                extent=(left, right, bottom, top), cmap='inferno', alpha=0.6, vmin=0,
                vmax=weights.max(), interpolation='nearest',
            )  # fmt: skip
            cell = (found.cells[index] * found.stride).tolist()
            axes.add_patch(outline(*cell, *(edge + found.stride for edge in cell), 'cyan'))
            axes.set(xlim=(left, right), ylim=(bottom, top))
            axes.set_facecolor(UNDERLAY)
            if index == 0:
                axes.set_title(f'head {head + 1}', fontsize=9)
        bar = block.colorbar(heat, ax=grid[index].tolist(), fraction=0.02, pad=0.01)
        bar.ax.set_facecolor(UNDERLAY)
        bar.ax.tick_params(labelsize=7)
        bar.locator.set_params(nbins=4)
    grid[0, 0].set_title('query and its window', fontsize=9)
    for axes in grid.ravel():
        axes.set(xticks=[], yticks=[])


def spread_weights(weights: np.ndarray, dilation: int) -> np.ndarray:
    """Place a window's weights on the map's cells; those that dilation skips stay empty.

    Args:
        weights: (k, k).
        dilation: The layer's.

    Returns:
        (span, span), nan at skipped cells.

    Examples:
        >>> spread_weights(np.ones((3, 3)), 2)[0].tolist()
        [1.0, nan, 1.0, nan, 1.0]
    """
    span = (len(weights) - 1) * dilation + 1
    cells = np.full((span, span), np.nan)
    cells[::dilation, ::dilation] = weights
    return cells


def _boxes(instances: Optional[dict]):
    """Iterate over an image's predictions, if there are any: (box, score, label)."""
    if instances is None:
        return ()
    return zip(*(instances[key].tolist() for key in ('bboxes', 'scores', 'labels')), strict=True)


def _draw_box(axes, box, text: str, color, dashed: bool = False) -> None:
    x, y, width, height = box
    style = '--' if dashed else '-'
    axes.add_patch(Rectangle((x, y), width, height, fill=False, color=color, lw=1.6, ls=style))
    # Above the left corner, but inside of a box at the image's top, and flush right at its right edge.
    height_of_image, width_of_image = axes.images[0].get_array().shape[:2]
    below, flush = y < 0.05 * height_of_image, x > 0.75 * width_of_image
    axes.text(
        min(x + width, width_of_image) if flush else x,
        max(y, 0),
        text,
        fontsize=7,
        color='white',
        verticalalignment='top' if below else 'bottom',
        horizontalalignment='right' if flush else 'left',
        clip_on=True,
        bbox={'facecolor': color, 'edgecolor': 'none', 'pad': 1.0, 'alpha': 0.85},
    )


def outline(top, left, bottom, right, color, linestyle='-') -> Rectangle:
    """Make an empty rectangle, to add to axes.

    Args:
        top, left, bottom, right: Its edges, in units of the axes.
        color: Of the line.
        linestyle: Of the line.

    Examples:
        >>> outline(1, 2, 4, 7, 'cyan').get_bbox().size.tolist()
        [5.0, 3.0]
    """
    size = right - left, bottom - top
    return Rectangle((left, top), *size, fill=False, color=color, lw=1.2, ls=linestyle)


def _extent(image: np.ndarray) -> tuple:
    """Let pixel i of an image cover i to i + 1, as in the coordinates of boxes and windows."""
    height, width = image.shape[:2]
    return 0, width, height, 0


def _colors(count: int) -> list:
    """Give classes distinct colours, as far as the palette allows."""
    if count <= 10:
        return [colormaps['tab10'](i) for i in range(count)]
    return [colormaps['hsv'](i / count) for i in range(count)]


def _read_rgb(path: str) -> np.ndarray:
    try:
        return mmcv.imread(path, channel_order='rgb')
    except cv2.error as error:
        raise ValueError(f'{path}: not an image that can be read') from error
