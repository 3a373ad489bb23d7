#!/usr/bin/env python
"""Load checkpoints of random numpy types and states, and damaged ones, in processes of their own.

    python tools/reliability/hostile_checkpoints.py --trials 10000 --damaged 1500

Each is loaded by torch's unpickler with this package's types, as from torch 2.6 on, and by this package's, as
below 2.6. It must load as what it holds, or be refused with its name. The process must not end.
"""

import argparse
import io
import itertools
import os
import random
import signal
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from pathlib import Path
from typing import Iterable, Iterator

os.environ['OMP_NUM_THREADS'] = '1'  # a process that can be forked

import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sasa_det.checkpoints import loading  # noqa: E402
from sasa_det.checkpoints.types import _CODES, _Dtype, allow_checkpoint_types  # noqa: E402

OUTCOMES = ('loaded', 'refused', 'wrong')
SECONDS = 120  # for one file
AT_ONCE = 100
UNPICKLERS = {True: "torch's unpickler", False: "this package's unpickler"}


def as_file(pickle: bytes) -> bytes:
    """Make a file of torch's that holds a pickle.

    Args:
        pickle: In pickle's own words.
    """
    entries = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({}))) as whole, zipfile.ZipFile(entries, 'w') as file:
        for name in whole.namelist():
            file.writestr(name, pickle if name.endswith('data.pkl') else whole.read(name))
    return entries.getvalue()


def saved(value, zipped: bool = True) -> bytes:
    """What torch writes into a file.

    Args:
        value: The content.
        zipped: In the format since torch 1.6, or the older one.
    """
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def random_pickle(generator: random.Random) -> bytes:
    """Draw calls of what is allowed, with arguments and states of any kind: valid pickles, wrong content.

    Args:
        generator: What draws.
    """

    def text(x):
        return b'X' + len(x).to_bytes(4, 'little') + x.encode()

    def number(x):
        return b'J' + x.to_bytes(4, 'little', signed=True)

    def group(*parts):
        return b'(' + b''.join(parts) + b't'

    def name(module, attribute):
        return b'c' + f'{module}\n{attribute}\n'.encode()

    def content():
        size = generator.choice((0, 1, 8, 16, 64))
        return name('_codecs', 'encode') + group(text('A' * size), text('latin1')) + b'R'

    def dtype(depth=0):
        code = generator.choice(('f8', 'i4', 'b1', 'O8', 'V8', 'U4', 'O'))
        made = name('numpy', 'dtype') + group(text(code), b'\x89', b'\x88') + b'R'
        if generator.random() < 0.6:
            inner = [b'N', number(generator.choice((0, 8)))]
            if depth < 2:
                inner += [group(dtype(depth + 1), group(number(4))), dtype(depth + 1)]
            state = [number(generator.choice((1, 3, 4))), text(generator.choice('|<>=O'))]
            state += [generator.choice(inner) for _ in range(3)]
            state += [number(generator.choice((-1, 0, 8, 2**30))) for _ in range(2)]
            state.append(number(generator.choice((0, 1, 63, -1))))
            made += group(*state) + b'b'
        return made

    def array():
        shape = group(
            *(
                number(generator.choice((0, 1, 2, 8, -1, 2**30)))
                for _ in range(generator.randint(0, 3))
            )
        )
        if generator.random() < 0.3:
            return name('numpy', 'ndarray') + group(shape, dtype(), content()) + b'R'
        begun = name('numpy', 'ndarray'), group(number(0)), text('b')
        made = name('numpy._core.multiarray', '_reconstruct') + group(*begun) + b'R'
        return made + group(number(1), shape, dtype(), b'\x89', content()) + b'b'

    def scalar():
        return name('numpy._core.multiarray', 'scalar') + group(dtype(), content()) + b'R'

    def buffer():
        parts = (array(), array(), number(100))
        return name('mmengine.logging.history_buffer', 'HistoryBuffer') + group(*parts) + b'R'

    return b'\x80\x02' + generator.choice((dtype, array, scalar, buffer))() + b'.'


def holds_what_was_drawn(value) -> bool:
    """Check what a random pickle loads as: plain numbers of the drawn bytes.

    Args:
        value: What was loaded.
    """
    if isinstance(value, HistoryBuffer):
        return all(map(holds_what_was_drawn, value.data))
    if isinstance(value, (np.ndarray, np.generic)):
        drawn = value.dtype == bool or set(value.tobytes()) <= set(b'A')
        return value.dtype.str[1:] in _CODES and drawn
    return isinstance(value, _Dtype)


def content() -> dict:
    """What the files to be damaged hold."""
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    return dict(
        state_dict=dict(a=torch.arange(20.0), b=torch.ones(2, 3, dtype=torch.int64)),
        meta=dict(epoch=1, palette=np.arange(6, dtype=np.uint8), score=np.float64(0.5)),
        message_hub=dict(log_scalars=dict(loss=history)),
    )


def same(one, other) -> bool:
    """Whether two contents agree.

    Args:
        one, other: As :func:`content` gives them.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, HistoryBuffer) and isinstance(other, HistoryBuffer):
        return all(map(np.array_equal, one.data, other.data))
    return np.array_equal(one, other)


def is_whole(value) -> bool:
    """Whether what was loaded is the content."""
    return same(value, content())


def damage(whole: bytes, generator: random.Random) -> bytes:
    """Change one to four bytes, and cut every other file.

    Args:
        whole: The bytes.
        generator: What draws.
    """
    spoilt = bytearray(whole)
    for _ in range(generator.randint(1, 4)):
        spoilt[generator.randrange(len(spoilt))] = generator.randrange(256)
    return bytes(spoilt[: generator.choice((len(spoilt), generator.randrange(len(spoilt))))])


def outcomes(paths: Iterable[Path], is_right) -> Counter:
    """Load files in a process of their own; if one ends it, the next ones are loaded in another.

    Args:
        paths: The files.
        is_right: Takes what was loaded.

    Returns:
        Numbers of files by outcome: one of OUTCOMES, or how the process ended.
    """
    counts, left = Counter(), list(paths)
    sys.stdout.flush()
    while left:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            for path in left:
                signal.alarm(SECONDS)
                os.write(write, bytes([OUTCOMES.index(_load(path, is_right))]))
            os._exit(0)
        os.close(write)
        with open(read, 'rb') as pipe:
            found = pipe.read()
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        counts.update(OUTCOMES[index] for index in found)
        left = left[len(found) :]
        if left:
            counts[f'ended with status {ended}'] += 1
            del left[0]
    return counts


def _load(path: Path, is_right) -> str:
    try:
        value = loading.load_from_local(str(path))
        repr(value)
        return 'loaded' if is_right(value) else 'wrong'
    except ValueError as error:
        if str(path) in str(error):
            return 'refused'
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    return 'wrong'


def load_all(files: Iterator[bytes], is_right) -> Counter:
    """Write files to a temporary folder, and load them, some at a time.

    Args:
        files: Their bytes.
        is_right: Takes what was loaded.

    Returns:
        As :func:`outcomes`.
    """
    counts, number = Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        while some := list(itertools.islice(files, AT_ONCE)):
            paths = [Path(folder, f'{number + place}.pth') for place in range(len(some))]
            for path, file in zip(paths, some):
                path.write_bytes(file)
            counts += outcomes(paths, is_right)
            for path in paths:
                path.unlink()
            number += len(some)
    return counts


def tell(title: str, counts: Counter) -> bool:
    """Print a line, and return whether the promise was kept.

    Args:
        title: What was loaded.
        counts: Numbers of files by outcome.
    """
    bad = sum(count for said, count in counts.items() if said not in ('loaded', 'refused'))
    said = ', '.join(f'{count} {name}' for name, count in sorted(counts.items()))
    print(f'{title}: {said}; {bad} went wrong', flush=True)
    return not bad


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--trials', type=int, default=10000, help='random states; %(default)s')
    parser.add_argument('--damaged', type=int, default=1500, help='of each format; %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    options = parser.parse_args()
    allow_checkpoint_types()
    kept = True
    for asks, unpickler in UNPICKLERS.items():
        if asks and not hasattr(torch.serialization, 'add_safe_globals'):
            continue
        loading.ASKS = asks
        generator = random.Random(options.seed)
        drawn = [random_pickle(generator) for _ in range(options.trials)]
        counts = load_all(map(as_file, drawn), holds_what_was_drawn)
        kept &= tell(f'{unpickler}, random states', counts)
        for zipped in (True, False):
            whole = saved(content(), zipped)
            kept &= load_all(iter([whole]), is_whole) == Counter(loaded=1)
            damaged = [damage(whole, generator) for _ in range(options.damaged)]
            # The older format has no checksums: other numbers may load.
            counts = load_all(iter(damaged), is_whole if zipped else lambda value: True)
            kept &= tell(
                f'{unpickler}, damaged files of the {"zip" if zipped else "older"} format', counts
            )
    sys.exit(not kept)


if __name__ == '__main__':
    main()
