"""Build mmcv 2.1.0 from source: how many compilers at once, and mends for later versions of Python and torch.

tools/setup_env.sh runs this module before mmcv is installed, so it imports only the standard library.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator, List, Optional, Sequence

from .stack import mmcv_obstacles, pin

# One compiler takes up to JOB bytes, and one of mmcv's files takes up to LARGEST.
JOB, LARGEST = 6 * 10**8, 22 * 10**8
# Of mmcv 2.1.0's sdist on PyPI.
SHA256 = 'd387bcab66b467479b6660310e23746cfc79c6e57acf04094680adb499a5cd3f'
# What changes in its setup.py: why, the text there, the text instead.
MENDS = (
    (
        'the version is read in a scope of its own, as locals() of Python 3.13 does not show it',
        "        exec(compile(f.read(), version_file, 'exec'))\n    return locals()['__version__']",
        '        scope = {}\n'
        "        exec(compile(f.read(), version_file, 'exec'), scope)\n"
        "    return scope['__version__']",
    ),
    (
        'torch chooses the C++ standard, as torch 2.14 refuses C++17',
        "extra_compile_args['cxx'] = ['-std=c++17']\n        else",
        "extra_compile_args['cxx'] = []\n        else",
    ),
    (
        'the same for CUDA',
        "extra_compile_args['nvcc'] += ['-std=c++17']",
        "extra_compile_args['nvcc'] += []",
    ),
)


class BuildError(Exception):
    """mmcv cannot be built here; the message says why."""


def available_memory(root: Path = Path('/')) -> int:
    """Say how much memory a build may take, in bytes: what is free, and at most the cgroup's limit.

    Args:
        root: The folder that holds ``proc`` and ``sys``.

    Examples:
        >>> available_memory() > 10**6
        True
    """
    amounts = {}
    for line in (root / 'proc/meminfo').read_text().splitlines():
        name, _, amount = line.partition(':')
        amounts[name] = int(amount.split()[0]) * 1024
    free = amounts['MemAvailable'] + amounts['SwapFree']
    limits = [
        int(limit)
        for limit in _cgroup_files(root, 'memory', 'memory.max', 'memory.limit_in_bytes')
        if limit != 'max'
    ]
    return min([free, *limits])


def available_cores(root: Path = Path('/')) -> int:
    """Say how many cores this process may use, by its affinity and its cgroup's quota.

    Args:
        root: The folder that holds ``proc`` and ``sys``.

    Examples:
        >>> 1 <= available_cores() <= os.cpu_count()
        True
    """
    cores = len(os.sched_getaffinity(0))
    for line in _cgroup_files(root, 'cpu', 'cpu.max', 'cpu.cfs_quota_us'):
        # cgroup's second version has the period beside the quota; that of the first is 0.1 s.
        quota, period = (line.split() + ['100000'])[:2]
        if quota not in ('max', '-1'):
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def job_count(memory: int, cores: int) -> int:
    """Choose the number of compilers to run at once.

    Args:
        memory: The bytes that they may take together.
        cores: The number of cores.

    Raises:
        BuildError: The memory is too small for mmcv's largest file.

    Examples:
        >>> job_count(24 * 10**9, cores=8), job_count(3 * 10**9, cores=8)
        (8, 2)
    """
    if memory < LARGEST:
        raise BuildError(
            f'{memory / 1e9:.1f} GB of memory are available, and the build of mmcv needs '
            f'{LARGEST / 1e9:.1f} GB; add memory or swap, or set MAX_JOBS=1 to try it all the same'
        )
    return min(cores, 1 + (memory - LARGEST) // JOB)


def mend(source: Path) -> List[str]:
    """Edit the setup.py of mmcv 2.1.0 so that it builds with Python 3.13 and with torch 2.14.

    Args:
        source: The folder with the unpacked sdist.

    Returns:
        A line for each change.

    Raises:
        BuildError: setup.py is not that of mmcv 2.1.0.
    """
    path = source / 'setup.py'
    text = path.read_text(encoding='utf-8')
    for _, old, new in MENDS:
        if text.count(old) != 1:
            raise BuildError(f'{path} is not that of mmcv 2.1.0: it lacks {old.strip()!r}')
        text = text.replace(old, new)
    path.write_text(text, encoding='utf-8')
    return [f'mended {path.name} of {source.name}: {why}' for why, _, _ in MENDS]


def unpack_source(target: Path, sha256: str = SHA256) -> None:
    """Have pip download mmcv's sdist, and unpack it.

    Args:
        target: The folder to make.
        sha256: The checksum that the sdist must have.

    Raises:
        BuildError: ``target`` exists, or pip found no sdist with this checksum.
    """
    if target.exists():
        raise BuildError(f'{target} exists; name a folder that does not')
    with tempfile.TemporaryDirectory() as place:
        wanted = Path(place) / 'wanted.txt'
        wanted.write_text(f'{pin("mmcv")} --hash=sha256:{sha256}\n')
        # With Python 3.13 pip fails after it has unpacked the sdist, as it runs the setup.py that is to be
        # mended. --no-clean keeps what it unpacked, in a folder of TMPDIR.
        pip = [
            sys.executable,
            '-m',
            'pip',
            'download',
            '--no-clean',
            '--no-deps',
            '--no-binary=mmcv',
        ]
        pip += ['--no-build-isolation', f'--dest={place}/sdist', f'--requirement={wanted}']
        done = subprocess.run(
            pip, env={**os.environ, 'TMPDIR': place}, capture_output=True, text=True
        )
        unpacked = [path.parent for path in Path(place).glob('pip-*/mmcv_*/setup.py')]
        if len(unpacked) != 1 or 'DO NOT MATCH THE HASHES' in done.stderr:
            print(done.stdout, done.stderr, sep='\n', file=sys.stderr)
            raise BuildError(
                f'pip found no sdist of {pin("mmcv")} with the checksum sha256:{sha256}; its output is above'
            )
        shutil.move(unpacked[0], target)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run one of the steps that the set-up needs.

    Args:
        arguments: The command line's, without the program's name.

    Returns:
        The exit status: 1 if mmcv cannot be built here.
    """
    parser = argparse.ArgumentParser(
        prog='python -m sasa_det.environment.mmcv_build', description=__doc__
    )
    steps = parser.add_subparsers(dest='step', required=True)
    steps.add_parser('jobs', help='print how many compilers to run at once')
    steps.add_parser('obstacles', help='print why the source must be mended here, if it must')
    source = steps.add_parser('source', help='download the source and mend it')
    source.add_argument('folder', type=Path, help='the folder to make, for pip install')
    options = parser.parse_args(arguments)
    try:
        if options.step == 'jobs':
            lines = [str(job_count(available_memory(), available_cores()))]
        elif options.step == 'obstacles':
            lines = mmcv_obstacles()
        else:
            unpack_source(options.folder)
            lines = mend(options.folder)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    for line in lines:
        print(line)
    return 0


def _cgroup_files(root: Path, controller: str, second: str, first: str) -> Iterator[str]:
    """Read a limit of this process's cgroup and of those above it, in either version of cgroups."""
    own = root / 'proc/self/cgroup'
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(':', 2)
        if not controllers:
            mount, name = root / 'sys/fs/cgroup', second
        elif controller in controllers.split(','):
            mount, name = root / 'sys/fs/cgroup' / controller, first
        else:
            continue
        group = mount / path.strip('/')
        for folder in (group, *group.parents):
            # In a container the path may be that on the host, which is not there.
            if (folder / name).is_file():
                yield (folder / name).read_text().strip()
            if folder == mount:
                break


if __name__ == '__main__':
    sys.exit(main())
