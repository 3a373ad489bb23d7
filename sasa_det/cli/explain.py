"""``sasa-det explain``: draw where a detector attends in an image."""

import argparse
from pathlib import Path

EXAMPLES = """\
examples:
  sasa-det explain photo.jpg --checkpoint work_dirs/quickstart/epoch_8.pth
  sasa-det explain photo.jpg --checkpoint runs/1/epoch_12.pth --point 120 80 --point 40 200 \\
      --layer backbone.layer4.0.conv2 --layer neck.fpn_convs.0.conv --out layers.png
"""


def add_to(commands) -> None:
    """Add the sub-command.

    Args:
        commands: The result of ``ArgumentParser.add_subparsers``.
    """
    from .inputs import add_detector_arguments

    parser = commands.add_parser(
        'explain',
        help='draw where attention looks from given pixels of an image',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('image', help='image file')
    add_detector_arguments(parser)
    parser.add_argument('--out', help='picture to write (default: IMAGE_attention.png, here)')
    parser.add_argument(
        '--point',
        nargs=2,
        type=float,
        action='append',
        metavar=('ROW', 'COL'),
        help='a pixel of the image to look from; may be repeated (default: the centre)',
    )
    parser.add_argument(
        '--layer',
        action='append',
        help='an attention layer, by name; may be repeated (default: one of each part)',
    )
    parser.add_argument(
        '--level',
        type=int,
        default=0,
        help="pyramid level for a head's layers (default: 0, finest)",
    )
    parser.set_defaults(run=run, passes_on=False)


def run(options: argparse.Namespace) -> None:
    """Draw the picture and say where it is.

    Args:
        options: The parsed command line.

    Raises:
        FileNotFoundError, ValueError: A file, layer or point is missing or invalid; names it.
    """
    from .images import read_image
    from .inputs import find_detector, load
    from .progress import step

    find_detector(options)
    image = read_image(Path(options.image))
    out = Path(options.out or f'{Path(options.image).stem}_attention.png')
    model = load(options)
    from ..evaluation.attention_maps import attention_maps
    from ..visualization.plots import draw_attention

    with step(f'Drawing {out}'):
        maps = attention_maps(
            model, image, layers=options.layer, points=options.point, level=options.level
        )
        if not maps:
            raise ValueError(f'{options.checkpoint}: no layer of its model attends')
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_attention(maps).savefig(out, dpi=110)
    for found in maps:
        print(f'{found.layer}: {found.map_size[0]} x {found.map_size[1]} cells')
    print(out)
