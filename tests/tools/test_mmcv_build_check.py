"""tools/checks/mmcv_build.py: it sees what differs between two objects, and records a build's commands."""

import shutil
import subprocess

import pytest

from tools.checks.mmcv_build import compare, recorded_commands, sections

needs_gcc = pytest.mark.skipif(shutil.which('g++') is None, reason='needs g++')
SOURCE = """
#include <string>
static int secret = VALUE;
int answer(int x) { return x * secret + FACTOR; }
std::string name() { return "NAME"; }
"""


def compiled(folder, name, *flags, value=3, factor=7, text='a name'):
    """Compile the source, in a folder of the same name so that only what is asked for differs."""
    source = SOURCE.replace('VALUE', str(value)).replace('FACTOR', str(factor))
    (folder / 'one.cpp').write_text(source.replace('NAME', text))
    target = folder / f'{name}.o'
    subprocess.run(
        ['g++', '-O1', *flags, '-c', 'one.cpp', '-o', str(target)], cwd=folder, check=True
    )
    return target


@needs_gcc
def test_debugging_data_alone_is_no_difference(tmp_path):
    plain, fast = compiled(tmp_path, 'plain', '-g'), compiled(tmp_path, 'fast', '-g0')
    assert plain.read_bytes() != fast.read_bytes()
    assert compare(plain, fast) == []
    assert {'.text', '.eh_frame'} <= set(sections(plain))


@needs_gcc
def test_other_code_and_other_data_are_told_apart(tmp_path):
    plain = compiled(tmp_path, 'plain')
    assert '.text' in compare(plain, compiled(tmp_path, 'code', factor=8))
    other = compare(plain, compiled(tmp_path, 'data', text='b name'))
    assert other and all(name != '.eh_frame' for name in other)


# Calls the compiler as torch's build does.
SETUP = """
import os, subprocess, sys
compiler = os.environ['CXX']
version = subprocess.run([compiler, '-dumpversion'], capture_output=True, text=True, check=True)
assert version.stdout.strip().split('.')[0].isdigit()
assert os.environ['MMCV_WITH_OPS'] == '1'
os.makedirs('out')
for name in ('nms', 'roi align'):
    subprocess.run([compiler, '-DX="y z"', '-c', f'{name}.cpp', '-o', f'out/{name}.o'], check=True)
    assert os.path.exists(f'out/{name}.o')
subprocess.run([compiler, '-shared', 'out/nms.o', '-o', 'out/all.so'], check=True)
"""


@needs_gcc
def test_the_commands_of_a_build_are_recorded_and_not_run(tmp_path):
    source, place = tmp_path / 'source', tmp_path / 'a place'
    source.mkdir()
    place.mkdir()
    (source / 'setup.py').write_text(SETUP)
    calls = recorded_commands(source, place)
    assert [arguments[2] for _, arguments in calls] == ['nms.cpp', 'roi align.cpp']
    assert calls[1][0] == str(source)
    assert calls[1][1] == ['-DX="y z"', '-c', 'roi align.cpp', '-o', 'out/roi align.o']


def test_a_build_that_fails_is_reported(tmp_path):
    (tmp_path / 'setup.py').write_text('raise SystemExit("no torch here")')
    with pytest.raises(RuntimeError, match='called no compiler: no torch here'):
        recorded_commands(tmp_path, tmp_path)
