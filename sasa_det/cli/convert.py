"""``sasa-det convert``: a trained convolutional detector becomes an attention one."""

import argparse
import sys
from pathlib import Path

EXAMPLES = """\
examples:
  sasa-det convert retinanet_tiny_digits work_dirs/teacher/epoch_8.pth --out work_dirs/converted
  sasa-det convert my_config.py epoch_12.pth --images photos/ --out converted --parts neck head
  sasa-det convert my_config.py epoch_12.pth --out converted --budget time=0.8 --finetune 2

Only --finetune needs labels. In the folder of --out are then the converted detector's config and
checkpoint, report.json and report.md. Interrupted by Ctrl-C, the same command goes on where it was.
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
        default=['backbone', 'neck', 'head'],
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
        '--budget', metavar='KIND=SHARE',
        help="convert only the layers that are worth it for so much of the detector's time or flops, such as "
        'time=0.8',
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
    from ..configs import find_config, read_config
    from .inputs import find_checkpoint
    from .process import prepare
    from .progress import counting, step

    base = find_config(options.config)
    find_checkpoint(options.checkpoint)
    with step(f'Loading {options.checkpoint}'):
        prepare()
        import torch

        from ..checkpoints.detector import load_detector
        from ..convert import convert, files
        from ..convert.budget import read_budget
        from ..convert.conversion import images_needed
        from ..convert.detectors import choose_detectors_layers, find_images, load_images, stages_of
        from ..convert.walk import watch_calls

        budget = read_budget(options.budget) if options.budget else None
        config = read_config(base, options.cfg_options)
        if options.finetune:
            files.check_finetuning(config, options.finetune)
        device = options.device or ('cuda:0' if torch.cuda.is_available() else 'cpu')
        model = load_detector(config, options.checkpoint, device)
        choices = choose_detectors_layers(model, options.parts, options.heads, options.kernel_size)
    found = find_images(config, options.images)
    with step(f'Loading images, at most {options.num_images} of {len(found)}'):
        images = load_images(model, config, found, options.num_images, options.seed)
        stages = stages_of(model)
        chosen = [name for name, choice in choices.items() if choice.attn_cfg is not None]
        calls = watch_calls(model, chosen, stages, images[:1])
    enough = images_needed(
        {name: (each, model.get_submodule(name)) for name, each in calls.items()}
    )
    if len(images) < enough:
        print(
            f'{len(images)} images of {images.shape[2]} x {images.shape[3]} pixels are few: from {enough} on, '
            'each layer has as many pixels to be fitted to as it has inputs',
            file=sys.stderr,
        )
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    progress = files.Progress(
        out,
        dict(
            model=config.model, parts=options.parts, heads=options.heads, seed=options.seed,
            kernel_size=options.kernel_size, images=found, num_images=len(images), budget=options.budget,
            pipeline=config.test_dataloader.dataset.pipeline, device=device,
            checkpoint=[str(options.checkpoint), Path(options.checkpoint).stat().st_mtime_ns],
        ),
    )  # fmt: skip
    checkpoint = files.converted_checkpoint(out, base)
    if options.finetune and progress.made(checkpoint):
        print(f'{checkpoint} is there already', file=sys.stderr)
        return _finetune(checkpoint.with_suffix('.py'), options.finetune)
    if budget:
        with counting(len(calls), 'Measuring each layer by itself') as count:
            choices = files.plan_within(
                out,
                progress.key,
                budget,
                model,
                choices,
                stages,
                images,
                calls,
                options.seed,
                count,
            )
        calls = {name: each for name, each in calls.items() if choices[name].attn_cfg is not None}
    try:
        with counting(len(calls), 'Converting layers') as count:

            def tell(name, fitted, layer):
                if fitted is not None:
                    progress.add(name, layer)
                count(len(progress.layers), f'Converting {name}')

            conversion = convert(
                model, images, stages=stages, choices=choices, seed=options.seed,
                done=dict(progress.layers), tell=tell,
            )  # fmt: skip
    except KeyboardInterrupt:
        print(
            f'{len(progress.layers)} of {len(calls)} layers are converted; the same command goes on from there',
            file=sys.stderr,
        )
        raise
    with step('Writing and measuring'):
        ap = files.measure_both(model, conversion.model, config, options.num_val_images)
        changed = bool(options.cfg_options)
        files.write_student(checkpoint, base, config, conversion, progress.key, changed)
        report = files.write_report(out, model, conversion, stages, images, calls, ap)
        progress.remove()
    print(report, end='')
    print(f'\nsasa-det test {checkpoint.with_suffix(".py")} {checkpoint}')
    return _finetune(checkpoint.with_suffix('.py'), options.finetune) if options.finetune else 0


def _finetune(converted: Path, epochs: int) -> int:
    from ..convert.files import write_finetuning
    from .main import main

    config = write_finetuning(converted, epochs)
    folder = converted.parent / 'finetune'
    resume = ['--resume'] if (folder / 'last_checkpoint').is_file() else []
    return main(['train', str(config), '--work-dir', str(folder), *resume])
