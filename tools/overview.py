#!/usr/bin/env python3
"""Draw README's picture: what a detector finds in an image, and where four heads attend from one pixel.

    python tools/overview.py data/digits/val/000020.jpg --point 100 96 \
        --checkpoint work_dirs/quickstart/epoch_8.pth
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from sasa_det.checkpoints.detector import load_detector
from sasa_det.configs import find_config, read_config
from sasa_det.visualization.explorer.pictures import draw_detections, draw_heat
from sasa_det.visualization.explorer.session import Explorer


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('image')
    parser.add_argument('--checkpoint', required=True)
    parser.add_argument('--config', default='retinanet_sasa-tiny_digits')
    parser.add_argument('--layer', default='neck.fpn_convs.0.conv')
    parser.add_argument('--point', nargs=2, type=float, metavar=('ROW', 'COL'))
    parser.add_argument('--height', type=int, default=280, help='pixels; default: %(default)s')
    parser.add_argument('--out', type=Path, default=Path('docs/images/overview.png'))
    options = parser.parse_args()
    model = load_detector(read_config(find_config(options.config)), options.checkpoint)
    explorer = Explorer(model)
    image = cv2.imread(options.image)
    detections = explorer.detect(image)
    if options.point is None:  # the middle of the surest box's lower edge
        left, top, right, bottom = detections[0].box
        options.point = (bottom - 4, (left + right) / 2)
    found = explorer.look(image, options.layer, None, tuple(options.point))
    panels = [
        draw_detections(image, detections, found.points[0].tolist(), found.window(0)),
        draw_heat(found),
    ]
    sized = []
    for panel in panels:
        width = round(panel.shape[1] * options.height / panel.shape[0])
        sized.append(cv2.resize(panel, (width, options.height), interpolation=cv2.INTER_AREA))
        sized.append(np.full((options.height, 12, 3), 255, np.uint8))
    picture = Image.fromarray(np.concatenate(sized[:-1], 1))
    picture.quantize(256).save(options.out, optimize=True)
    print(options.out)


if __name__ == '__main__':
    main()
