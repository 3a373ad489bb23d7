"""``sasa-det export``: write a trained detector for another runtime."""

import argparse
import sys
from pathlib import Path
from typing import List, Optional

EXAMPLES = """\
examples:
  sasa-det export retinanet_sasa-tiny_digits work_dirs/quickstart/epoch_8.pth --to onnx
  sasa-det export my_config.py epoch_12.pth --to onnx --nms --out found.onnx --check photos/*.jpg
  sasa-det export my_config.py epoch_12.pth --to onnx --op native

The model takes images of any size, as the test pipeline loads and resizes them (BGR, 0 to 255); it
normalises and pads them itself. docs/export.md has its inputs and outputs.
"""
# Number of the config's own images to compare on, if no others are named.
CHECKED = 3


def add_to(commands) -> None:
    """Add the sub-command.

    Args:
        commands: The result of ``ArgumentParser.add_subparsers``.
    """
    parser = commands.add_parser(
        'export',
        help='write a trained detector for another runtime',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='config file or name')
    parser.add_argument('checkpoint', help='weights, as training saves them')
    parser.add_argument('--to', choices=('onnx',), required=True, help='what to write')
    parser.add_argument(
        '--out', help='file to write (default: beside the checkpoint, under its name)'
    )
    parser.add_argument(
        '--nms',
        action='store_true',
        help='have the model suppress overlapping boxes, as test_cfg says',
    )
    parser.add_argument(
        '--op',
        choices=('standard', 'native'),
        default='standard',
        help='how attention is written: in operators that every runtime has, or as one operator that '
        'onnxruntime takes from a library of this package and that is faster (default: %(default)s)',
    )
    parser.add_argument(
        '--opset', type=int, default=18, help="version of ONNX's operators (default: %(default)s)"
    )
    parser.add_argument(
        '--check',
        nargs='+',
        metavar='IMAGE',
        help="images to compare with PyTorch on (default: the first of the config's test data)",
    )
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config'
    )
    parser.set_defaults(run=run, passes_on=False, device='cpu')


def run(options: argparse.Namespace) -> int:
    """Export and compare.

    Args:
        options: The parsed command line.

    Returns:
        The exit status: 1 if the exported model and PyTorch find different boxes.

    Raises:
        FileNotFoundError, ValueError: A file is missing or invalid, or the library of --op native; names it.
    """
    from .inputs import find_detector, load
    from .progress import step

    find_detector(options)
    from ..export import native_op_library
    from ..export.to_onnx import check_opset, check_writable, import_onnx

    check_opset(options.opset)
    import_onnx()
    if options.op == 'native':
        native_op_library()
    out = Path(options.out or Path(options.checkpoint).with_suffix('.onnx'))
    check_writable(out)
    detector = load(options)
    from ..export.check import BOX_LIMIT, SCORE_LIMIT, check_onnx, load_images
    from ..export.to_onnx import export_onnx

    images = load_images(detector.cfg, options.check or _own_images(detector.cfg))
    with step(f'Exporting to {out}, which takes a minute or a few'):
        export_onnx(detector, out, options.nms, options.opset, options.op)
    with step(f'Comparing with PyTorch on {len(images)} images'):
        deviation = check_onnx(out, detector, images, options.nms)
    print(f'{out}: {out.stat().st_size / 2**20:.1f} MiB, opset {options.opset}')
    print(
        f'{deviation.boxes} boxes in {len(images)} images: apart from PyTorch by {deviation.box:.2g} px '
        f'and {deviation.score:.2g} of a score at most'
    )
    if options.op == 'native':
        print(f'it needs the library {native_op_library()}, registered in the session')
    if deviation.small:
        return 0
    print(
        f'sasa-det export: {out} does not find what PyTorch finds: the limits are {BOX_LIMIT} px and '
        f'{SCORE_LIMIT} of a score, and {deviation.unmatched} boxes are without a match',
        file=sys.stderr,
    )
    return 1


def _own_images(config) -> List[Path]:
    """The first images of the config's test set."""
    from ..export.check import test_pipeline
    from .images import IMAGES

    test_pipeline(config)
    folder = _image_folder(config.test_dataloader.dataset)
    images: List[Path] = []
    if folder is not None and folder.is_dir():
        images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)[
            :CHECKED
        ]
    if not images:
        raise ValueError(
            f'{config.filename}: there are no images to compare with PyTorch on in {folder}; name some '
            'by --check'
        )
    return images


def _image_folder(dataset) -> Optional[Path]:
    prefix = (dataset.get('data_prefix') or {}).get('img')
    return None if prefix is None else Path(dataset.get('data_root') or '', prefix)
