"""How detections and a pixel's attention weights are drawn, as arrays of pixels."""

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from ...evaluation.attention_maps import AttentionMap
from ..plots import UNDERLAY, as_pixels, outline, spread_weights

EDGE = 640  # pixels that a small image is enlarged to, so that a pixel can be clicked
COLUMNS = 4  # of heat maps in a row


def zoom(image: np.ndarray) -> int:
    """Compute the factor by which the picture of an image is enlarged.

    Examples:
        >>> zoom(np.zeros((192, 160, 3)))
        3
    """
    return max(1, EDGE // max(image.shape[:2]))


def draw_detections(image, detections, point, window=None) -> np.ndarray:
    """Draw an image with its detections, enlarged by :func:`zoom`.

    Args:
        image: (H, W, 3) BGR, uint8.
        detections: From :meth:`~sasa_det.visualization.explorer.session.Explorer.detect`.
        point: Row and column of the query pixel, marked by a cross.
        window: Top, left, bottom and right edge of its window, in pixels of the image.

    Returns:
        (H * zoom, W * zoom, 3) RGB, uint8.
    """
    factor = zoom(image)
    size = image.shape[1] * factor, image.shape[0] * factor
    pixels = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)[..., ::-1]
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(14, max(size) // 45))
    names = sorted({detection.name for detection in detections})
    for detection in detections:
        color = _color(names.index(detection.name))
        left, top, right, bottom = (edge * factor for edge in detection.box)
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=color, width=3)
        text = f'{detection.name} {detection.score:.2f}'
        _, _, width, height = draw.textbbox((0, 0), text, font=font)
        # Above the box's corner if there is room, and never beyond the picture.
        x = min(max(left, 0), size[0] - width - 6)
        y = top - height - 4 if top > height + 4 else max(top, 0)
        draw.rectangle((x, y, x + width + 6, y + height + 4), fill=color)
        draw.text((x + 3, y + 1), text, fill='white', font=font)
    if window is not None:
        top, left, bottom, right = (edge * factor for edge in window)
        draw.rectangle((left, top, right, bottom), outline='cyan', width=2)
    row, col = ((place + 0.5) * factor for place in point)
    for color, width in (('black', 5), ('red', 3)):
        draw.line((col - 12, row, col + 12, row), fill=color, width=width)
        draw.line((col, row - 12, col, row + 12), fill=color, width=width)
    return np.asarray(picture)


def draw_heat(found: AttentionMap) -> np.ndarray:
    """Draw each head's weights over the window as a heat map on the image.

    Args:
        found: The attention of one query pixel.

    Returns:
        (H, W, 3) RGB, uint8.
    """
    weights = found.weights[0].numpy()
    height, width = found.image.shape[:2]
    columns = min(COLUMNS, len(weights))
    rows = -(-len(weights) // columns)
    # Axes are placed by hand, since matplotlib's own layouts take as long as all the rest.
    edge, title = 3.0, 0.25
    size = edge * columns, rows * (edge * height / width + title)
    places = dict(left=0, right=1, bottom=0, top=1 - title / size[1])
    figure = Figure(figsize=size)
    all_axes = figure.subplots(
        rows, columns, squeeze=False, gridspec_kw=dict(places, wspace=0.03, hspace=title / edge)
    ).ravel()
    top, left, bottom, right = found.window(0)
    row, col = found.points[0].tolist()
    for axes in all_axes:
        axes.set_axis_off()
    for head, (axes, weight) in enumerate(zip(all_axes, weights), 1):
        # A dark grey image, so that bright is heat; without heat the image shows through.
        grey = found.image.mean(-1)
        axes.imshow(grey, extent=(0, width, height, 0), cmap='gray', vmin=0, vmax=380)
        heat = spread_weights(weight, found.dilation)
        axes.imshow(
            heat,
            extent=(left, right, bottom, top),
            cmap='inferno',
            alpha=0.25 + 0.5 * np.nan_to_num(heat) / weights.max(),
            vmin=0,
            vmax=weights.max(),
            interpolation='nearest',
        )
        axes.add_patch(outline(top, left, bottom, right, 'cyan'))
        axes.plot(col, row, marker='+', color='red', markersize=9, markeredgewidth=2)
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_title(f'head {head}', fontsize=10)
    return as_pixels(figure)


def draw_grids(found: AttentionMap) -> np.ndarray:
    """Draw each head's k x k weights and the two terms of their logits.

    The softmax ignores a constant added to the whole window, so the terms are drawn relative to their means.

    Args:
        found: The attention of one query pixel.

    Returns:
        (H, W, 3) RGB, uint8.
    """
    heads = found.weights.shape[1]
    size = width, height = 1.4 * heads + 1.6, 4.9
    places = dict(
        left=0.55 / width, right=1 - 0.75 / width, bottom=0.1 / height, top=1 - 0.3 / height
    )
    figure = Figure(figsize=size)
    *rows_of_logits, row_of_weights = grid = figure.subplots(
        3, heads, squeeze=False, gridspec_kw=dict(places, wspace=0.06, hspace=0.06)
    )

    terms = (found.content, found.position)
    logits = [None if term is None else _centred(term[0].numpy()) for term in terms]
    reach = max(float(np.nanmax(np.abs(term))) for term in logits if term is not None) or 1.0
    for term, row in zip(logits, rows_of_logits):
        for head, axes in enumerate(row):
            if term is None:
                axes.text(0.5, 0.5, 'none', ha='center', va='center', transform=axes.transAxes)
            else:
                shown = axes.imshow(term[head], cmap='RdBu_r', vmin=-reach, vmax=reach)
    _add_bar(figure, shown, rows_of_logits)

    weights = found.weights[0].numpy()
    for weight, axes in zip(weights, row_of_weights):
        shown = axes.imshow(weight, cmap='inferno', vmin=0, vmax=weights.max())
    _add_bar(figure, shown, [row_of_weights])

    middle = weights.shape[-1] // 2 - 0.5
    for axes in grid.ravel():
        axes.set(xticks=[], yticks=[], facecolor=UNDERLAY if axes.images else 'white')
        if axes.images:
            axes.add_patch(outline(middle, middle, middle + 1, middle + 1, 'lime'))
    for head, axes in enumerate(grid[0], 1):
        axes.set_title(f'head {head}', fontsize=10)
    for row, title in zip(grid, ('content\nq · k', 'position\nq · r', 'weights')):
        row[0].set_ylabel(title, fontsize=10)
    return as_pixels(figure)


def _centred(logits) -> np.ndarray:
    """Subtract each window's mean; masked positions, -inf, become nan."""
    logits = np.where(np.isfinite(logits), logits, np.nan)
    return logits - np.nanmean(logits, axis=(-2, -1), keepdims=True)


def _add_bar(figure: Figure, shown, rows) -> None:
    first, last = rows[0][-1].get_position(), rows[-1][-1].get_position()
    width = 0.1 / figure.get_figwidth()
    place = (first.x1 + width, last.y0, width, first.y1 - last.y0)
    bar = figure.colorbar(shown, cax=figure.add_axes(place))
    bar.ax.tick_params(labelsize=7)
    bar.locator.set_params(nbins=5)


def _color(index: int) -> tuple:
    return tuple(int(255 * part) for part in colormaps['tab10'](index % 10)[:3])
