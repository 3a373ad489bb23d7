"""The arguments of sub-commands whose modules are slow to import."""

import argparse

from ..configs import COCO_FORMAT


def demo_data() -> argparse.ArgumentParser:
    """Build the parser of ``sasa-det demo-data``.

    Examples:
        >>> demo_data().parse_args([]).root
        'data/digits'
    """
    parser = argparse.ArgumentParser(
        prog='sasa-det demo-data',
        description='Make a COCO-format data set of handwritten digits on photographs.',
    )
    parser.add_argument(
        'root',
        nargs='?',
        default='data/digits',
        help='folder of the data set; default: %(default)s',
    )
    parser.add_argument('--num-train', type=int, default=1000, help='default: %(default)s')
    parser.add_argument('--num-val', type=int, default=200, help='default: %(default)s')
    parser.add_argument('--image-size', type=int, default=192, help='pixels; default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    return parser


def coco_config() -> argparse.ArgumentParser:
    """Build the parser of ``sasa-det coco-config``.

    Examples:
        >>> coco_config().parse_args(['my_data', '--out', 'my_config.py']).train_img
        'train/'
    """
    parser = argparse.ArgumentParser(
        prog='sasa-det coco-config',
        description='Check COCO-format data and write a config that trains on it.',
    )
    parser.add_argument('data_root', help='folder with annotations/, train/ and val/')
    parser.add_argument('--out', required=True, help='the config to write')
    parser.add_argument(
        '--base', default=COCO_FORMAT, help='the config to inherit from (%(default)s)'
    )
    parser.add_argument('--max-epochs', type=int, help="instead of the base's")
    parser.add_argument(
        '--image-scale',
        type=int,
        nargs='+',
        help="pixels to fit images in, width and height or one for both, instead of the base's",
    )
    parser.add_argument('--train-ann', default='annotations/instances_train.json')
    parser.add_argument('--val-ann', default='annotations/instances_val.json')
    parser.add_argument('--train-img', default='train/')
    parser.add_argument('--val-img', default='val/')
    return parser


def box_crops() -> argparse.ArgumentParser:
    """Build the parser of ``sasa-det box-crops``.

    Examples:
        >>> box_crops().parse_args(['data/digits', 'data/digit-crops']).size
        48
    """
    parser = argparse.ArgumentParser(
        prog='sasa-det box-crops',
        description='Make a classification data set of the boxes in COCO-format data.',
    )
    parser.add_argument('data_root', help='the COCO-format data, e.g. data/digits')
    parser.add_argument('out', help='folder of the new set, e.g. data/digit-crops')
    parser.add_argument('--size', type=int, default=48, help='pixels; default: %(default)s')
    parser.add_argument('--context', type=float, default=1.25, help='default: %(default)s')
    return parser


def report() -> argparse.ArgumentParser:
    """Build the parser of ``sasa-det report``.

    Examples:
        >>> report().parse_args(['a.py', 'a.pth', '--predictions', 'a.pkl', '--work-dir', 'a']).device
        'cpu'
    """
    parser = argparse.ArgumentParser(
        prog='sasa-det report',
        description='Write numbers, pictures and index.html on a trained detector.',
    )
    parser.add_argument('config', help='config file or name')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--predictions',
        required=True,
        help="what mmdet's tools/test.py --out wrote; loading a pickle can run code, so give only "
        'files that you trust',
    )
    parser.add_argument('--work-dir', required=True, help='folder of the training; gets the report')
    parser.add_argument('--device', default='cpu', help='where to run the model (default: cpu)')
    parser.add_argument('--commands', help='the commands that led here, to show on the page')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='override settings: key=value')
    return parser


def compare() -> argparse.ArgumentParser:
    """Build the parser of ``sasa-det compare``.

    Examples:
        >>> compare().parse_args(['a.py', 'b.py', '--work-dir', 'ab']).seeds
        3
        >>> compare().parse_args(['a.py', '--work-dir', 'a', '--sweep', 'optim_wrapper.optimizer.lr=1,2']).sweep
        ['optim_wrapper.optimizer.lr=1,2']
    """
    parser = argparse.ArgumentParser(
        prog='sasa-det compare',
        description='Train configs with several seeds; write compare.md, .json and .png, and training.png.',
    )
    parser.add_argument('configs', nargs='+', metavar='CONFIG')
    parser.add_argument('--work-dir', required=True)
    parser.add_argument(
        '--seeds', type=int, default=3, help='number of seeds; default: %(default)s'
    )
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    parser.add_argument(
        '--sweep',
        nargs='+',
        default=[],
        metavar='KEY=V1,V2',
        help='train each config with each combination of these values and the first seed, and with the '
        "other seeds at its best by AP; values as --cfg-options takes them, and a '*' in a key stands for "
        'each key at its place; a batch size leaves the learning rate as it is, so sweep both',
    )
    return parser
