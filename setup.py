"""What pyproject.toml cannot say: dependencies, C++ kernels, startup files, an sdist of the same bytes.

The dependencies are read where they are checked as well. The kernels are built where torch and a compiler are
there, and left out otherwise. Python reads the startup files, which lie beside the package; with them mmengine
resolves ``_base_ = 'sasa_det::...'``: see _sasa_det_startup.py.
"""

import glob
import gzip
import os
import runpy
import sys
import sysconfig
import tarfile

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

try:
    # Not there where pip isolates the build: then sasa_det computes in plain PyTorch.
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    BuildExtension = None

# Python 3.15 and later read the second and leave the first alone.
STARTUP = ['sasa_det.pth', 'sasa_det.start']


class BuildWithStartup(build_py):
    """Build the package and put the startup files beside it."""

    def run(self):
        """Build; an editable install takes nothing from there and gets the files as data."""
        super().run()
        if not self.editable_mode:
            for name in STARTUP:
                self.copy_file(name, os.path.join(self.build_lib, name))


class ReproducibleSdist(sdist):
    """Pack the same files into the same bytes, whenever and by whomever."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        """Write the .tar.gz with one time, SOURCE_DATE_EPOCH or 1980's first day, and no owner."""
        if format != 'gztar':
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        # The earliest that a zip can hold.
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


class DistributionWithData(Distribution):
    """Answers the question under the name that setuptools' editable installs ask it by."""

    has_data = Distribution.has_data_files


def native_kernels():
    """Give setup() the C++ kernels, and the command that builds them or says why it could not."""
    if BuildExtension is None:
        return [], {}

    class BuildOrSayWhyNot(BuildExtension):
        """Build the kernels, or go on without them."""

        def run(self):
            """Build, and say what went wrong if something did."""
            try:
                super().run()
            except Exception as error:  # whatever a compiler may lack; eager does without it
                self.extensions = []
                print(f'sasa_det: the C++ kernels were not built, eager is used: {error}')

    kernels = CppExtension(
        'sasa_det.ops._native',
        sorted(glob.glob('sasa_det/ops/csrc/*.cpp')),
        # OpenMP is for ATen's parallel_for. It is not linked: torch brings the runtime that its own
        # threads live in, and a second one would start as many again.
        extra_compile_args=['-O3', *(['-fopenmp'] if sys.platform == 'linux' else [])],
        depends=glob.glob('sasa_det/ops/csrc/*.h'),
    )
    return [kernels], {'build_ext': BuildOrSayWhyNot}


data_files = []
if 'editable_wheel' in sys.argv:
    site_packages = os.path.relpath(sysconfig.get_path('purelib'), sysconfig.get_path('data'))
    data_files = [(site_packages, STARTUP)]

# Run, not imported: that would import the package.
stack = runpy.run_path(os.path.join('sasa_det', 'environment', 'stack.py'))
bounds = {**stack['COMMON'], **stack['OPENMMLAB']}

extensions, commands = native_kernels()
setup(
    # rich for progress bars and tables; mmengine needs it as well.
    install_requires=[*(name + bound for name, bound in bounds.items()), 'rich'],
    # A plain path to the checkout. setuptools' default finder comes after Python's own: in the folder that
    # holds a checkout named sasa_det, that would take the checkout for an empty namespace package.
    options={'editable_wheel': {'mode': 'compat'}},
    distclass=DistributionWithData,
    cmdclass={'build_py': BuildWithStartup, 'sdist': ReproducibleSdist, **commands},
    ext_modules=extensions,
    data_files=data_files,
)
