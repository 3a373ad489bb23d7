"""The number of compilers, and mends of mmcv's source, with made-up machines and a made-up sdist."""

import hashlib
import io
import os
import tarfile

import pytest

from sasa_det.environment import stack
from sasa_det.environment.mmcv_build import (
    MENDS,
    BuildError,
    available_cores,
    available_memory,
    job_count,
    main,
    mend,
    unpack_source,
)

MEMINFO = 'MemTotal: 9000000 kB\nMemAvailable: 4000000 kB\nSwapFree: 1000000 kB\n'
# As in mmcv 2.1.0: with Python 3.13 it fails for lack of the version, with torch 2.14 for C++17.
SETUP = """
import platform
def get_version():
    version_file = 'mmcv/version.py'
    with open(version_file, encoding='utf-8') as f:
        exec(compile(f.read(), version_file, 'exec'))
    return locals()['__version__']
def get_extensions():
    extra_compile_args = {'cxx': [], 'nvcc': []}
    for _ in range(1):
        if platform.system() != 'Windows':
            extra_compile_args['cxx'] = ['-std=c++17']
        else:
            extra_compile_args['cxx'] = ['/std:c++17']
    extra_compile_args['nvcc'] += ['-std=c++17']
    return extra_compile_args
"""


def write(root, files):
    """Write the files of a made-up machine."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ('files', 'expected'),
    [
        ({}, 5_000_000 * 1024),
        # The limit is that of a group above, the first file says that there is none.
        (
            {
                'proc/self/cgroup': '0::/a/b\n',
                'sys/fs/cgroup/a/b/memory.max': 'max\n',
                'sys/fs/cgroup/a/memory.max': '1000000000\n',
            },
            10**9,
        ),
        (
            {
                'proc/self/cgroup': '5:cpu,cpuacct:/x\n4:memory:/not/here\n',
                'sys/fs/cgroup/memory/memory.limit_in_bytes': '3000000000\n',
            },
            3 * 10**9,
        ),
        ({'proc/self/cgroup': '0::/\n', 'sys/fs/cgroup/memory.max': '9999999999999\n'}, 5_120_000_000),
    ],
)  # fmt: skip
def test_memory_is_what_is_free_within_the_limit(tmp_path, files, expected):
    assert available_memory(write(tmp_path, {'proc/meminfo': MEMINFO, **files})) == expected


@pytest.mark.parametrize(
    ('files', 'expected'),
    [
        ({}, 8),
        ({'proc/self/cgroup': '0::/\n', 'sys/fs/cgroup/cpu.max': 'max 100000\n'}, 8),
        ({'proc/self/cgroup': '0::/\n', 'sys/fs/cgroup/cpu.max': '250000 100000\n'}, 3),
        ({'proc/self/cgroup': '1:cpu,cpuacct:/\n', 'sys/fs/cgroup/cpu/cpu.cfs_quota_us': '50000\n'}, 1),
        ({'proc/self/cgroup': '1:cpu:/\n', 'sys/fs/cgroup/cpu/cpu.cfs_quota_us': '-1\n'}, 8),
    ],
)  # fmt: skip
def test_cores_are_those_of_the_affinity_within_the_quota(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: set(range(8)))
    assert available_cores(write(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ('memory', 'cores', 'expected'), [(2.2, 8, 1), (3.3, 8, 2), (5, 2, 2), (64, 16, 16)]
)
def test_jobs_fit_into_memory_and_cores(memory, cores, expected):
    assert job_count(int(memory * 1e9), cores) == expected


def test_too_little_memory_is_refused_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr('sasa_det.environment.mmcv_build.available_memory', lambda: 10**9)
    assert main(['jobs']) == 1
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err.startswith('1.0 GB of memory are available, and the build of mmcv needs 2.2')
    assert printed.err.count('\n') == 1 and 'MAX_JOBS=1' in printed.err


def test_mended_source_reads_its_version_and_leaves_the_standard_to_torch(tmp_path, monkeypatch):
    source = write(tmp_path, {'setup.py': SETUP, 'mmcv/version.py': "__version__ = '2.1.0'\n"})
    lines = mend(source)
    assert len(lines) == len(MENDS)
    assert 'locals() of Python 3.13' in lines[0] and 'torch 2.14 refuses C++17' in lines[1]
    monkeypatch.chdir(source)
    scope = {}
    exec((source / 'setup.py').read_text(), scope)
    assert scope['get_version']() == '2.1.0'
    assert scope['get_extensions']() == {'cxx': [], 'nvcc': []}


def test_other_source_is_not_edited(tmp_path):
    text = SETUP.replace("return locals()['__version__']", 'return None')
    source = write(tmp_path, {'setup.py': text})
    with pytest.raises(BuildError, match='is not that of mmcv 2.1.0'):
        mend(source)
    assert (source / 'setup.py').read_text() == text


@pytest.fixture
def sdist(tmp_path, monkeypatch):
    """An index with one sdist, whose setup.py fails as that of mmcv does; the sdist's checksum."""
    index = tmp_path / 'an index'
    index.mkdir()
    path = index / 'mmcv-2.1.0.tar.gz'
    with tarfile.open(path, 'w:gz') as archive:
        for name, text in {'setup.py': "raise KeyError('__version__')\n", 'PKG-INFO': ''}.items():
            member = tarfile.TarInfo(f'mmcv-2.1.0/{name}')
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', index.as_uri())
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_source_is_unpacked_although_its_setup_fails(tmp_path, sdist):
    unpack_source(tmp_path / 'the source', sdist)
    assert 'KeyError' in (tmp_path / 'the source' / 'setup.py').read_text()


def test_a_sdist_with_another_checksum_is_refused(tmp_path, sdist, capsys):
    assert main(['source', str(tmp_path / 'source')]) == 1
    assert 'pip found no sdist of mmcv==2.1.0 with the checksum sha256:' in capsys.readouterr().err
    assert not (tmp_path / 'source').exists()


def test_a_folder_that_exists_is_left_alone(tmp_path):
    with pytest.raises(BuildError, match='exists; name a folder that does not'):
        unpack_source(tmp_path)


@pytest.mark.parametrize(
    ('python', 'torch', 'said'),
    [
        ((3, 12, 1), '2.13.0+cpu', []),
        ((3, 13, 0), None, ['mmcv builds with python <3.13, and here is 3.13.0']),
        ((3, 11, 7), '2.14.1', ['mmcv builds with torch <2.14, and here is 2.14.1']),
    ],
)
def test_what_mmcv_does_not_build_with_is_known(monkeypatch, capsys, python, torch, said):
    monkeypatch.setattr(stack.sys, 'version_info', python)
    monkeypatch.setattr(stack, 'installed_version', lambda name: torch)
    assert main(['obstacles']) == 0
    assert capsys.readouterr().out.splitlines() == said
    # The doctor's command to install mmcv mends it, too.
    command = stack.mend_command('mmcv')
    assert ('mmcv_build source ./mmcv-mended && ' in command) is bool(said)
    assert command.endswith('./mmcv-mended' if said else 'mmcv==2.1.0')
