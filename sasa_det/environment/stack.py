"""Which versions of its dependencies sasa_det supports, and whether the installed ones are among them.

The check must work where any of them is missing or broken, so it imports only the standard library.
"""

import re
import sys
import warnings
from importlib import import_module, metadata
from typing import Dict, List, NamedTuple, Optional, Sequence

# Accepted versions by distribution; setup.py and tools/setup_env.sh read them here.
COMMON = {
    # The operator registers fake kernels with torch.library, which 2.1 lacks.
    'torch': '>=2.2',
    'numpy': '>=1.22',
    # Needed at run time too: mmengine resolves `_base_ = 'mmdet::...'` by pkg_resources, which 81 dropped.
    'setuptools': '<81',
}
OPENMMLAB = {
    # The checkpoint types that are allowed are those of 0.10.
    'mmengine': '>=0.10.7,<0.11',
    # mmdet refuses 2.2.0 and later; below 2.1.0 no source builds against today's torch.
    'mmcv': '>=2.1.0,<2.2',
    # The components subclass its classes, and the tests compare with it weight for weight.
    'mmdet': '==3.3.0',
}
# The maintained fork, with the same import names.
ONEDL = {'onedl-mmengine': '==0.10.12', 'onedl-mmcv': '==2.3.6', 'onedl-mmdetection': '==3.5.1'}

MINIMUM_PYTHON = (3, 10)
# What mmcv's source builds with as it is; beyond, mmcv_build.py mends it. The fork's needs no mends.
MMCV_BUILDS_WITH = {'python': '<3.13', 'torch': '<2.14'}
# The torch that the set-up installs by default.
DEFAULT_TORCH = '2.13.0'
_IMPORTS = {
    'torch': 'torch',
    'numpy': 'numpy',
    'setuptools': 'pkg_resources',
    'opencv-python': 'cv2',
    'mmengine': 'mmengine',
    'mmcv': 'mmcv.ops',
    'mmdet': 'mmdet.models',
    'onedl-mmengine': 'mmengine',
    'onedl-mmcv': 'mmcv.ops',
    'onedl-mmdetection': 'mmdet.models',
}


class Problem(NamedTuple):
    """One problem of the installed stack.

    Attributes:
        name: The distribution.
        found: The version found.
        accepted: The accepted versions.
        mend: The command that fixes it.
    """

    name: str
    found: str
    accepted: str
    mend: str

    def __str__(self) -> str:
        """Write the problem as one line, and the command below it."""
        return (
            f'{self.name}: found {self.found}; accepted is {self.accepted}. '
            f'Mend it with\n    {self.mend}'
        )


def is_fork() -> bool:
    """Say whether the fork is installed rather than OpenMMLab's packages.

    Examples:
        >>> is_fork() in (True, False)
        True
    """
    return installed_version('mmdet') is None and any(map(installed_version, ONEDL))


def supported() -> Dict[str, str]:
    """Choose the family of packages to check: OpenMMLab's, or the fork if that is installed.

    Returns:
        Accepted versions by distribution.

    Examples:
        >>> supported()['torch']
        '>=2.2'
    """
    return {**COMMON, **(ONEDL if is_fork() else OPENMMLAB)}


def installed_version(distribution: str) -> Optional[str]:
    """Read a distribution's version from its metadata, without importing it.

    Args:
        distribution: The name that pip knows it by.

    Returns:
        The version, None if it is not installed.

    Examples:
        >>> installed_version('no-such-distribution') is None
        True
    """
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def accepts(specifier: str, version: str) -> bool:
    """Say whether a specifier accepts a version; only the release's numbers count.

    Args:
        specifier: Comma-separated bounds of the kinds ``>=``, ``<`` and ``==``.
        version: A version as pip writes it; the part after a ``+`` is its build.

    Examples:
        >>> accepts('>=2.2', '2.13.0+cpu'), accepts('<81', '81.0.0'), accepts('==3.3.0', '3.3')
        (True, False, True)
    """
    number = _numbers(version)
    for bound in specifier.split(','):
        kind, limit = re.fullmatch(r'(>=|<|==)([\d.]+)', bound).groups()
        limit = _numbers(limit)
        if not {'>=': number >= limit, '<': number < limit, '==': number == limit}[kind]:
            return False
    return True


def find_problems(imports: bool = False) -> List[Problem]:
    """Compare the installed versions with the supported ones.

    Args:
        imports: Also import each package in this process, which takes seconds. This finds binaries
            built for another version, such as mmcv's ops.

    Returns:
        One entry per package with a problem; empty if there is none.

    Examples:
        >>> find_problems()
        []
    """
    problems = []
    if sys.version_info < MINIMUM_PYTHON:
        problems.append(
            Problem(
                'python',
                '.'.join(map(str, sys.version_info[:3])),
                '>=' + '.'.join(map(str, MINIMUM_PYTHON)),
                'python3.11 -m venv .venv && source .venv/bin/activate',
            )
        )
    family = supported()
    for name, specifier in family.items():
        version = installed_version(name)
        if version is None:
            lite = name == 'mmcv' and installed_version('mmcv-lite')
            found = 'mmcv-lite, which has no ops' if lite else 'nothing'
            problems.append(Problem(name, found, specifier, mend_command(name)))
        elif not accepts(specifier, version):
            problems.append(Problem(name, version, specifier, mend_command(name)))
    if imports:
        wrong = {problem.name for problem in problems}
        for name in ('numpy', 'torch', 'opencv-python', *family):
            # A package with a problem, and those that import it, need not be tried.
            if name not in wrong:
                problem = _import_problem(name, family.get(name, 'one that imports'))
                if problem is not None:
                    problems.append(problem)
                    wrong.add(name)
    return problems


def require_stack() -> None:
    """Raise if a package has a version that is not supported; reads metadata only.

    Raises:
        ImportError: Names each package, the version found, the accepted ones and the command that
            fixes it.

    Examples:
        >>> require_stack()
    """
    problems = find_problems()
    if problems:
        raise ImportError(describe(problems))


def describe(problems: Sequence[Problem]) -> str:
    """Describe the problems and their fixes, in some lines.

    Args:
        problems: The result of :func:`find_problems`.
    """
    return (
        'sasa_det cannot be used with what is installed.\n'
        + '\n'.join(map(str, problems))
        + '\n`sasa-det doctor` shows the whole picture.'
    )


def mend_command(name: str, rebuild: bool = False) -> str:
    """Give the command that installs a supported version of a distribution.

    Args:
        name: The distribution.
        rebuild: Replace an installed package of the right version that fails to import.

    Examples:
        >>> mend_command('setuptools').endswith("-m pip install 'setuptools<81'")
        True
    """
    pip = f'{sys.executable} -m pip'
    if name in ('mmcv', 'onedl-mmcv'):
        # The wheel in pip's cache may be the one that fails to import.
        forget = f'{pip} cache remove {name}; ' if rebuild else ''
        force = f'--force-reinstall --no-deps --no-binary {name} ' if rebuild else ''
        source, unpack = pin(name), ''
        if name == 'mmcv' and mmcv_obstacles():
            source = './mmcv-mended'
            unpack = f'{sys.executable} -m sasa_det.environment.mmcv_build source {source} && '
        return (
            f"{forget}{pip} install 'setuptools<81' wheel ninja && {unpack}"
            f'MMCV_WITH_OPS=1 {pip} install --no-build-isolation {force}{source}'
        )
    if name == 'opencv-python':
        # The same module without GUI, so without the graphics libraries that a server lacks.
        return f'{pip} uninstall -y opencv-python && {pip} install opencv-python-headless'
    if name == 'torchvision':
        # torch 2.x came with torchvision 0.(x + 15). Without --no-deps pip might change torch.
        minor = _numbers(installed_version('torch'))[1]
        return f"{pip} install --no-deps 'torchvision==0.{minor + 15}.*'"
    specifier = {**COMMON, **OPENMMLAB, **ONEDL}[name]
    force = '--force-reinstall ' if rebuild else ''
    return f"{pip} install {force}'{name}{specifier}'"


def mmcv_obstacles() -> List[str]:
    """Say why mmcv's source must be mended before it builds with this Python and this torch.

    Returns:
        A sentence per reason; empty if it builds as it is.

    Examples:
        >>> isinstance(mmcv_obstacles(), list)
        True
    """
    versions = {
        'python': '.'.join(map(str, sys.version_info[:3])),
        'torch': installed_version('torch'),
    }
    return [
        f'mmcv builds with {name} {bound}, and here is {versions[name]}'
        for name, bound in MMCV_BUILDS_WITH.items()
        if versions[name] is not None and not accepts(bound, versions[name])
    ]


def pin(name: str) -> str:
    """Give the one version of a distribution that the set-up installs, as pip takes it.

    Args:
        name: The distribution.

    Examples:
        >>> pin('mmcv')
        'mmcv==2.1.0'
    """
    if name == 'torch':
        return f'torch=={DEFAULT_TORCH}'
    bound = {**COMMON, **OPENMMLAB, **ONEDL}[name]
    return f'{name}=={re.match(r"[>=]=([0-9.]+)", bound).group(1)}'


def refuse_torch(torch: str) -> Optional[str]:
    """Say why a torch that a user asks for cannot be used; a range is left to pip.

    Args:
        torch: pip's requirement, with pip's options if any.

    Returns:
        One sentence, None if there is no objection.

    Examples:
        >>> refuse_torch('torch==2.5.1 --index-url https://download.pytorch.org/whl/cu124')
        >>> refuse_torch('torch==2.1.0')
        'torch==2.1.0 is not supported; accepted is torch>=2.2.'
    """
    if not re.search(r'\btorch\b', torch):
        return f'{torch!r} is no requirement of torch for pip; write, for example, torch=={DEFAULT_TORCH}.'
    pinned = re.search(r'\btorch==(\d+(\.\d+)*)', torch)
    if pinned and not accepts(COMMON['torch'], pinned[1]):
        return f'torch=={pinned[1]} is not supported; accepted is torch{COMMON["torch"]}.'
    return None


def _numbers(version: str) -> tuple:
    """The release's numbers, at least three, for comparison."""
    numbers = [int(part) for part in re.match(r'\d+(\.\d+)*', version).group().split('.')]
    return tuple(numbers + [0] * (3 - len(numbers)))


def _import_problem(name: str, specifier: str) -> Optional[Problem]:
    """Import a distribution's module; return the problem if that fails."""
    module = _IMPORTS[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            imported = import_module(module)
            if name == 'torch':
                # Fails if torch was built for another major version of numpy.
                imported.zeros(1).numpy()
    except Exception as error:  # a broken package may raise anything, and the user must see it
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        version = installed_version(name)
        found = f'{version or "nothing"}, but `import {module}` fails: {reason}'
        mend = mend_command(name, rebuild=version is not None)
        if name == 'torch' and 'numpy' in reason.lower():
            mend = f"{sys.executable} -m pip install 'numpy<2'"
        return Problem(name, found, specifier, mend)
    return None


if (
    __name__ == '__main__'
):  # for tools/setup_env.sh, which runs this file before anything is installed
    if sys.argv[1] == 'check':
        sys.exit(refuse_torch(sys.argv[2]))
    print(*map(pin, sys.argv[1:]), sep='\n')
