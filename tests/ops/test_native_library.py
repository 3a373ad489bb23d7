"""Which file of kernels is loaded, where there is none, several, or one that does not fit."""

import ctypes.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sasa_det.ops import available_backends, native_library
from sasa_det.ops.native_library import file_name, load

ROOT = Path(__file__).resolve().parents[2]
HERE = file_name(torch.__version__, torch.compiled_with_cxx11_abi())
# Any shared library without our functions.
OTHER_LIBRARY = ctypes.util.find_library('m')
COMPUTE = """
import torch
from sasa_det.ops import available_backends, local_attention

print(available_backends()['native'])
x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
results = []
for backend in ('auto', 'reference'):
    y = local_attention(x, x, x, kernel_size=3, num_heads=2, backend=backend)
    results.append((y, *torch.autograd.grad(y.square().sum(), x)))
torch.testing.assert_close(*results)
"""


@pytest.mark.parametrize(
    ('version', 'cxx11_abi', 'expected'),
    [
        ('2.2.2+cu121', False, '_native.torch2.2-oldabi.so'),
        ('2.6.0', False, '_native.torch2.6-oldabi.so'),
        ('2.6.0+cpu', True, '_native.torch2.6.so'),
        ('2.13.0', True, '_native.torch2.13.so'),
        ('2.13.1a0+git123', True, '_native.torch2.13.so'),
    ],
)
def test_a_file_is_for_one_minor_version_and_one_abi(version, cxx11_abi, expected):
    assert file_name(version, cxx11_abi) == expected


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which files of kernels are looked for."""
    monkeypatch.setattr(native_library, '_FOLDER', tmp_path)
    return tmp_path


def load_anew():
    """Load as the first import does; the one of this process stays."""
    return native_library.load.__wrapped__()


def content(name):
    """The bytes of a shared library that the linker finds by this name."""
    ctypes.CDLL(name)
    maps = Path('/proc/self/maps').read_text().split()
    return next(Path(path) for path in maps if Path(path).name == name).read_bytes()


def test_without_kernels_eager_computes(tmp_path):
    ignore = shutil.ignore_patterns('*.so', '__pycache__', 'csrc')
    shutil.copytree(ROOT / 'sasa_det' / 'ops', tmp_path / 'sasa_det' / 'ops', ignore=ignore)
    (tmp_path / 'sasa_det' / '__init__.py').touch()
    shutil.copy(ROOT / '_sasa_det_startup.py', tmp_path)
    done = subprocess.run(
        [sys.executable, '-c', COMPUTE],
        cwd=tmp_path, env={**os.environ, 'PYTHONPATH': ''}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f'its C++ kernels are not built ({HERE} is missing)' in done.stdout
    assert 'pip install --no-deps --no-build-isolation path/to/sasa_det' in done.stdout


def test_kernels_for_another_torch_are_not_loaded(folder):
    """To load one might end the process."""
    for name in ('_native.torch1.13.so', '_native.torch2.99.so'):
        (folder / name).touch()
    library, why_not = load_anew()
    assert library is None
    assert 'for other versions of torch (_native.torch1.13.so, _native.torch2.99.so), ' in why_not
    assert f'but not for torch {torch.__version__} ({HERE})' in why_not


def test_a_file_that_does_not_load_is_named(folder):
    (folder / HERE).write_bytes(b'no library')
    library, why_not = load_anew()
    assert library is None
    assert 'its C++ kernels do not load: ' in why_not and HERE in why_not


@pytest.mark.skipif(OTHER_LIBRARY is None, reason='no other library was found')
def test_older_kernels_are_not_used(folder):
    (folder / HERE).write_bytes(content(OTHER_LIBRARY))
    library, why_not = load_anew()
    assert library is None
    assert 'its C++ kernels were built from older source (' in why_not
    assert 'sasa_largest_kernel' in why_not


@pytest.mark.skipif(available_backends()['native'] is not None, reason='no native kernels here')
def test_the_file_that_fits_is_taken():
    library, why_not = load()
    assert why_not is None and library.LARGEST_KERNEL == 127
    assert library.capability() in ('avx512', 'avx2', 'default')
