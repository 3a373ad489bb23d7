"""``sasa-det explore``: a web page that shows where a detector attends."""

import argparse
import os
import shutil
import signal
import tempfile
from pathlib import Path

QUICKSTARTS = 'work_dirs/quickstart/epoch_8.pth'
EXAMPLES = """\
examples:
  sasa-det explore
  sasa-det explore runs/1/epoch_12.pth --port 8000
  sasa-det explore runs/1/epoch_12.pth --host 0.0.0.0 --name gpubox.example.org

The page is for this machine alone, unless --host says otherwise: whoever reaches the address may then
use it. It answers at that address only; --name adds the name of the machine, a proxy or a tunnel. It
needs the extra `demo`, and nothing from the network.
"""


def add_to(commands) -> None:
    """Add the sub-command.

    Args:
        commands: The result of ``ArgumentParser.add_subparsers``.
    """
    parser = commands.add_parser(
        'explore',
        help='open a web page that shows where attention looks from a pixel',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help=f'weights, as training saves them (default: {QUICKSTARTS}; if it is not there, those of '
        '`sasa-det demo`)',
    )
    parser.add_argument(
        '--config', help='config file or name (default: the one beside the checkpoint)'
    )
    parser.add_argument('--device', help='such as cpu or cuda:0 (default: a GPU if there is one)')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config'
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.5,
        help='the least score of a box that is drawn (default: %(default)s)',
    )
    parser.add_argument(
        '--host', default='127.0.0.1', help='address to listen at (default: %(default)s)'
    )
    parser.add_argument('--port', type=int, help='port (default: the first free one from 7860)')
    parser.add_argument(
        '--name',
        action='append',
        default=[],
        metavar='NAME[:PORT]',
        help='another name in the address by which browsers reach the page; may be repeated',
    )
    parser.set_defaults(run=run, passes_on=False)


def run(options: argparse.Namespace) -> None:
    """Serve the page until interrupted.

    Args:
        options: The parsed command line.

    Raises:
        FileNotFoundError, ValueError: A file is missing or invalid; names it.
        ImportError: Gradio is missing.
    """
    from .. import demo
    from .inputs import find_detector, load
    from .progress import step

    if options.checkpoint is None:
        if Path(QUICKSTARTS).is_file():
            options.checkpoint = QUICKSTARTS
        else:
            options.checkpoint, options.config = str(demo.CHECKPOINT), options.config or demo.CONFIG
    find_detector(options)
    with step('Loading Gradio'):
        from ..visualization.explorer.page import build_page, require_gradio, serve

        require_gradio()
    model = load(options)
    from ..visualization.explorer.session import Explorer

    # Service managers stop a program by SIGTERM. As Ctrl-C it lets the visitors' files be deleted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        os.environ['GRADIO_TEMP_DIR'] = f'{folder}/gradio'  # for all that Gradio writes
        with step('Starting the page'):
            explorer = Explorer(model, options.score_thr)
            # Gradio serves no files of other folders.
            examples = [Path(shutil.copy(path, folder)) for path in demo.images()]
            page = build_page(explorer, examples, Path(options.checkpoint).name)
        serve(page, options.host, options.port, names=options.name)
