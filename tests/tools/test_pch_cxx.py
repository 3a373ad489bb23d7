"""The compiler wrapper tools/pch_cxx.sh, with a stub compiler and with g++ on a stand-in for torch's header."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

WRAPPER = Path(__file__).resolve().parents[2] / 'tools' / 'pch_cxx.sh'
# Writes its arguments into a file of its own, one per line, and makes the file after -o.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$CALLS/$(date +%s%N).$$"
{before}
while (($#)); do
    [[ "$1" != -o ]] || : >"$2"
    shift
done
"""
HEADER = """#pragma once
#include <vector>
namespace torch { inline int total(const std::vector<int>& v) { int s = 0; for (int x : v) s += x; return s; } }
"""
PROGRAM = (
    '#include <torch/types.h>\nint answer(int x) { return torch::total({x, 40, GREETING[0]}); }\n'
)
needs_gcc = pytest.mark.skipif(shutil.which('g++') is None, reason='needs g++')


@pytest.fixture
def place(tmp_path):
    """A folder whose name has a space, with a source and a stand-in for torch's header."""
    folder = tmp_path / 'a folder'
    (folder / 'include' / 'torch').mkdir(parents=True)
    (folder / 'include' / 'torch' / 'types.h').write_text(HEADER)
    (folder / 'header').mkdir()
    (folder / 'calls').mkdir()
    (folder / 'one.cpp').write_text(PROGRAM)
    return folder


def call(place, *arguments, **env):
    """Call the wrapper in the folder."""
    settings = {'SASA_PCH_DIR': str(place / 'header'), 'CALLS': str(place / 'calls'), **env}
    return subprocess.run(
        [str(WRAPPER), *map(str, arguments)],
        cwd=place, env={**os.environ, **settings}, capture_output=True, text=True,
    )  # fmt: skip


def stub(place, before=''):
    """Write a compiler that records its calls; return its path."""
    path = place / 'stub compiler'
    path.write_text(STUB.replace('{before}', before))
    path.chmod(0o755)
    return str(path)


def calls(place):
    """The arguments of each call of the stub, the first call first."""
    return [path.read_text().splitlines() for path in sorted((place / 'calls').iterdir())]


def made(calls):
    """The calls that made a header."""
    return [arguments for arguments in calls if 'c++-header' in arguments]


def compile_arguments(name='one', source='one.cpp'):
    """What ninja passes for one file of an extension."""
    flags = ['-MMD', '-MF', f'{name}.o.d', '-g', '-O2', '-Iinclude', "-DGREETING='h i'"]
    return [*flags, '-c', source, '-o', f'{name}.o', '-std=c++17']


def test_the_header_is_made_once_for_two_files(place):
    compiler = stub(place)
    for name in ('one', 'two'):
        done = call(place, *compile_arguments(name), SASA_REAL_CXX=compiler)
        assert done.returncode == 0, done.stderr
    first, one, two = calls(place)
    (header,) = (place / 'header').glob('*/torch_types.h.gch')
    text = header.with_suffix('')
    assert text.read_text() == '#include <torch/types.h>\n'
    # All that may change the code, and nothing that names the file.
    assert first == [
        '-g', '-O2', '-Iinclude', "-DGREETING='h i'", '-std=c++17', '-g0', '-w', '-Wfatal-errors',
        '-x', 'c++-header', str(text), '-o', str(header.with_name('half')),
    ]  # fmt: skip
    for name, arguments in (('one', one), ('two', two)):
        assert arguments == [*compile_arguments(name), '-g0', '-include', str(text)]


def test_other_flags_get_a_header_of_their_own(place):
    compiler = stub(place)
    for flags in ((), ('-DMORE',)):
        assert call(place, *compile_arguments(), *flags, SASA_REAL_CXX=compiler).returncode == 0
    assert len(made(calls(place))) == 2


def test_parallel_calls_make_the_header_once(place):
    compiler = stub(place, before='[[ " $* " != *" c++-header "* ]] || sleep 0.5')
    with ThreadPoolExecutor(6) as pool:
        done = [
            pool.submit(call, place, *compile_arguments(f'f{i}'), SASA_REAL_CXX=compiler)
            for i in range(6)
        ]
    assert [each.result().returncode for each in done] == [0] * 6
    assert len(made(calls(place))) == 1
    compiled = [arguments for arguments in calls(place) if '-c' in arguments]
    assert len(compiled) == 6 and all('-include' in arguments for arguments in compiled)


@pytest.mark.parametrize(
    'arguments',
    [
        ['-dumpfullversion', '-dumpversion'],
        ['-shared', 'one.o', '-o', 'all of it.so', '-L/some where'],
        ['-E', 'one.cpp'],
        ['-c', 'one.cu', '-o', 'one.o'],
        ['-DX= -c ', 'one.cpp'],
    ],
)
def test_what_compiles_no_cpp_file_is_passed_on_as_it_is(place, arguments):
    assert call(place, *arguments, SASA_REAL_CXX=stub(place)).returncode == 0
    assert calls(place) == [arguments]
    assert not list((place / 'header').iterdir())


def test_without_flock_or_a_folder_files_are_compiled_as_usual(place):
    tools = place / 'tools'
    tools.mkdir()
    for name in ('bash', 'date', 'env'):
        (tools / name).symlink_to(shutil.which(name))
    for settings in ({'PATH': str(tools)}, {'SASA_PCH_DIR': ''}):
        done = call(place, *compile_arguments(), SASA_REAL_CXX=stub(place), **settings)
        assert (done.returncode, done.stderr) == (0, '')
    assert calls(place) == [[*compile_arguments(), '-g0']] * 2


def test_a_binding_to_python_is_compiled_as_usual(place):
    """Its headers come in an order that changes its code."""
    arguments = compile_arguments('pybind', 'csrc/pytorch/pybind.cpp')
    assert call(place, *arguments, SASA_REAL_CXX=stub(place)).returncode == 0
    assert calls(place) == [[*arguments, '-g0']]


def test_a_header_that_does_not_compile_is_tried_once(place):
    compiler = stub(place, before='[[ " $* " != *" c++-header "* ]] || exit 1')
    first, second = (
        call(place, *compile_arguments(name), SASA_REAL_CXX=compiler) for name in ('one', 'two')
    )
    assert (first.returncode, second.returncode) == (0, 0)
    assert 'torch/types.h cannot be precompiled' in first.stderr
    assert second.stderr == ''
    assert calls(place)[1:] == [[*compile_arguments(name), '-g0'] for name in ('one', 'two')]


def test_the_compilers_error_is_the_wrappers(place):
    compiler = stub(place, before='[[ " $* " == *" c++-header "* ]] || { echo bad >&2; exit 3; }')
    done = call(place, *compile_arguments(), SASA_REAL_CXX=compiler)
    assert (done.returncode, done.stderr) == (3, 'bad\n')


def code(path):
    """The object's bytes without symbols of the file and debugging data."""
    stripped = path.with_suffix('.stripped')
    subprocess.run(['strip', '--strip-all', '-o', stripped, path], check=True)
    return stripped.read_bytes()


@needs_gcc
def test_gcc_makes_the_same_code_and_reads_the_header(place):
    plain = [*compile_arguments('plain'), '-DGREETING="h i"']
    subprocess.run(['g++', *plain], cwd=place, check=True, capture_output=True)
    # -H lists the headers that gcc reads, a precompiled one with an exclamation mark.
    done = call(place, *compile_arguments('fast'), '-DGREETING="h i"', '-H')
    assert done.returncode == 0, done.stderr
    assert any(line.startswith('! ') and line.endswith('.gch') for line in done.stderr.splitlines())
    assert code(place / 'fast.o') == code(place / 'plain.o')
    assert b'.debug_info' in (place / 'plain.o').read_bytes()
    assert b'.debug_info' not in (place / 'fast.o').read_bytes()


@needs_gcc
def test_gcc_compiles_without_the_header_that_it_cannot_compile(place):
    (place / 'include' / 'torch' / 'types.h').write_text('#error not for this standard\n')
    (place / 'one.cpp').write_text('int answer() { return 42; }\n')
    done = call(place, *compile_arguments())
    assert done.returncode == 0, done.stderr
    assert 'torch/types.h cannot be precompiled' in done.stderr
    assert (place / 'one.o').is_file()
