#!/usr/bin/env python
"""Train where files may have no more than some bytes, as where the disk is full.

    python tools/reliability/full_disk.py --trials 3

The limit cuts a checkpoint short. A message and the earlier checkpoints must remain. A run resumed from
them must end with the weights of an uninterrupted run.
"""

import random
import resource
import sys
from pathlib import Path

from small_run import (
    arguments_of,
    folder_of,
    make_data,
    run,
    same,
    weights,
    write_config,
)

from sasa_det.checkpoints.loading import find_damage  # isort: skip

# The first epoch does not depend on whether a second one follows.
CONSTANT = 'param_scheduler = []'


def main() -> None:
    """Run the command line."""
    options = arguments_of(__doc__, trials=3).parse_args()
    choose = random.Random(options.seed)
    wrong = 0
    with folder_of(options) as root:
        data = make_data(root)
        write_config(root / 'alone', data, CONSTANT, epochs=2)
        run(root / 'alone')
        truth = weights(root / 'alone/epoch_2.pth')
        size = (root / 'alone/epoch_1.pth').stat().st_size
        for trial in range(options.trials):
            folder = root / f'trial_{trial}'
            write_config(folder, data, CONSTANT, epochs=1)
            run(folder)
            write_config(folder, data, CONSTANT, epochs=2)
            limit = choose.randrange(size // 4, size)
            said = run_with_limit(folder, limit)
            left = sorted(path.name for path in folder.glob('epoch_*'))
            whole = find_damage(folder / 'epoch_1.pth') is None
            message = [line for line in said.splitlines() if 'could not be written' in line]
            run(folder, '--resume')
            good = whole and len(message) > 0 and left == ['epoch_1.pth']
            good = good and same(truth, weights(folder / 'epoch_2.pth'))
            wrong += not good
            print(f'trial {trial}: {limit} of {size} bytes; left {left}; said {message[-1:]}')
    print(f'{options.trials} trials: {wrong} went wrong')
    sys.exit(wrong > 0)


def run_with_limit(folder: Path, limit: int) -> str:
    """Resume a run with a limit on file sizes; return its output."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        run(folder, '--resume')
    except RuntimeError:
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return (folder / 'said.txt').read_text()


if __name__ == '__main__':
    main()
