"""Sub-commands that pass their arguments on to other programs."""

import argparse
import sys
from typing import Callable, NamedTuple

from . import parsers


class HandOver(NamedTuple):
    """A sub-command.

    Attributes:
        about: One line that describes it.
        examples: Command lines.
        run: Takes the arguments; returns the exit status.
    """

    about: str
    examples: str
    run: Callable


def _doctor(rest: list) -> int:
    from ..environment.doctor import main

    return main(rest)


# Arguments and files are looked at before anything slow is imported: mistakes are told at once.


def _demo_data(rest: list) -> int:
    parsers.demo_data().parse_args(rest)
    from ..data.digits import main

    return 2 if main(rest) else 0


def _coco_config(rest: list) -> int:
    from ..configs import find_config
    from .process import prepare

    base = parsers.coco_config().parse_args(rest).base
    if '::' not in base:
        find_config(base)

    prepare()
    from ..data.coco_config import main

    return 2 if main(rest) else 0


def _box_crops(rest: list) -> int:
    parsers.box_crops().parse_args(rest)
    from ..data.box_crops import main

    return 2 if main(rest) else 0


def _mmdets(tool: str) -> Callable:
    def run(rest: list) -> int:
        from ..configs import find_config, read_config
        from ..environment.stack import require_stack
        from .inputs import find_checkpoint
        from .openmmlab_tools import read_arguments, run_tool
        from .process import prepare

        require_stack()
        given = vars(read_arguments(tool, rest, f'sasa-det {tool}'))
        path = find_config(given['config'])
        for checkpoint in (given.get('checkpoint'), given.get('resume')):
            if checkpoint not in (None, 'auto'):
                find_checkpoint(checkpoint)
        prepare()
        from .run_checks import check_run

        config = read_config(path, given.get('cfg_options') or ())
        check_run(tool, config, given)
        place = rest.index(given['config'])
        run_tool(tool, [*rest[:place], str(path), *rest[place + 1 :]])
        return 0

    return run


def _tool(rest: list) -> int:
    parser = argparse.ArgumentParser(
        prog='sasa-det tool', description='Without a name: where the tools are.'
    )
    parser.add_argument('--package', choices=('mmdet', 'mmpretrain'), default='mmdet')
    parser.add_argument('name', nargs='?', help='such as analysis_tools/get_flops')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help="the tool's own")
    options = parser.parse_args(rest)
    from ..environment.stack import require_stack
    from .openmmlab_tools import missing_for_mmpretrain, read_arguments, run_tool, tools_folder

    require_stack()

    missing = missing_for_mmpretrain() if options.package == 'mmpretrain' else None
    if missing:
        raise ImportError(missing)
    if options.name is None:
        print(tools_folder(options.package))
        return 0
    read_arguments(
        options.name, options.arguments, f'sasa-det tool {options.name}', options.package
    )
    from .process import prepare

    prepare()
    run_tool(options.name, options.arguments, options.package)
    return 0


def _compare(rest: list) -> int:
    from ..configs import find_config
    from .process import prepare

    for config in parsers.compare().parse_args(rest).configs:
        find_config(config)
    prepare()
    from ..experiments.compare import main

    return main(rest)


def _report(rest: list) -> int:
    from ..configs import find_config, read_config
    from .inputs import find_checkpoint
    from .process import prepare

    options = parsers.report().parse_args(rest)
    path = find_config(options.config)
    find_checkpoint(options.checkpoint)

    prepare()
    from ..checkpoints.fit import require_fit_before_run
    from ..visualization.report import main

    require_fit_before_run(read_config(path, options.cfg_options), options.checkpoint)

    return main(rest)


COMMANDS = {
    'doctor': HandOver(
        'say what is installed, which backends there are, and how to mend what is wrong',
        '  sasa-det doctor\n  sasa-det doctor --quiet && echo all is well',
        _doctor,
    ),
    'demo-data': HandOver(
        'make a data set of handwritten digits on photographs, in data/digits by default',
        '  sasa-det demo-data\n  sasa-det demo-data my_digits --num-train 100 --num-val 20',
        _demo_data,
    ),
    'coco-config': HandOver(
        'check data of your own in COCO format, and write a config that trains on it',
        '  sasa-det coco-config my_data --out my_config.py\n'
        '  sasa-det coco-config my_data --out my_config.py --image-scale 512 --max-epochs 24',
        _coco_config,
    ),
    'box-crops': HandOver(
        'cut the boxes out of COCO-format data, as a data set to pretrain a backbone on',
        '  sasa-det box-crops data/digits data/digit-crops',
        _box_crops,
    ),
    'train': HandOver(
        "train, by mmdet's own train.py; CONFIG is a file or one of `sasa-det configs`",
        '  sasa-det train retinanet_sasa-tiny_digits\n'
        '  sasa-det train my_config.py --work-dir runs/1 --cfg-options train_cfg.max_epochs=2\n'
        '  sasa-det train my_config.py --resume',
        _mmdets('train'),
    ),
    'test': HandOver(
        "evaluate, by mmdet's own test.py; CONFIG is a file or one of `sasa-det configs`",
        '  sasa-det test my_config.py runs/1/epoch_12.pth\n'
        '  sasa-det test my_config.py runs/1/epoch_12.pth --out predictions.pkl --show-dir shown',
        _mmdets('test'),
    ),
    'tool': HandOver(
        "run any other tool of mmdet's or mmpretrain's own; without a name, say where they are",
        '  sasa-det tool analysis_tools/get_flops my_config.py --num-images 1\n'
        '  sasa-det tool --package mmpretrain train configs/pretrain/sasa-tiny_digit-crops.py',
        _tool,
    ),
    'report': HandOver(
        'write numbers, pictures and a page on a trained detector',
        '  sasa-det report my_config.py runs/1/epoch_12.pth --predictions predictions.pkl '
        '--work-dir runs/1',
        _report,
    ),
    'compare': HandOver(
        'train configs with several seeds, and set AP against parameters, FLOPs (a multiply-add is two), time '
        'and memory',
        '  sasa-det compare retinanet_tiny_digits retinanet_sasa-tiny_digits --work-dir runs/compare\n'
        '  sasa-det compare a.py b.py --work-dir runs/ab --seeds 5 --cfg-options train_cfg.max_epochs=6',
        _compare,
    ),
}


def add_to(commands) -> None:
    """Add the sub-commands.

    Args:
        commands: The result of ``ArgumentParser.add_subparsers``.
    """
    for name, command in COMMANDS.items():
        parser = commands.add_parser(name, help=command.about, add_help=False)
        parser.set_defaults(run=run, passes_on=True)


def run(options: argparse.Namespace) -> int:
    """Pass the arguments on; with ``--help``, show the examples first.

    Args:
        options: The parsed command line, with the arguments to pass on in ``rest``.
    """
    command = COMMANDS[options.command]
    if {'-h', '--help'}.intersection(options.rest):
        print(f'sasa-det {options.command}: {command.about}\n\nexamples:\n{command.examples}\n')
        print('arguments, of what it hands over to:', flush=True)
        sys.stdout.flush()
    return command.run(options.rest)
