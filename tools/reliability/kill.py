#!/usr/bin/env python
"""Kill training at random moments, resume it, and compare its end with that of a run left alone.

    python tools/reliability/kill.py --trials 20

Every other trial kills while a checkpoint is being written. Weights must agree in each bit.
"""

import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from small_run import (
    arguments_of,
    folder_of,
    import_all,
    make_data,
    run,
    same,
    start,
    weights,
    write_config,
)

EPOCHS = 4
LAST = f'epoch_{EPOCHS}.pth'


def kill_once(folder: Path, choose: random.Random, in_write: bool, seconds: float) -> str:
    """Start or resume a run and kill it; return a text that says when."""
    process = start(folder, '--resume')
    begin = time.monotonic()
    end = begin + choose.uniform(0.1, 1) * seconds
    writes = choose.randint(1, EPOCHS - 1)
    seen = set()
    when = 'it had ended'
    while process.is_alive():
        if in_write:
            partial = {path.name for path in folder.glob('epoch_*.partial')}
            seen |= partial
            if partial and len(seen) >= writes:
                when = f'while {partial.pop()} was written'
                break
        elif time.monotonic() > end:
            when = f'after {time.monotonic() - begin:.1f} s'
            break
        time.sleep(0.0003 if in_write else 0.01)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.join()
    return when


def main() -> None:
    """Run the command line."""
    options = arguments_of(__doc__, trials=20).parse_args()
    choose = random.Random(options.seed)
    wrong = in_write_count = 0
    with folder_of(options) as root:
        data = make_data(root)
        write_config(root / 'alone', data, epochs=EPOCHS)
        import_all()
        begin = time.monotonic()
        run(root / 'alone')
        seconds = time.monotonic() - begin
        truth = weights(root / 'alone' / LAST)
        for trial in range(options.trials):
            folder = root / f'trial_{trial}'
            write_config(folder, data, epochs=EPOCHS, keep=1 + trial % 2)
            when = kill_once(folder, choose, in_write=trial % 2 == 0, seconds=seconds)
            left = sorted(path.name for path in folder.glob('epoch_*'))
            said = run(folder, '--resume')
            went_on = re.findall(r'resumed epoch: (\d+)', said)
            good = same(truth, weights(folder / LAST))
            wrong += not good
            in_write_count += when.startswith('while')
            print(
                f'trial {trial}: killed {when}; left {left}; went on from epoch '
                f'{went_on[-1] if went_on else 0}; {"same" if good else "OTHER"} weights',
                flush=True,
            )
            shutil.rmtree(folder)
    print(
        f'{options.trials} kills, {in_write_count} while a checkpoint was written: '
        f'{wrong} ended with other weights than a run left alone ({seconds:.0f} s)'
    )
    sys.exit(wrong > 0)


if __name__ == '__main__':
    main()
