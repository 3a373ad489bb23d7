"""``sasa-det diagnose``: what a detector's attention attends to, and what each term is worth."""

import argparse
import shlex
import sys
from pathlib import Path

WIDTH = 120  # characters of the tables, where there is no terminal

EXAMPLES = """\
examples:
  sasa-det diagnose work_dirs/quickstart/retinanet_sasa-tiny_digits.py work_dirs/quickstart/epoch_8.pth
  sasa-det diagnose my_config.py runs/1/epoch_12.pth --per-layer --out diagnosis
  sasa-det diagnose my_config.py runs/1/epoch_12.pth --no-accuracy --num-images 8

It evaluates the detector on the config's validation data four times: as trained, without q.k, without
q.r, and with the same weights at every pixel. In the folder of --out are then index.html, a page with
pictures, and diagnosis.json.
"""


def add_to(commands) -> None:
    """Add the sub-command.

    Args:
        commands: The result of ``ArgumentParser.add_subparsers``.
    """
    parser = commands.add_parser(
        'diagnose',
        help='tell what each attention head attends to, and what the terms of its logits are worth in AP',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='config file or name')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='folder to write to (default: CHECKPOINT_diagnosis, here)')
    parser.add_argument(
        '--num-images',
        type=int,
        default=32,
        help='at most so many validation images for the pictures and the numbers of heads; accuracy is always '
        'that on all (default: %(default)s)',
    )
    parser.add_argument(
        '--per-layer',
        action='store_true',
        help='also take each term away from one layer at a time: up to three evaluations per layer',
    )
    parser.add_argument(
        '--no-accuracy', action='store_true', help='evaluate nothing, only look at the heads'
    )
    parser.add_argument('--seed', type=int, default=0, help='of the choice of query pixels')
    parser.add_argument('--device', help='such as cpu or cuda:0 (default: a GPU if there is one)')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
        help='override settings of the config',
    )  # fmt: skip
    parser.set_defaults(run=run, passes_on=False)


def run(options: argparse.Namespace) -> None:
    """Diagnose, and write the page and the numbers.

    Args:
        options: The parsed command line.

    Raises:
        FileNotFoundError, ValueError: A file is missing or invalid, or an argument; names it.
    """
    from ..configs import find_config, read_config
    from .inputs import find_checkpoint
    from .process import prepare
    from .progress import counted, counting, step

    path = find_config(options.config)
    find_checkpoint(options.checkpoint)
    if options.num_images < 1:
        raise ValueError(f'--num-images must be at least 1, but is {options.num_images}')
    if options.per_layer and options.no_accuracy:
        raise ValueError('--per-layer evaluates, and --no-accuracy does not: give one of them')
    with step(f'Loading {options.checkpoint}'):
        prepare()
        import torch

        from ..checkpoints.detector import load_detector
        from ..evaluation.accuracy import build_validation, evaluate
        from ..evaluation.diagnosis import diagnose, spread
        from ..evaluation.diagnosis_accuracy import AWAY, list_cases, measure
        from ..visualization.diagnosis_page import AS_TRAINED, as_content, write_diagnosis

        config = read_config(path, options.cfg_options)
        device = options.device or ('cuda:0' if torch.cuda.is_available() else 'cpu')
        model = load_detector(config, options.checkpoint, device)
        cases = [] if options.no_accuracy else list_cases(model, options.per_layer)
        loader, evaluator = build_validation(config)
        images = spread(loader.dataset, options.num_images)
    with counted(images, len(images), 'Looking at validation images') as counted_images:
        layers = diagnose(model, counted_images, seed=options.seed)
    if not layers:
        raise ValueError(f'{options.checkpoint}: no layer of its model attends')
    batches = len(loader)
    with counting(batches * len(cases), 'Evaluating') as count:
        done = 0

        def run_case(case):
            name = AWAY.get(case.away, AS_TRAINED)
            where = f' in {case.layer}' if case.layer else ''

            def tell():
                nonlocal done
                done += 1
                count(done, f'Evaluating {name}{where}')

            return evaluate(model, loader, evaluator, tell)

        queries = {name: found.query for name, found in layers.items()}
        measured = measure(model, cases, queries, run_case)
    content = as_content(
        layers,
        measured,
        config=str(options.config),
        checkpoint=str(options.checkpoint),
        images=len(images),
        seed=options.seed,
    )
    out = Path(options.out or f'{Path(options.checkpoint).stem}_diagnosis')
    page = write_diagnosis(out, content, _command(options))
    _show(content)
    print(page)


def _command(options: argparse.Namespace) -> str:
    """The command line that repeats a diagnosis."""
    words = ['sasa-det', 'diagnose', options.config, options.checkpoint]
    words += ['--out', options.out] if options.out else []
    words += ['--num-images', str(options.num_images), '--seed', str(options.seed)]
    words += ['--per-layer'] * options.per_layer + ['--no-accuracy'] * options.no_accuracy
    words += ['--device', options.device] if options.device else []
    words += ['--cfg-options', *options.cfg_options] if options.cfg_options else []
    return shlex.join(words)


def _show(content: dict) -> None:
    """Print a diagnosis as tables."""
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.diagnosis import HeadDiagnosis
    from ..evaluation.diagnosis_accuracy import AWAY
    from ..visualization.diagnosis_page import (
        accuracy_rows,
        describe_head,
        describe_metric,
        per_layer_rows,
    )

    # In a file, lines are as long as the table is wide.
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(highlight=False, soft_wrap=True, width=width)
    heads = Table('layer', 'head', 'dy, dx', 'entropy', 'largest', 'q.k, q.r, fixed', 'moves', '')
    for name, layer in content['layers'].items():
        for number, each in enumerate(layer['heads'], 1):
            head = HeadDiagnosis(**each)
            state = 'static' if head.static else ''
            heads.add_row(
                name if number == 1 else '', str(number), *describe_head(head).values(), state
            )
        heads.add_section()
    console.print(heads)
    console.print(
        'dy, dx: where it looks on average, in pixels of the map. Entropy: divided by log k². Shares of the '
        "logits' variance: changes of q.k and of q.r from pixel to pixel, and what is fixed."
    )
    for note in content.get('notes', ()):
        console.print(note)
    if 'metric' not in content:
        return
    metric = describe_metric(content['metric'])
    away = Table('layer', *AWAY.values(), title=f'{metric}, difference', title_justify='left')
    for name, differences in per_layer_rows(content):
        away.add_row(name, *differences)
    if away.row_count:
        console.print(away)
    table = Table('logits', metric, 'difference')
    for row in accuracy_rows(content):
        table.add_row(*row)
    console.print(table)
