"""``sasa-det convert``: a trained convolutional detector becomes an attention one."""

import argparse
import shlex
import sys
from pathlib import Path

EXAMPLES = """\
examples:
  sasa-det convert retinanet_tiny_digits work_dirs/teacher/epoch_8.pth --out work_dirs/converted
  sasa-det convert my_config.py epoch_12.pth --images photos/ --out converted --parts neck head
  sasa-det convert my_config.py epoch_12.pth --out converted --budget time=0.8 --finetune 2

Only --finetune and --budget ap=... need labels. In the folder of --out are then the converted detector's
config and checkpoint, report.json and the page index.html. Interrupted by Ctrl-C, the same command goes on.
"""


def add_to(commands) -> None:
    """Add the sub-command.

    Args:
        commands: The result of ``ArgumentParser.add_subparsers``.
    """
    parser = commands.add_parser(
        'convert',
        help='turn the convolutions of a trained detector into attention, without labels',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='config file or name of the trained detector')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument('--out', required=True, help='folder to write to')
    parser.add_argument(
        '--images', help="folder of images to convert with (default: the config's training images)"
    )
    parser.add_argument(
        '--num-images', type=int, default=64, help='at most so many images (default: %(default)s)'
    )
    parser.add_argument(
        '--parts',
        nargs='+',
        choices=('backbone', 'neck', 'head', 'predictors'),
        default=['backbone', 'neck', 'head'],
        metavar='PART',
        help='which parts to convert: backbone, neck, head, predictors (default: the first three)',
    )
    parser.add_argument(
        '--heads', type=int, default=8, help='heads of each attention (default: %(default)s)'
    )
    parser.add_argument(
        '--kernel-size',
        type=int,
        default=5,
        help='window size in pixels, odd (default: %(default)s)',
    )
    parser.add_argument(
        '--static', action='store_true',
        help='give each attention the same weights at every pixel: it has no queries and keys, takes less time '
        'and cannot learn to look at content',
    )  # fmt: skip
    parser.add_argument(
        '--expansion', type=int, default=1, metavar='FACTOR',
        help="channels of each attention, as a multiple of the output's (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        '--budget', metavar='KIND=AMOUNT',
        help="convert only the layers that are worth it: for so much of the detector's time or flops, such as "
        'time=0.8 or time=least, or for so much AP that may be lost, such as ap=-1.0',
    )  # fmt: skip
    parser.add_argument(
        '--finetune', type=int, default=0, metavar='EPOCHS',
        help="then train for so many epochs on the config's labelled data, at a low learning rate",
    )  # fmt: skip
    parser.add_argument(
        '--num-val-images', type=int, default=200, metavar='NUMBER',
        help="measure AP before and after on at most so many of the config's labelled validation images; "
        '0 for none (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument('--seed', type=int, default=0, help='of the choice of images and pixels')
    parser.add_argument('--device', help='such as cpu or cuda:0 (default: a GPU if there is one)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override settings of the config',
    )
    parser.set_defaults(run=run, passes_on=False)


def run(options: argparse.Namespace) -> int:
    """Convert, and write config, checkpoint and report.

    Args:
        options: The parsed command line.

    Returns:
        The exit status.

    Raises:
        FileNotFoundError, ValueError: A file is missing or invalid, or an argument; names it.
    """
    from ..configs import find_config
    from .inputs import find_checkpoint
    from .process import prepare
    from .progress import counting, step

    base = find_config(options.config)
    find_checkpoint(options.checkpoint)
    with step(f'Loading {options.checkpoint}'):
        prepare()
        import torch

        from ..convert.detector_conversion import DetectorConversion, Settings
        from ..convert.files import check_finetuning
        from ..convert.report import facts, write_report

        wanted = {name: getattr(options, name) for name in Settings._fields if name != 'config'}
        wanted['device'] = options.device or ('cuda:0' if torch.cuda.is_available() else 'cpu')
        job = DetectorConversion(Settings(config=base, **wanted), Path(options.out))
        config = job.checkpoint.with_suffix('.py')
        if options.finetune:
            check_finetuning(job.config, options.finetune)
            if job.is_made:
                print(f'{job.checkpoint} is there already', file=sys.stderr)
                return _finetune(config, options.finetune)
        job.load()
    with step(f'Loading images, at most {options.num_images} of {len(job.files)}'):
        warning = job.load_images()
    if warning:
        print(warning, file=sys.stderr)
    try:
        if job.budget:
            with counting(len(job.calls), 'Measuring each layer by itself') as count:
                job.plan(count)
        with counting(len(job.calls), 'Converting layers') as count:
            job.convert(lambda name: count(len(job.progress.layers), f'Converting {name}'))
    except KeyboardInterrupt:
        done = len(job.progress.layers)
        print(
            f'{done} of {len(job.calls)} layers are converted; the same command '
            f'{"goes on from there" if done or job.progress.has_measured else "begins anew"}',
            file=sys.stderr,
        )
        raise
    with step('Writing and measuring'):
        report = job.write()
        page = write_report(report, Path(options.out), job.checkpoint, _as_typed(options))
    for name, value in facts(report):
        print(f'{name}: {value}')
    if 'missing' in report['ap']:
        print(f'AP was not measured: {report["ap"]["missing"]}')
    print(
        f'{len(report["kept"])} convolutions stay; {page} says why, and what each layer leaves unexplained'
    )
    print(f'sasa-det test {config} {job.checkpoint}')
    return _finetune(config, options.finetune) if options.finetune else 0


def _as_typed(options: argparse.Namespace) -> str:
    """Write the command that these options are of; those that have their default are left out."""
    parser = argparse.ArgumentParser()
    add_to(parser.add_subparsers())
    parts = ['sasa-det', 'convert', options.config, options.checkpoint, '--out', options.out]
    default = parser.parse_args(
        ['convert', options.config, options.checkpoint, '--out', options.out]
    )
    for name, value in vars(options).items():
        if name in default and value != getattr(default, name):
            values = value if isinstance(value, list) else [] if value is True else [value]
            parts += [f'--{name.replace("_", "-")}', *map(str, values)]
    return shlex.join(parts)


def _finetune(converted: Path, epochs: int) -> int:
    from ..convert.files import write_finetuning
    from .main import main

    config = write_finetuning(converted, epochs)
    folder = converted.parent / 'finetune'
    resume = ['--resume'] if (folder / 'last_checkpoint').is_file() else []
    return main(['train', str(config), '--work-dir', str(folder), *resume])
