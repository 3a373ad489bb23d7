"""Does fine-tuning bring content into a converted detector? It is trained with several rates of its logits.

    python -m tools.paper.content --work-dir work_dirs/content/digits \\
        work_dirs/conversions/digits/seed_0/converted/retinanet_tiny_digits_converted.py

The config is one that ``sasa-det convert`` wrote. At first its weights are the same at every pixel. It is
fine-tuned with each learning rate of queries, keys and positions, given as a factor to that of the other
weights, and for each number of epochs. At a factor of 0 the logits stay as they were converted. Then
``sasa-det diagnose`` takes q.k and the dependence on the pixel away, without more training. In the table,
the shares of q.k and q.r are of the logits' variance. results.md and results.json are written after each
training. A training that fails is told, and the others go on. The same command goes on after an
interruption or a failure.
"""

import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Callable, Dict, Optional, Sequence

from sasa_det.convert.files import write_finetuning
from sasa_det.evaluation.diagnosis_accuracy import AWAY
from sasa_det.experiments.training_run import TrainingRun
from sasa_det.visualization.diagnosis_page import AS_TRAINED

from .markdown import format_table
from .study import Plan, Step, make_parser, run_command, run_study

TITLES = (
    'epochs', 'factor', 'AP', f'AP {AWAY["q.k"]}', f'AP {AWAY["pixel"]}', 'q.k, q.r', 'static heads'
)  # fmt: skip


def train_and_diagnose(
    converted: Path,
    epochs: int,
    factor: float,
    seed: int,
    folder: Path,
    tell: Callable[[str], None],
) -> Dict[str, float]:
    """Fine-tune a converted detector, and say what its attention is worth.

    Args:
        converted: The converted detector's config.
        epochs: Number of epochs.
        factor: Of the learning rate of queries, keys and positions.
        seed: Of the training.
        folder: Where to write; a finished training there is not repeated.
        tell: Called with the progress.

    Returns:
        By the names of ``TITLES``: AP in per cent, shares from 0 to 1.

    Raises:
        RunFailed: A command failed.
    """
    config = write_finetuning(
        converted, epochs, converted.with_name(f'content_{epochs}_{factor:g}.py'), logits_lr=factor
    )
    TrainingRun(config, seed, folder).finish(tell)
    numbers = folder / 'diagnosis' / 'diagnosis.json'
    if not numbers.is_file():
        tell('diagnosing')
        checkpoint = (folder / 'last_checkpoint').read_text().strip()
        run_command(
            ['diagnose', str(config), checkpoint, '--out', str(numbers.parent)],
            folder / 'diagnose.out',
        )
    content = json.loads(numbers.read_text())
    aps = {name: 100 * values[content['metric']] for name, values in content['accuracy'].items()}
    heads = [head for layer in content['layers'].values() for head in layer['heads']]
    shares = [sum(head[f'share_{term}'] for head in heads) / len(heads) for term in ('qk', 'qr')]
    values = (
        epochs, factor, aps[AS_TRAINED], aps[AWAY['q.k']], aps[AWAY['pixel']], shares,
        sum(head['static'] for head in heads) / len(heads),
    )  # fmt: skip
    return dict(zip(TITLES, values))


def as_markdown(rows: Sequence[Dict[str, float]]) -> str:
    """Format the table.

    Args:
        rows: From :func:`train_and_diagnose`.

    Examples:
        >>> table = as_markdown([dict(zip(TITLES, (4, 0.1, 85.0, 84.5, 80.25, [0.05, 0.2], 0.5)))])
        >>> print(table.splitlines()[-1])
        | 4 | 0.1 | 85.0 | 84.5 | 80.2 | 5 %, 20 % | 50 % |
    """
    lines = []
    for row in rows:
        epochs, factor, *aps, shares, static = (row[title] for title in TITLES)
        lines.append(
            (
                str(epochs), f'{factor:g}', *(f'{ap:.1f}' for ap in aps),
                ', '.join(f'{100 * share:.0f} %' for share in shares), f'{100 * static:.0f} %',
            )
        )  # fmt: skip
    return format_table(TITLES, lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments instead of the command line's.

    Returns:
        The exit status.
    """
    parser = make_parser('content', __doc__)
    parser.add_argument('config', type=Path, help="the converted detector's config")
    parser.add_argument('--factors', type=float, nargs='+', default=[0, 0.1, 1, 3, 10])
    parser.add_argument('--epochs', type=int, nargs='+', default=[4, 12])
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args(argv)
    steps = [
        Step(
            f'{epochs} epochs, factor {factor:g}',
            epochs,
            partial(
                train_and_diagnose, options.config, epochs, factor, options.seed,
                options.work_dir / f'{epochs}_{factor:g}_seed_{options.seed}',
            ),
        )
        for epochs, factor in product(options.epochs, options.factors)
    ]  # fmt: skip
    plan = Plan(
        steps,
        lambda row: f'AP {row["AP"]:.1f}',
        lambda results: list(results.values()),
        lambda results: as_markdown(list(results.values())) + '\n',
    )
    return run_study('content', options, lambda: plan)


if __name__ == '__main__':
    sys.exit(main())
