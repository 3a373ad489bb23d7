"""Handwritten digits on photographs: a COCO-format data set, made of scikit-learn's own images.

`sasa-det demo-data data/digits` makes `annotations/instances_{train,val}.json`,
`train/*.jpg` and `val/*.jpg`. The digits are those of `sklearn.datasets.load_digits` (UCI, 8 x 8
pixels), the backgrounds crops of the two photographs of `sklearn.datasets.load_sample_images`.
Training and validation share no digit and no part of a photograph.
"""

import fcntl
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Optional

import cv2
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits, load_sample_images

CLASSES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
SPLITS = ('train', 'val')

_MARKER = '.made-by-sasa_det.data.digits'
_MANIFEST = 'manifest.json'
_FORMAT = 6  # raise it with every change of the output's bytes: older sets are then made anew
_TRAIN_SHARE = 0.7  # of the digits of each class
# Columns of each photograph for validation only: half of the pagoda, an edge of the flower.
_VAL_COLUMNS = {'china.jpg': (0, 200), 'flower.jpg': (360, 640)}
_CROP_SIDE = (112, 192)  # pixels of the photograph
_DIGIT_SIZE = (20, 0.6)  # square root of the box's area: from 20 pixels to 0.6 of the image
_CONTRAST = 80  # least difference in luma, 0 to 255, of ink from its darker background
_EMPTY_SHARE, _CROWD_SHARE = 0.03, 0.04
_JPEG = (cv2.IMWRITE_JPEG_QUALITY, 92, cv2.IMWRITE_JPEG_OPTIMIZE, 0)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of R, G, B


def make_digits(
    root,
    *,
    num_train: int = 1000,
    num_val: int = 200,
    image_size: int = 192,
    seed: int = 0,
    quiet: bool = False,
) -> Path:
    """Make the digits data set in `root`, unless the same set is already there.

    The set is made in `<root>.partial` and renamed at the end. So a set at `root` is whole, unless
    damaged later, which its manifest shows. The same arguments and package versions give the same
    bytes.

    Args:
        root: Folder of the data set: new, empty, or with a set made by this function.
        num_train: Number of training images, at least 10.
        num_val: Number of validation images, at least 10.
        image_size: Width and height of the images in pixels, at least 64.
        seed: Seed of all random choices.
        quiet: Print nothing and show no progress bar.

    Returns:
        The folder, absolute.

    Raises:
        ValueError: A number is out of range.
        FileExistsError: `root` holds something else, which is never deleted.
        RuntimeError: Another process is making this data set.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = make_digits(folder + '/digits', num_train=12, num_val=10, quiet=True)
        ...     sorted(path.name for path in root.iterdir() if path.is_dir())
        ...     len(list((root / 'train').glob('*.jpg')))
        ['annotations', 'train', 'val']
        12
    """
    parameters = dict(num_train=num_train, num_val=num_val, image_size=image_size, seed=seed)
    for name, least in dict(num_train=10, num_val=10, image_size=64, seed=0).items():
        value = parameters[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}')
    root = Path(root).expanduser().resolve()
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)

    _refuse_foreign(root)
    if root.exists():
        fault = find_fault(root, parameters)
        if fault is None:
            console.print(f'The digits are already in {escape(str(root))}, whole and as asked for.')
            return root
        if any(root.iterdir()):
            console.print(f'The digits in {escape(str(root))} are made anew: {escape(fault)}.')

    partial = root.with_name(root.name + '.partial')
    lock = _open_partial(partial, console)
    try:
        _write_set(partial, parameters, console)
        _remove(root)
        partial.rename(root)
    except BaseException:  # Ctrl-C too
        _remove(partial)
        raise
    finally:
        lock.close()
    console.print(
        f'The digits are in {escape(str(root))}: {num_train} training and {num_val} '
        f'validation images of {image_size} x {image_size} pixels, seed {seed}.'
    )
    return root


def find_fault(root, parameters: Optional[dict] = None) -> Optional[str]:
    """Find the first fault that keeps a folder from being a whole digits data set.

    Args:
        root: Folder of the data set.
        parameters: Also compare with these arguments of `make_digits`.

    Returns:
        The fault; None if every file matches the manifest.

    Examples:
        >>> find_fault('/nowhere')
        'manifest.json is missing or broken, so it was not finished'
    """
    root = Path(root)
    try:
        manifest = json.loads((root / _MANIFEST).read_text())
        made, found = manifest['made'], dict(manifest['parameters'])
    except (OSError, ValueError, KeyError, TypeError):
        return f'{_MANIFEST} is missing or broken, so it was not finished'
    if manifest.get('format') != _FORMAT:
        return 'another version of this package made it'
    if parameters is not None and found != parameters:
        differing = [
            f'{key} {found.get(key)} instead of {value}'
            for key, value in parameters.items()
            if found.get(key) != value
        ]
        return 'it has ' + ', '.join(differing)
    try:
        if made != _describe(root):
            return 'files were lost or changed after it was made'
    except OSError as error:
        return f'files were lost after it was made ({error})'
    return None


def _describe(root):
    """Number of images and checksums of each split on disk."""
    described = {}
    for split in SPLITS:
        images, checksum = sorted((root / split).iterdir()), hashlib.sha256()
        for path in images:
            checksum.update(path.name.encode() + b'\0' + path.read_bytes())
        annotations = (root / 'annotations' / f'instances_{split}.json').read_bytes()
        described[split] = dict(
            images=len(images),
            images_sha256=checksum.hexdigest(),
            annotations_sha256=hashlib.sha256(annotations).hexdigest(),
        )
    return described


def _refuse_foreign(folder):
    """Raise unless `folder` may be created or replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f'{folder} is a file; give a folder for the digits data set')
    names = {path.name for path in folder.iterdir()}
    others = names - {_MARKER, _MANIFEST, 'annotations', *SPLITS}
    if names and (_MARKER not in names or others):
        what = sorted(others or names)[0]
        raise FileExistsError(
            f'{folder} holds something that is not a digits data set made here '
            f'({what}), and is not deleted; give another folder or empty it'
        )


def _remove(folder):
    """Delete one of our folders, the marker last, so that an interrupted removal can be resumed."""
    if not folder.exists():
        return
    _refuse_foreign(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == _MARKER):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.rmdir()


def _open_partial(partial, console):
    """Make an empty, marked folder and return its marker, locked while this process uses it."""
    if partial.exists():
        _refuse_foreign(partial)
        if any(partial.iterdir()):
            _lock(partial / _MARKER).close()
            console.print(f'{escape(str(partial))} was left by an interrupted run and is removed.')
        _remove(partial)
    partial.mkdir(parents=True)
    (partial / _MARKER).touch()
    return _lock(partial / _MARKER)


def _lock(marker):
    """Open and lock a marker; the system unlocks it when the process ends in any way."""
    file = marker.open('r+')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise RuntimeError(
            f'another process is making a data set in {marker.parent}; wait for it to end'
        ) from None
    return file


def _write_set(folder, parameters, console):
    """Write both splits and, last of all, the manifest."""
    digits, photographs = load_digits(), load_sample_images()
    names = [Path(name).name for name in photographs.filenames]
    pools = _split_digits(digits.target, parameters['seed'])
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    (folder / 'annotations').mkdir()
    with Progress(*columns, console=console, disable=console.quiet, transient=True) as progress:
        for number, split in enumerate(SPLITS):
            (folder / split).mkdir()
            count, size = parameters[f'num_{split}'], parameters['image_size']
            kinds = _choose_kinds(np.random.default_rng((parameters['seed'], number)), count)
            images, annotations = [], []
            for index in progress.track(range(count), description=f'Drawing {split} images'):
                # One generator per image: an image does not depend on those before it.
                rng = np.random.default_rng((parameters['seed'], number, index))
                which = int(rng.integers(len(names)))
                canvas, crop, flip = _take_background(
                    rng, names[which], photographs.images[which], split, size
                )
                objects = _draw_objects(rng, canvas, digits, pools[split], kinds[index])
                file_name = f'{index + 1:06d}.jpg'
                _, data = cv2.imencode('.jpg', np.round(canvas[..., ::-1]).astype(np.uint8), _JPEG)
                (folder / split / file_name).write_bytes(data.tobytes())
                images.append(
                    dict(
                        id=index + 1,
                        file_name=file_name,
                        width=size,
                        height=size,
                        license=1,
                        photograph=names[which],
                        crop=crop,
                        flip=flip,
                    )
                )
                annotations += [
                    dict(id=len(annotations) + 1 + place, image_id=index + 1, **entry)
                    for place, entry in enumerate(objects)
                ]
            content = dict(
                info=dict(
                    description='Handwritten digits on photographs',
                    digits='sklearn.datasets.load_digits (UCI, E. Alpaydin); digit_ids index them',
                    photographs='sklearn.datasets.load_sample_images: china.jpg by danielbuechele, '
                    'flower.jpg by vultilion, both flickr.com; crop is [x, y, width, '
                    'height] in the photograph, before the flip',
                ),
                licenses=[
                    dict(id=1, name='CC BY 2.0', url='https://creativecommons.org/licenses/by/2.0/')
                ],
                images=images,
                annotations=annotations,
                categories=[
                    dict(id=label + 1, name=name, supercategory='digit')
                    for label, name in enumerate(CLASSES)
                ],
            )
            (folder / 'annotations' / f'instances_{split}.json').write_text(
                json.dumps(content, separators=(',', ':')) + '\n'
            )
    manifest = dict(format=_FORMAT, parameters=parameters, made=_describe(folder))
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + '\n')


def _split_digits(targets, seed):
    """Indices of the digits, none in both splits: {split: [those of class 0, of class 1, ...]}."""
    rng = np.random.default_rng(seed)
    pools = {split: [] for split in SPLITS}
    for label in range(len(CLASSES)):
        indices = rng.permutation(np.flatnonzero(targets == label))
        border = round(_TRAIN_SHARE * len(indices))
        pools['train'].append(indices[:border])
        pools['val'].append(indices[border:])
    return pools


def _choose_kinds(rng, count):
    """The kind of each image of a split: 'plain', 'empty' or 'crowd'; every split has some of each."""
    kinds = np.full(count, 'plain')
    empty, crowd = (int(np.ceil(share * count)) for share in (_EMPTY_SHARE, _CROWD_SHARE))
    order = rng.permutation(count)
    kinds[order[:empty]] = 'empty'
    kinds[order[empty : empty + crowd]] = 'crowd'
    return kinds


def _take_background(rng, name, photograph, split, size):
    """Crop a split's part of a photograph: float32 RGB canvas (size, size, 3), crop, flip."""
    height, width = photograph.shape[:2]
    left, right = _VAL_COLUMNS[name]
    if split == 'train':
        left, right = (right, width) if left == 0 else (0, left)
    side = int(rng.integers(_CROP_SIDE[0], _CROP_SIDE[1] + 1))
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(0, height - side + 1))
    flip = bool(rng.random() < 0.5)
    crop = photograph[y : y + side, x : x + side]
    crop = np.ascontiguousarray(crop[:, ::-1] if flip else crop)
    canvas = cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    return canvas * np.float32(rng.uniform(0.35, 0.7)), [x, y, side, side], flip


def _draw_objects(rng, canvas, digits, pool, kind):
    """Draw the objects of one image onto its canvas and return their annotations, without ids."""
    if kind == 'empty':
        return []
    objects, boxes = [], []
    if kind == 'crowd':
        objects.append(_draw_crowd(rng, canvas, digits, pool))
        boxes.append(objects[0]['bbox'])
    count = int(rng.integers(*((16, 31) if kind == 'plain' else (1, 4))))
    low, high = np.log(_DIGIT_SIZE[0]), np.log(_DIGIT_SIZE[1] * canvas.shape[0])
    # The largest come first: they are the hardest to place. More are small than large, so that many fit.
    sizes = np.exp(low + (high - low) * rng.random(count) ** 2)
    for digit_size in sorted(sizes, reverse=True):
        label = int(rng.integers(len(CLASSES)))
        index = int(rng.choice(pool[label]))
        alpha = _make_ink(rng, digits.images[index], digit_size, 0.9 * canvas.shape[0])
        place = _find_place(rng, canvas, alpha.shape, boxes)
        if place is None:
            continue
        x, y, colour = place
        _blend(canvas, alpha * np.float32(rng.uniform(0.8, 1.0)), x, y, colour)
        height, width = alpha.shape
        boxes.append([x, y, width, height])
        objects.append(
            dict(
                category_id=label + 1,
                bbox=boxes[-1],
                area=width * height,
                iscrowd=0,
                digit_ids=[index],
            )
        )
    return objects


def _draw_crowd(rng, canvas, digits, pool):
    """Draw a group of tiny digits of one class, annotated as a COCO crowd: one box and one mask."""
    size = canvas.shape[0]
    spread = int(rng.integers(size // 4, size // 3))
    x, y, colour = _find_place(rng, canvas, (spread, spread), [], tries=200, force=True)
    label = int(rng.integers(len(CLASSES)))
    indices = rng.choice(pool[label], int(rng.integers(15, 31)), replace=False)
    mask = np.zeros((size, size), bool)
    for index in indices:
        alpha = _make_ink(rng, digits.images[index], rng.uniform(9, 13), spread)
        height, width = alpha.shape
        left = x + int(rng.integers(0, spread - width + 1))
        top = y + int(rng.integers(0, spread - height + 1))
        _blend(canvas, alpha, left, top, colour)
        mask[top : top + height, left : left + width] |= alpha > 0.5
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return dict(
        category_id=label + 1,
        bbox=[int(value) for value in box],
        area=int(mask.sum()),
        iscrowd=1,
        segmentation=dict(size=[size, size], counts=_run_lengths(mask)),
        digit_ids=[int(index) for index in indices],
    )


def _run_lengths(mask):
    """Encode a mask in COCO's uncompressed RLE: column by column, beginning with the zeros."""
    flat = np.concatenate([[False], mask.ravel(order='F')])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


def _make_ink(rng, pixels, digit_size, longest):
    """Scale an 8 x 8 digit smoothly: opacity (height, width) in 0 to 1, trimmed to the ink."""
    rows, columns = np.flatnonzero(pixels.max(1) >= 4), np.flatnonzero(pixels.max(0) >= 4)
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32) / 16
    height, width = pixels.shape
    stretch = rng.uniform(0.9, 1.1)
    scale = digit_size / np.sqrt(height * width)
    scale = min(scale, longest / (max(height, width) * 1.1))
    pixels = np.pad(pixels, 1)  # room for the soft edge
    shape = (round(pixels.shape[1] * scale * stretch), round(pixels.shape[0] * scale / stretch))
    ink = cv2.resize(pixels, shape, interpolation=cv2.INTER_CUBIC)
    alpha = np.clip((ink - 0.3) / 0.4, 0, 1)
    rows, columns = np.flatnonzero(alpha.max(1) > 0.1), np.flatnonzero(alpha.max(0) > 0.1)
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _find_place(rng, canvas, shape, boxes, tries=50, force=False):
    """Find a place clear of `boxes` and an ink colour with contrast there: (x, y, colour) or None.

    With `force` the last place tried is returned, in white.
    """
    height, width = shape
    x = rng.integers(0, canvas.shape[1] - width + 1, tries)
    y = rng.integers(0, canvas.shape[0] - height + 1, tries)
    for place in np.flatnonzero(_overlaps(x, y, width, height, boxes).max(1, initial=0) <= 0.05):
        under = canvas[y[place] : y[place] + height, x[place] : x[place] + width]
        lightest = np.percentile(under @ _LUMA, 90)
        colours = rng.uniform(0, 255, (64, 3)).astype(np.float32)
        fitting = colours[colours @ _LUMA >= lightest + _CONTRAST]
        if len(fitting):
            return int(x[place]), int(y[place]), fitting[0]
    if force:
        return int(x[-1]), int(y[-1]), np.full(3, 255, np.float32)
    return None


def _overlaps(x, y, width, height, boxes):
    """Intersections of boxes at places (T,) with `boxes` (N, 4), as fractions of the smaller area: (T, N)."""
    left, top, widths, heights = np.reshape(boxes, (-1, 4)).T
    across = np.minimum(x[:, None] + width, left + widths) - np.maximum(x[:, None], left)
    down = np.minimum(y[:, None] + height, top + heights) - np.maximum(y[:, None], top)
    smaller = np.minimum(width * height, widths * heights)
    return across.clip(0) * down.clip(0) / smaller


def _blend(canvas, alpha, x, y, colour):
    """Blend ink of one colour over the canvas."""
    height, width = alpha.shape
    under = canvas[y : y + height, x : x + width]
    under += alpha[..., None] * (colour - under)


def main(argv: Optional[list] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments instead of the command line's.

    Returns:
        The exit status.
    """
    # Here, so that the module stands alone: a test runs it without the package.
    from ..cli.parsers import demo_data

    try:
        make_digits(**vars(demo_data().parse_args(argv)))
    except (OSError, ValueError, RuntimeError) as error:
        print(f'sasa-det demo-data: {error}', file=sys.stderr)
        return 1
    return 0
