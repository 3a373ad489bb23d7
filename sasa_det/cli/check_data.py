"""``sasa-det check-data``: list all problems of a data set, before training."""

import argparse

EXAMPLES = """\
examples:
  sasa-det check-data my_config.py
  sasa-det check-data annotations/instances_train.json train/

Exit status 1 if anything is wrong. What may be right is a warning, and not counted.
"""


def add_to(commands) -> None:
    """Add the sub-command.

    Args:
        commands: The result of ``ArgumentParser.add_subparsers``.
    """
    parser = commands.add_parser(
        'check-data',
        help='list all that is wrong with annotations and images',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('data', help="a config, or an annotation file in COCO's format")
    parser.add_argument('images', nargs='?', help='the folder of its images')
    parser.set_defaults(run=run, passes_on=False)


def run(options: argparse.Namespace) -> int:
    """List the problems, one per line.

    Args:
        options: The parsed command line.

    Returns:
        1 if there are any, else 0; warnings do not count.

    Raises:
        FileNotFoundError: There is no such config.
        ValueError: The config has no data sets.
    """
    from ..configs import find_config, read_config
    from .process import prepare

    config = None
    if options.images is None:
        if options.data.endswith('.json'):
            raise ValueError(f'{options.data}: name the folder of its images after it')
        config = find_config(options.data)
    prepare()
    from ..data.check import DataPlace, Doubt, data_places, find_data_problems

    if config is None:
        places = [DataPlace(options.data, options.images)]
    else:
        places = list(data_places(read_config(config)))
        if not places:
            raise ValueError(f'{options.data}: has no data set with an ann_file')
    count = 0
    for place in places:
        for problem in find_data_problems(place):
            if isinstance(problem, Doubt):
                print(f'warning: {problem}')
                continue
            count += 1
            print(problem)
    print(f'{count} problems in {", ".join(place.annotations for place in places)}')
    return int(count > 0)
