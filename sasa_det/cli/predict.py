"""``sasa-det predict``: detect the objects in images, folders of images and videos."""

import argparse
import json
import sys
from pathlib import Path
from typing import Sequence

EXAMPLES = """\
examples:
  sasa-det predict photo.jpg --checkpoint work_dirs/quickstart/epoch_8.pth --out found
  sasa-det predict photos/ clip.mp4 --checkpoint runs/1/epoch_12.pth --out found --score-thr 0.5

In the folder of --out are then pictures/, one for each image and frame, with the boxes drawn;
results.json, all boxes in COCO's results format; and images.json, COCO's images and categories that
the results' ids stand for. Interrupted by Ctrl-C, it holds what was done until then.
"""


def add_to(commands) -> None:
    """Add the sub-command.

    Args:
        commands: The result of ``ArgumentParser.add_subparsers``.
    """
    from .inputs import add_detector_arguments

    parser = commands.add_parser(
        'predict',
        help='detect objects in images, folders of images and videos',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('inputs', nargs='+', help='image files, folders of them, videos')
    add_detector_arguments(parser)
    parser.add_argument('--out', required=True, help='folder to write to')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='the least score of a box that is drawn (default: %(default)s)',
    )
    parser.set_defaults(run=run, passes_on=False)


def run(options: argparse.Namespace) -> int:
    """Detect, image by image.

    Args:
        options: The parsed command line.

    Returns:
        The exit status: 1 if an image could not be read.

    Raises:
        FileNotFoundError, ValueError: A file is missing or invalid; names it.
    """
    from .images import count_images, find_sources, read_images
    from .inputs import load
    from .progress import counted

    sources = find_sources(options.inputs)
    pictures = Path(options.out, 'pictures').resolve()
    if any(pictures in path.resolve().parents for path, _ in sources):
        raise ValueError(
            f'--out: pictures would be written over the inputs in {pictures}; name another'
        )
    model = load(options)
    from mmdet.apis import inference_detector

    results = Results(options.out, model.dataset_meta, options.score_thr)
    failed = 0
    try:
        with counted(read_images(sources), count_images(sources), 'Detecting') as images:
            for image in images:
                if image.error:
                    failed += 1
                    # Not printed by rich, which would read brackets in a file's name as markup.
                    print(f'skipped: {image.error}', file=sys.stderr)
                else:
                    results.add(image, inference_detector(model, image.pixels))
    finally:
        results.write()
        print(
            f'{results.drawn} objects with a score of {options.score_thr} or more in '
            f'{len(results.images)} images'
            + (f', {failed} could not be read' if failed else '')
            + f': {results.folder}'
        )
    return 1 if failed else 0


class Results:
    """The detections so far; pictures are written at once, the rest by :meth:`write`.

    Args:
        folder: The folder to write to.
        dataset_meta: The model's, with the names of the classes.
        score_thr: The lowest score of a box to draw.
    """

    def __init__(self, folder, dataset_meta: dict, score_thr: float) -> None:
        from mmdet.visualization import DetLocalVisualizer

        self.folder = Path(folder)
        (self.folder / 'pictures').mkdir(parents=True, exist_ok=True)
        self.images, self.boxes, self.drawn = [], [], 0
        self._pictures = set()
        self.score_thr = score_thr
        self.classes: Sequence[str] = dataset_meta['classes']
        self._visualizer = DetLocalVisualizer()
        self._visualizer.dataset_meta = dataset_meta

    def add(self, image, found) -> None:
        """Keep the boxes of one image and write its picture.

        Args:
            image: The :class:`~sasa_det.cli.images.Image`.
            found: The result of ``mmdet.apis.inference_detector`` for it.
        """
        from matplotlib import rc_context

        image_id = len(self.images) + 1
        height, width = image.pixels.shape[:2]
        instances = found.pred_instances.cpu()
        # mmdet draws and stores RGB.
        # A name of a class may have a `$` in it, which is no formula.
        with rc_context({'text.parse_math': False}):
            self._visualizer.add_datasample(
                'image',
                image.pixels[..., ::-1],
                found,
                draw_gt=False,
                show=False,
                pred_score_thr=self.score_thr,
                out_file=str(self.folder / 'pictures' / self._picture_name(image.name)),
            )
        self.drawn += int((instances.scores >= self.score_thr).sum())
        self.images.append(
            dict(id=image_id, file_name=image.name.as_posix(), height=height, width=width)
        )
        masks = _encoded(instances.masks) if 'masks' in instances else [None] * len(instances)
        for box, score, label, mask in zip(
            instances.bboxes.tolist(), instances.scores.tolist(), instances.labels.tolist(), masks
        ):
            left, top, right, bottom = box
            entry = dict(
                image_id=image_id,
                category_id=label + 1,
                bbox=[left, top, right - left, bottom - top],
                score=score,
            )
            self.boxes.append(entry if mask is None else dict(entry, segmentation=mask))

    def _picture_name(self, name: Path) -> Path:
        """Choose a picture's name; a.jpg and a.png are two images, and get two pictures."""
        picture = name.with_suffix('.jpg')
        while picture in self._pictures:
            picture = name = name.with_name(f'{name.name}.jpg')
        self._pictures.add(picture)
        return picture

    def write(self) -> None:
        """Write results.json and images.json."""
        categories = [dict(id=label + 1, name=name) for label, name in enumerate(self.classes)]
        content = {
            'results.json': self.boxes,
            'images.json': dict(images=self.images, annotations=[], categories=categories),
        }
        for name, entries in content.items():
            (self.folder / name).write_text(json.dumps(entries) + '\n')


def _encoded(masks) -> list:
    """Encode a mask in COCO's RLE, as text."""
    from mmdet.structures.mask import encode_mask_results

    return [
        dict(size=list(mask['size']), counts=mask['counts'].decode())
        for mask in encode_mask_results(masks.numpy())
    ]
