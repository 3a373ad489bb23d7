"""Compile some of mmcv's files as its own build does and as the set-up does, and compare the objects' sections.

    python tools/checks/mmcv_build.py                      the operators of the tests, some minutes
    python tools/checks/mmcv_build.py --files 'pybind/*'   others; '*' is all, the better part of an hour

The set-up reads torch's headers once for all files and leaves debugging data out: see tools/pch_cxx.sh. The
commands are those of mmcv's own build, which a stand-in for the compiler writes down. It needs a network, for
mmcv's source.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from sasa_det.environment.mmcv_build import mend, unpack_source
from sasa_det.environment.stack import mmcv_obstacles

WRAPPER = Path(__file__).resolve().parents[1] / 'pch_cxx.sh'
FILES = ('*/nms.cpp', '*/roi_align.cpp', '*/deform_conv.cpp')
# Writes down what compiles a file, and makes empty objects and libraries.
RECORDER = """#!{python}
import json, os, subprocess, sys
arguments = sys.argv[1:]
if '-o' not in arguments:
    sys.exit(subprocess.run(['g++', *arguments]).returncode)
open(arguments[arguments.index('-o') + 1], 'w').close()
if '-c' in arguments:
    with open({calls!r}, 'a') as file:
        file.write(json.dumps([os.getcwd(), arguments]) + '\\n')
"""
# Sections that say who compiled it, or where to find what in the source.
NO_CODE = re.compile(r'\.(rela?\.)?debug|\.comment|\.note')


def recorded_commands(source: Path, place: Path) -> List[Tuple[str, List[str]]]:
    """Run mmcv's own build with a stand-in for the compiler.

    Args:
        source: The folder of mmcv's source.
        place: A folder for what the build writes.

    Returns:
        The folder and the arguments of each call that compiles a file.
    """
    calls, recorder = place / 'calls', place / 'g++'
    recorder.write_text(RECORDER.format(python=sys.executable, calls=str(calls)))
    recorder.chmod(0o755)
    build = [sys.executable, 'setup.py', '-q', 'build_ext', f'--build-temp={place}/objects']
    environment = {**os.environ, 'CXX': str(recorder), 'MMCV_WITH_OPS': '1', 'MAX_JOBS': '4'}
    done = subprocess.run(
        [*build, f'--build-lib={place}/lib'],
        cwd=source, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if not calls.exists():
        raise RuntimeError(f"mmcv's build called no compiler: {done.stdout}{done.stderr}")
    return [tuple(json.loads(line)) for line in calls.read_text().splitlines()]


def compile_to(target: Path, compiler: str, folder: str, arguments: List[str], **env: str) -> float:
    """Compile a file as a recorded command says, but to another object.

    Args:
        target: The object to make.
        compiler: The compiler to call.
        folder: Where to call it.
        arguments: The recorded arguments.
        env: Added to the environment.

    Returns:
        The CPU seconds that it took.
    """
    arguments = list(arguments)
    arguments[arguments.index('-o') + 1] = str(target)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [compiler, *arguments], cwd=folder, env={**os.environ, **env}, check=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def sections(path: Path) -> Dict[str, str]:
    """Read an object's sections, as text.

    Args:
        path: The object.

    Returns:
        By name, the contents and relocations of every section with code or data.
    """
    # Numbers of symbols and sections depend on debugging data, hence objdump's names.
    dumped = subprocess.run(
        ['objdump', '--full-contents', '--reloc', '--wide', str(path)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    heading = re.compile(
        r'^(?:Contents of section |RELOCATION RECORDS FOR \[)([^\]\s]+?)\]?:$', re.M
    )
    parts = heading.split(dumped)[1:]
    found: Dict[str, str] = {}
    for name, content in zip(parts[::2], parts[1::2]):
        # .group lists the other sections by their numbers.
        if not NO_CODE.match(name) and name != '.group':
            found[name] = found.get(name, '') + content
    return found


def compare(plain: Path, fast: Path) -> List[str]:
    """List the sections in which two objects differ.

    Args:
        plain: The one of the default build.
        fast: The one of the set-up.

    Returns:
        The names, sorted.
    """
    first, second = sections(plain), sections(fast)
    return sorted(name for name in {*first, *second} if first.get(name) != second.get(name))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command.

    Args:
        arguments: The command line's, without the program's name.

    Returns:
        The exit status: 1 if an object differs.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--files', nargs='+', default=FILES, metavar='PATTERN', help=f'default: {" ".join(FILES)}'
    )
    options = parser.parse_args(arguments)
    print('| file | CPU s, default | CPU s, set-up | sections | different |\n|---|---|---|---|---|')
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        unpack_source(place / 'mmcv')
        if mmcv_obstacles():
            mend(place / 'mmcv')
        (place / 'header').mkdir()
        for where, call in recorded_commands(place / 'mmcv', place):
            source = next(each for each in call if each.endswith('.cpp'))
            if not any(fnmatch(source, pattern) for pattern in options.files):
                continue
            plain, fast = place / 'plain.o', place / 'fast.o'
            default = compile_to(plain, 'g++', where, call)
            ours = compile_to(fast, str(WRAPPER), where, call, SASA_PCH_DIR=str(place / 'header'))
            different = compare(plain, fast)
            name = source.split('/csrc/')[-1]
            print(
                f'| {name} | {default:.0f} | {ours:.0f} | {len(sections(plain))} '
                f'| {", ".join(different) or "none"} |',
                flush=True,
            )
            status |= bool(different)
    return status


if __name__ == '__main__':
    sys.exit(main())
