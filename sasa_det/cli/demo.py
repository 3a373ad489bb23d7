"""``sasa-det demo``: first pictures, by the small trained detector that ships with the package."""

import argparse
import shlex
from pathlib import Path

# An image, and row and column of a pixel on the edge of a digit in it.
EXPLAINED = 'digits_4.jpg', (32, 68)
EXAMPLES = """\
examples:
  sasa-det demo
  sasa-det demo --out /tmp/first_pictures

It takes some seconds, and needs no training and no network. The folder then holds what training
leaves, a checkpoint and its config, so that all commands work on it; images; and pictures/ and
attention.png, which `sasa-det predict` and `sasa-det explain` draw.
"""
NEXT = """\
What to do next:
  sasa-det explore {checkpoint}
      click a pixel of an image, and see where each head looks; needs pip install 'sasa_det[demo]'
  sasa-det predict IMAGES --checkpoint {checkpoint} --out found
      detect in images of yours; it knows handwritten digits only
  sasa-det demo-data && sasa-det train {config}
      train it yourself, in about ten minutes
  sasa-det coco-config DATA --out my_config.py
      train on data of yours"""


def add_to(commands) -> None:
    """Add the sub-command.

    Args:
        commands: The result of ``ArgumentParser.add_subparsers``.
    """
    parser = commands.add_parser(
        'demo',
        help='draw first pictures with the small detector that ships with the package',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--out', default='sasa_det_demo', help='folder to write to (default: %(default)s, here)'
    )
    parser.set_defaults(run=run, passes_on=False)


def run(options: argparse.Namespace) -> int:
    """Write the detector and the images, and run the commands that draw the pictures.

    Args:
        options: The parsed command line.

    Returns:
        The exit status, of the first command that fails.

    Raises:
        FileExistsError: Another file of such a name is in the folder already.
        OSError: The folder cannot be written to.
    """
    from ..demo import CONFIG
    from .main import main

    folder = Path(options.out)
    checkpoint, images = write_detector(folder)
    picture, (row, column) = EXPLAINED
    attention = folder / 'attention.png'
    detector = ['--checkpoint', str(checkpoint)]
    for command in (
        ['predict', str(images), *detector, '--out', str(folder)],
        ['explain', str(images / picture), *detector, '--out', str(attention)]
        + ['--point', str(row), str(column)],
    ):
        print(f'$ sasa-det {shlex.join(command)}', flush=True)
        status = main(['--traceback'] * options.traceback + command)
        if status:
            return status
    print('\nThe first pictures:')
    for path in (*sorted((folder / 'pictures').iterdir()), attention):
        print(f'  {path.resolve()}')
    print(f'\n{NEXT.format(checkpoint=shlex.quote(str(checkpoint)), config=CONFIG)}')
    return 0


def write_detector(folder: Path) -> tuple:
    """Write the checkpoint that ships with the package, its config beside it, and the images.

    Args:
        folder: The folder to write to; it may be there already.

    Returns:
        Path of the checkpoint, and of the folder of the images.

    Raises:
        FileExistsError: Another file of such a name is there already; it is left alone.
        OSError: The folder cannot be written to.
    """
    from ..demo import CHECKPOINT, CONFIG, images
    from .process import prepare
    from .progress import step

    with step(f'Writing the detector and images to {folder}'):
        for path in (CHECKPOINT, *images()):
            place = folder if path == CHECKPOINT else folder / 'images'
            _write_new(place / path.name, path.read_bytes())
        prepare()
        from ..checkpoints.loading import load_from_local

        # Training leaves its config beside the checkpoint, and a copy of it within.
        config = load_from_local(str(CHECKPOINT), 'cpu')['meta']['cfg']
        _write_new(folder / f'{CONFIG}.py', config.encode())
    return folder / CHECKPOINT.name, folder / 'images'


def _write_new(path: Path, content: bytes) -> None:
    """Write a file, unless it is there already."""
    from ..files import written_whole

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with written_whole(path) as partial:
                partial.write_bytes(content)
        same = path.read_bytes() == content
    except OSError as error:
        raise type(error)(
            f'{path} cannot be written ({error.strerror}); name another folder by --out'
        ) from None
    if not same:
        raise FileExistsError(
            f'{path} is there already, with other content; remove it, or name another folder by --out'
        )
