"""The command line: its sub-commands, and how errors are reported."""

import argparse
import os
import re
import sys
from functools import partial
from typing import Optional, Sequence

from . import (
    check_data,
    configs,
    convert,
    demo,
    diagnose,
    explain,
    explore,
    export,
    hand_over,
    predict,
)
from .process import hide_dependencies_warnings

EXAMPLES = """\
examples:
  sasa-det doctor
  sasa-det demo
  sasa-det demo-data
  sasa-det train retinanet_sasa-tiny_digits
  sasa-det predict photos/ --checkpoint work_dirs/quickstart/epoch_8.pth --out found/

`sasa-det COMMAND --help` has more. Exit status: 0; 1 if a part could not be done; 2 for what is
wrong with arguments or files; 130 if interrupted.
"""


# Errors of files, arguments and installations; any other error is a bug.
EXPECTED = (OSError, ValueError, KeyError, ImportError, RuntimeError)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser from the sub-commands.

    Examples:
        >>> build_parser().parse_args(['configs']).command
        'configs'
    """
    parser = argparse.ArgumentParser(
        prog='sasa-det',
        description='Stand-alone self-attention in object detectors.',
        epilog=EXAMPLES,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=20),
        allow_abbrev=False,
    )
    parser.add_argument(
        '--traceback', action='store_true', help='show where an error came from (goes first)'
    )
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    modules = (
        hand_over,
        demo,
        configs,
        check_data,
        convert,
        predict,
        explain,
        diagnose,
        explore,
        export,
    )
    for module in modules:
        module.add_to(commands)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments instead of the command line's.

    Returns:
        The exit status.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    if rest and not options.passes_on:
        parser.error(f'unrecognized arguments: {" ".join(rest)}')
    options.rest = rest
    hide_dependencies_warnings()
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print(f'sasa-det {options.command}: interrupted', file=sys.stderr)
        return 130
    except Exception as error:
        if options.traceback or not (options.passes_on or isinstance(error, EXPECTED)):
            raise
        if 'TORCHELASTIC_ERROR_FILE' in os.environ:
            # torchrun ends with what stands there.
            from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

            ErrorHandler().record_exception(error)
        # What is still buffered would follow the message in a log of both streams.
        sys.stdout.flush()
        print(f'sasa-det {options.command}: {_one_message(error)}', file=sys.stderr)
        return 2


def _one_message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f'{error.filename}: {error.strerror}'
    text, kind = str(error), type(error).__name__
    if not text:
        return f'{kind} without a message; `sasa-det --traceback` shows where'
    if '\nOriginal Traceback' in text:
        # An error in a process that loads data. torch puts its traceback before it.
        return re.split(r'\n(?=[\w.]*(?:Error|Exception): )', text)[-1].strip()
    # A KeyError's own text is the key alone, in quotes.
    named = isinstance(error, KeyError) or not isinstance(error, EXPECTED)
    return f'{kind}: {text}' if named else text
