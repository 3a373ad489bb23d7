"""``sasa-det configs``: list the package's configs, describe one, or write one out in full."""

import argparse
import errno
from pathlib import Path

EXAMPLES = """\
examples:
  sasa-det configs
  sasa-det configs retinanet_sasa-r50_sasa-fpn_sasa-head_1x_coco
  sasa-det configs my_config.py --size 800 1280
  sasa-det configs retinanet_sasa-tiny_digits --flatten whole.py
"""


def add_to(commands) -> None:
    """Add the sub-command.

    Args:
        commands: The result of ``ArgumentParser.add_subparsers``.
    """
    parser = commands.add_parser(
        'configs',
        help='list the configs, or describe one: parameters, multiply-adds, what attends',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', nargs='?', help='the file or name of the one to describe')
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        default=(640, 640),
        metavar=('HEIGHT', 'WIDTH'),
        help='of the image whose multiply-adds are counted (default: 640 640)',
    )
    parser.add_argument(
        '--flatten',
        metavar='FILE',
        help='write CONFIG there with its bases merged in, for any script',
    )
    parser.set_defaults(run=run, passes_on=False)


def run(options: argparse.Namespace) -> None:
    """List the configs, describe one, or write one out.

    Args:
        options: The parsed command line.

    Raises:
        FileNotFoundError: There is no such config.
        FileExistsError: The file to write exists already.
        ValueError: There is nothing to flatten, or the config cannot be read.
    """
    if options.flatten is not None:
        if options.config is None:
            raise ValueError('--flatten: name the config that is to be written')
        _flatten(options.config, Path(options.flatten))
    elif options.config is None:
        _list()
    else:
        _describe(options.config, tuple(options.size))


def _list() -> None:
    from ..configs import shipped_configs

    folder = None
    for name, path in sorted(shipped_configs().items(), key=lambda entry: entry[1]):
        if path.parent.name != folder:
            folder = path.parent.name
            print(f'{folder}/')
        print(f'    {name}')
    print('In a config of your own: _base_ = "sasa_det::FOLDER/NAME.py"')


def _flatten(name: str, to: Path) -> None:
    from ..configs import find_config, read_config

    config = read_config(find_config(name))
    if to.exists():
        raise FileExistsError(errno.EEXIST, 'is there already; name another file', str(to))
    to.parent.mkdir(parents=True, exist_ok=True)
    config.dump(to)
    print(f'wrote {to}')


def _describe(name: str, size: tuple) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..configs import find_config, read_config

    path = find_config(name)
    with Console(stderr=True).status('Building the model and counting'):
        from .process import prepare

        prepare()
        from ..evaluation.detector_cost import detector_cost

        cost = detector_cost(read_config(path), size)
    table = Table('part', 'attention layers', 'parameters', title=str(path), title_justify='left')
    for part, parameters in cost.parameters.items():
        table.add_row(part, str(cost.attention.get(part, 0)), f'{parameters:,}')
    table.add_section()
    table.add_row('all', str(sum(cost.attention.values())), f'{sum(cost.parameters.values()):,}')
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    height, width = size
    console.print(f'{cost.macs / 1e9:.3f} G multiply-adds for an image of {height} x {width}')
