"""How good is a trained detector? One page of metrics, curves, detections and attention.

``sasa-det report CONFIG CHECKPOINT --predictions PRED.pkl --work-dir DIR``
"""

import datetime
import json
import shlex
import sys
from base64 import b64encode
from pathlib import Path
from typing import List, Optional, Sequence, Tuple, Union
from urllib.parse import quote

import cv2
import numpy as np
from mmengine.config import Config
from torch import nn

from ..checkpoints.detector import load_detector
from ..checkpoints.loading import load_from_local
from ..cli.parsers import report as parser
from ..configs import find_config, parse_cfg_options
from ..evaluation.attention_maps import attention_layers, attention_maps
from ..evaluation.coco_numbers import (
    Truth,
    coco_numbers,
    evaluate,
    load_predictions,
    load_truth,
    per_class_ap,
)
from ..evaluation.training_log import read_training_log
from .plots import draw_attention, draw_curves, draw_detections, draw_precision_recall
from .report_page import render_page

SCORE_THR = 0.3
IMAGES = 8

PICTURES = {
    'curves.png': (
        'Training',
        'Line charts of the training losses and of the accuracy on the validation set.',
        'Left: total loss and its parts, for classes and for boxes; pale as logged, bold as a '
        'moving average. They should fall and level off. Right: AP and AP50 on the validation set '
        'as training went on; higher is better.',
    ),
    'precision_recall.png': (
        'Precision and recall',
        'Precision against recall at IoU 0.50 and 0.75, one faint line per class, their mean bold.',
        'Going right, the detector accepts lower scores and finds more of the objects (recall), '
        'and fewer of its boxes are right (precision). A box is right when it overlaps the true '
        'one by the IoU above the chart. The area under a line is the AP in the legend.',
    ),
    'detections.png': (
        'Detections',
        'Pairs of validation images: on the left the true boxes, on the right the predicted ones.',
        f'The first {IMAGES} images in the annotation file that have boxes, not the best ones. '
        f'Left of each pair the truth, right of it what was predicted with a score of {SCORE_THR} '
        'or more. One colour is one class; dashed boxes are crowds, which do not count.',
    ),
    'attention.png': (
        'Attention',
        'For query pixels in an image, heat maps of the weights that each attention head gives to '
        'the pixels around it, for one layer of each part of the detector.',
        'The first image with boxes. One block per layer: the last attention layer of the part '
        'whose map is no smaller than its window, at the finest level where levels share it. The '
        "query pixels are the centre of the image's largest box, that of its smallest, and the "
        'place farthest from all boxes. Left: the query pixel (+) and the window that the layer '
        'sees from there. Right: the window alone, once per head; brighter cells weigh more, on '
        'one scale for the row, and the weights of a head add up to one. The cell of the query '
        'itself is outlined. A dashed line is the edge of the image; with zero borders the cells '
        "beyond it carry weight too. With init='neighbours' each head starts at one cell beside its own, as a "
        'convolution would. Content moves the weights as training goes on, so after a short training most of '
        'a weight is still on one cell.',
    ),
}


def write_report(
    config: Union[str, Path, Config],
    checkpoint: Union[str, Path],
    predictions: Union[str, Path],
    work_dir: Union[str, Path],
    device: str = 'cpu',
    commands: Optional[str] = None,
) -> Tuple[Path, List[str]]:
    """Write coco.json, the pictures and index.html into a work folder.

    The page leaves out parts that cannot be made, and says why.

    Args:
        config: An mmdet config or its file.
        checkpoint: The weights, as mmengine saves them.
        predictions: The file of mmdet's tools/test.py --out. A pickle can run code when it is
            loaded: only load files that you trust.
        work_dir: The training's work folder, which gets the report.
        device: Where to run the model for the attention picture.
        commands: The commands of the run, for the page; by default the plain ones.

    Returns:
        Path of the page, and a list of errors, each a line that names the file.

    Raises:
        FileNotFoundError: There is no such config.

    Examples:
        >>> write_report('configs/tiny.py', 'epoch_12.pth', 'predictions.pkl', 'work_dirs/tiny')
        ... # doctest: +SKIP
        (PosixPath('work_dirs/tiny/index.html'), [])
    """
    config_file = config.filename if isinstance(config, Config) else str(config)
    config = config if isinstance(config, Config) else Config.fromfile(config)
    report = _Report(Path(work_dir))
    truth = report.attempt('', load_truth, config)
    found = report.attempt('', load_predictions, predictions)
    model = report.attempt('', load_detector, config, checkpoint, device)
    evaluation = truth and found and report.attempt('', evaluate, found, truth)

    if evaluation:
        numbers = {**coco_numbers(evaluation), 'per_class': per_class_ap(evaluation)}
        (report.folder / 'coco.json').write_text(json.dumps(numbers, indent=2) + '\n')
        report.numbers = numbers
    log = report.attempt('curves.png: ', _read_log, report)
    if log:
        report.draw('curves.png', draw_curves, log)
    if evaluation:
        report.draw('precision_recall.png', draw_precision_recall, evaluation)
        report.draw('detections.png', draw_detections, truth, found, IMAGES, SCORE_THR)
    if truth and model:
        maps = report.attempt('attention.png: ', _look, report, model, truth)
        if maps:
            report.draw('attention.png', draw_attention, maps)

    page = report.folder / 'index.html'
    commands = commands or _commands(config_file, checkpoint, predictions, work_dir)
    iterations = report.attempt('', _iterations, checkpoint) if model else None
    page.write_text(_page(report, config_file, checkpoint, truth, model, log, commands, iterations))
    return page, report.errors


class _Report:
    """The parts of a report so far, and those that are missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.numbers = {}
        self.pictures = []
        self.notes = []
        self.errors = []
        # A picture that is not drawn this time must not remain from the last time.
        for name in ('coco.json', 'index.html', *PICTURES):
            (folder / name).unlink(missing_ok=True)

    def attempt(self, what, function, *args):
        """Call a function; record an error in files or data."""
        try:
            return function(*args)
        except (OSError, ValueError) as error:
            self.errors.append(f'{what}{error}')
            return None

    def draw(self, name, function, *args):
        """Draw and save a picture."""
        try:
            figure = function(*args)
            figure.savefig(self.folder / name, dpi=110)
        except Exception as error:  # matplotlib has errors of many kinds; none may cost the page
            (self.folder / name).unlink(missing_ok=True)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.errors.append(f'{name}: {reason}')
            return
        heading, alt, caption = PICTURES[name]
        # Within the page too, which may be sent alone.
        source = b64encode((self.folder / name).read_bytes()).decode()
        self.pictures.append(
            dict(
                file=name,
                source=f'data:image/png;base64,{source}',
                heading=heading,
                alt=alt,
                caption=caption,
            )
        )


def _iterations(checkpoint) -> Optional[int]:
    """The number of iterations that a checkpoint was trained for, where it says so."""
    return load_from_local(str(checkpoint), 'cpu').get('meta', {}).get('iter')


def _read_log(report: _Report):
    if not any(report.folder.glob('*/vis_data/scalars.json')):
        report.notes.append(
            f'{report.folder}: no training log in it (<timestamp>/vis_data/scalars.json), '
            'so the curves are left out'
        )
        return None
    return read_training_log(report.folder)


def _look(report: _Report, model: nn.Module, truth: Truth):
    layers = attention_layers(model)
    attending = {name.split('.')[0] for name in layers}
    for name, part in model.named_children():
        if name not in attending and any(True for _ in part.parameters()):
            report.notes.append(f'{name} is all convolution, so attention.png leaves it out')
    if not layers:
        return None
    image = next(iter(truth.images()), None)
    if image is None:
        raise ValueError(f'{truth.ann_file}: no image in it has a box')
    return attention_maps(model, truth.path(image), points=_query_points(truth, image))


def _query_points(truth: Truth, image: dict) -> List[Tuple[float, float]]:
    """Choose the centres of the largest and the smallest box, and the point farthest from all boxes."""
    annotations = truth.coco.load_anns(truth.coco.get_ann_ids([image['id']], iscrowd=False))
    boxes = sorted((a['bbox'] for a in annotations), key=lambda box: -box[2] * box[3])
    points = [(y + h / 2, x + w / 2) for x, y, w, h in (boxes[:1] + boxes[1:][-1:])]
    free = np.ones((image['height'], image['width']), np.uint8)
    for x, y, w, h in boxes:
        free[int(y) : int(np.ceil(y + h)), int(x) : int(np.ceil(x + w))] = 0
    if free.any():
        # The image's border counts as a box, so that a window around the point is inside of the image.
        distance = cv2.distanceTransform(np.pad(free, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
        points.append(np.unravel_index(distance.argmax(), distance.shape))
    limit = (image['height'] - 1, image['width'] - 1)
    return [tuple(np.clip(point, 0, limit).tolist()) for point in points]


def _commands(config, checkpoint, predictions, work_dir, options=None) -> str:
    config, checkpoint, predictions, work_dir = (
        shlex.quote(str(path)) for path in (config, checkpoint, predictions, work_dir)
    )
    options = [shlex.quote(f'{key}={value}') for key, value in (options or {}).items()]
    tail = ' '.join([' --cfg-options', *options]) if options else ''
    return '\n'.join(
        (
            f'sasa-det train {config} --work-dir {work_dir}{tail}',
            f'sasa-det test {config} {checkpoint} --work-dir {work_dir} --out {predictions}{tail}',
            f'sasa-det report {config} {checkpoint} --predictions {predictions} '
            f'--work-dir {work_dir}{tail}',
        )
    )


def _page(report, config_file, checkpoint, truth, model, log, commands, iterations) -> str:
    facts = [(name, _text(report.numbers[name])) for name in ('AP', 'AP50') if report.numbers]
    if model:
        facts.append(('parameters', f'{sum(p.numel() for p in model.parameters()):,}'))
        attention = len(attention_layers(model))
        facts.append(('attention layers', attention))
    if log:
        duration = datetime.timedelta(seconds=round(log.seconds))
        facts.append(('training time (h:mm:ss), without validation', str(duration)))
        # The log has every tenth or so; the checkpoint knows the last.
        facts.append(('iterations', f'{iterations or log.train[-1]["step"]:,}'))
    name = Path(config_file).stem
    lead = f'Trained with {Path(config_file).name}, weights of {Path(checkpoint).name}'
    if truth:
        boxes = sum(not annotation.get('iscrowd', 0) for annotation in truth.coco.anns.values())
        lead += f', tested on {len(truth.coco.imgs)} images with {boxes} boxes'
    numbers = {key: _text(value) for key, value in report.numbers.items() if key != 'per_class'}
    classes = {key: _text(value) for key, value in report.numbers.get('per_class', {}).items()}
    return render_page(
        title=f'{name}: results',
        lead=lead + '.',
        missing=report.errors + report.notes,
        facts=facts,
        numbers=numbers,
        per_class=classes,
        pictures=report.pictures,
        commands=commands,
        next_steps=_next_steps(config_file, checkpoint),
        links=_links(report.folder, config_file, log),
    )


def _next_steps(config_file, checkpoint) -> List[Tuple[str, str]]:
    """Name what a reader may want to do now, and by which command."""
    config, checkpoint = shlex.quote(str(config_file)), shlex.quote(str(checkpoint))
    compare = f'sasa-det compare {config} convolution.py --work-dir work_dirs/compare'
    if Path(config_file).stem == 'retinanet_sasa-tiny_digits':
        compare = compare.replace('convolution.py', 'retinanet_tiny_digits')
    return [
        ('see where each head looks from a pixel that you click', f'sasa-det explore {checkpoint}'),
        (
            'detect in images of yours',
            f'sasa-det predict IMAGES --checkpoint {checkpoint} --out found',
        ),
        ('compare it with convolution, over three seeds', compare),
        ('train on data of yours', 'sasa-det coco-config DATA --out my_config.py'),
    ]


def _links(folder: Path, config_file: str, log) -> List[Tuple[str, str]]:
    """Name the files beside the page that it is based on."""
    paths = [(folder / Path(config_file).name, 'config as it ran')]
    for file in log.files if log else ():
        run = file.parents[1]
        paths.append((run / f'{run.name}.log', f'log of {run.name}'))
        paths.append((file, f'scalars of {run.name}'))
    paths.append((folder / 'coco.json', 'numbers as JSON'))
    return [
        (name, quote(path.relative_to(folder).as_posix())) for path, name in paths if path.is_file()
    ]


def _text(number: float) -> str:
    return '–' if number < 0 else f'{number:.3f}'


def main(args: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return its exit status, 1 after any error.

    Args:
        args: Arguments, by default those of the process.
    """
    options = parser().parse_args(args)
    try:
        changes = parse_cfg_options(options.cfg_options)
        config = Config.fromfile(find_config(options.config))
        config.merge_from_dict(changes)
    except (OSError, SyntaxError, ValueError, KeyError) as error:
        print(f'error: {options.config}: not a config that can be read ({error})', file=sys.stderr)
        return 1
    page, errors = write_report(
        config,
        options.checkpoint,
        options.predictions,
        options.work_dir,
        options.device,
        options.commands
        or _commands(
            options.config,
            options.checkpoint,
            options.predictions,
            options.work_dir,
            changes,
        ),
    )
    for error in errors:
        print(f'error: {error}', file=sys.stderr)
    numbers = page.with_name('coco.json')
    if numbers.is_file():
        print(f'AP50 {json.loads(numbers.read_text())["AP50"]:.4f}')
    print(page)
    return 1 if errors else 0
