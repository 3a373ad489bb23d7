"""What pyproject.toml cannot express: dependencies, C++ kernels, startup files, a reproducible sdist.

The dependencies are read from the file that also checks them. The kernels are built if torch and a compiler
are available, else left out. They are a shared library for one minor version of torch and any Python;
tools/build_wheel.sh puts several into one wheel. Python reads the startup files beside the package, through
which mmengine resolves ``_base_ = 'sasa_det::...'``: see _sasa_det_startup.py.
"""

import glob
import gzip
import os
import runpy
import sys
import sysconfig
import tarfile

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

try:
    # Missing if pip isolates the build: then sasa_det computes in plain PyTorch.
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    BuildExtension = None

# Python 3.15 and later read the second and ignore the first.
STARTUP = ['sasa_det.pth', 'sasa_det.start']
# Python's own flags may ask for debugging data, which takes time. CFLAGS, if set, decides about it.
OPTIMISED = ['-O3', *([] if 'CFLAGS' in os.environ else ['-g0'])]


class BuildWithStartup(build_py):
    """Build the package and put the startup files beside it."""

    def run(self):
        """Build; an editable install skips this folder and gets the files as data."""
        super().run()
        if not self.editable_mode:
            for name in STARTUP:
                self.copy_file(name, os.path.join(self.build_lib, name))


class ReproducibleSdist(sdist):
    """Pack the same files into the same bytes, at any time and by any user."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        """Write the .tar.gz with one timestamp, SOURCE_DATE_EPOCH or the first day of 1980, and no owner."""
        if format != 'gztar':
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        # The earliest timestamp of a zip.
        time = int(os.environ.get('SOURCE_DATE_EPOCH', 315532800))

        def without_circumstances(member):
            member.mtime, member.uid, member.gid, member.uname, member.gname = time, 0, 0, '', ''
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        files = [os.path.join(at, name) for at, _, names in os.walk(base_dir) for name in names]
        path = f'{base_name}.tar.gz'
        self.mkpath(os.path.dirname(path) or '.')
        with (
            open(path, 'wb') as file,
            gzip.GzipFile('', 'wb', fileobj=file, mtime=time) as zipped,
            tarfile.open(mode='w', fileobj=zipped, dereference=True) as archive,
        ):
            for name in sorted(files):
                archive.add(name, filter=without_circumstances)
        return path


class AnyPythonWheel(bdist_wheel):
    """A wheel for every Python of one platform: the kernels use nothing of Python's own interface."""

    def get_tag(self):
        """Take only the platform from the usual tag."""
        return 'py3', 'none', super().get_tag()[2]


class DistributionWithData(Distribution):
    """Provide has_data_files under the name that setuptools' editable installs call."""

    has_data = Distribution.has_data_files


def native_kernels():
    """Return the C++ kernels for setup(), and the command that builds them or reports the failure."""
    if BuildExtension is None:
        # Only `pip install -v` shows it.
        print(
            'sasa_det: torch is not here to build the C++ kernels with, plain PyTorch is used; '
            'with torch installed, pip install --no-build-isolation builds them'
        )
        return [], {}

    class BuildOrSayWhyNot(BuildExtension):
        """Build the kernels, or go on without them."""

        def run(self):
            """Build, and print the error if it fails."""
            try:
                super().run()
            except Exception as error:  # a compiler may fail in any way; eager needs none
                self.extensions = []
                print(f'sasa_det: the C++ kernels were not built, eager is used: {error}')

        def get_ext_filename(self, name):
            """Leave Python's version out: native_library.py and onnx_library.py look for these names."""
            *folders, last = name.split('.')
            if last == '_native':
                last = file_name(torch.__version__, torch.compiled_with_cxx11_abi())
            else:
                last += '.so'
            return os.path.join(*folders, last)

    file_name = runpy.run_path(os.path.join('sasa_det', 'ops', 'native_library.py'))['file_name']
    kernels = CppExtension(
        'sasa_det.ops._native',
        sorted(glob.glob('sasa_det/ops/csrc/*.cpp')),
        # OpenMP is for ATen's parallel_for. It is not linked: torch loads the runtime of its own
        # threads, and a second runtime would start as many again.
        extra_compile_args=[*OPTIMISED, *(['-fopenmp'] if sys.platform == 'linux' else [])],
        depends=glob.glob('sasa_det/ops/csrc/*.h'),
    )
    # Not libtorch_python, which is for one version of Python.
    kernels.libraries = ['c10', 'torch_cpu']
    return [kernels, onnx_library()], {'build_ext': BuildOrSayWhyNot}


def onnx_library():
    """Return the library that gives onnxruntime the operator: the same kernels, without torch."""
    return Extension(
        'sasa_det.export.libsasa_det_onnx',
        sorted(glob.glob('sasa_det/export/csrc/*.cpp')),
        language='c++',
        # All names but one stay its own: the process may have the same kernels from torch's library.
        extra_compile_args=['-std=c++17', '-fvisibility=hidden', *OPTIMISED],
        depends=glob.glob('sasa_det/export/csrc/*.h') + glob.glob('sasa_det/ops/csrc/*.*'),
        optional=True,  # if it fails, the other kernels are built all the same
    )


data_files = []
if 'editable_wheel' in sys.argv:
    site_packages = os.path.relpath(sysconfig.get_path('purelib'), sysconfig.get_path('data'))
    data_files = [(site_packages, STARTUP)]

# Run, not imported: that would import the package.
stack = runpy.run_path(os.path.join('sasa_det', 'environment', 'stack.py'))
bounds = {**stack['COMMON'], **stack['OPENMMLAB']}

extensions, commands = native_kernels()
setup(
    # rich for progress bars and tables; mmengine needs it too.
    install_requires=[*(name + bound for name, bound in bounds.items()), 'rich'],
    # A plain path to the checkout. setuptools' default finder runs after Python's own. In the parent
    # folder of a checkout named sasa_det, Python's would take the checkout for an empty namespace package.
    options={'editable_wheel': {'mode': 'compat'}},
    distclass=DistributionWithData,
    cmdclass={
        'bdist_wheel': AnyPythonWheel,
        'build_py': BuildWithStartup,
        'sdist': ReproducibleSdist,
        **commands,
    },
    ext_modules=extensions,
    data_files=data_files,
)
