"""What the wheel holds, and that configs inherit from it where the checkout is out of reach."""

import fcntl
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from sasa_det import demo
from sasa_det.cli.openmmlab_tools import tool_path
from sasa_det.environment import stack
from sasa_det.ops.native_library import file_name
from sasa_det.version import __version__

ROOT = Path(__file__).resolve().parents[1]
# The file of kernels for this torch.
HERE = file_name(torch.__version__, torch.compiled_with_cxx11_abi())
CONFIG = 'quickstart/retinanet_sasa-tiny_digits.py'
# The smallest run that trains: one iteration of two images.
ONE_STEP = """
_base_ = 'sasa_det::{config}'
_data = dict(data_root={data!r}, indices=2)
_loader = dict(batch_size=2, num_workers=0, persistent_workers=False)
train_dataloader = dict(**_loader, dataset=_data)
val_dataloader = test_dataloader = val_cfg = test_cfg = val_evaluator = test_evaluator = None
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=1)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(_delete_=True, type='CheckpointHook'))
"""


def run(*command, cwd, pythonpath=None):
    """Run a command with nothing of the checkout on Python's path; return what it printed."""
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    if pythonpath is not None:
        env['PYTHONPATH'] = str(pythonpath)
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of the checkout: building leaves files beside the source."""
    folder = tmp_path_factory.mktemp('source') / 'checkout'
    left_out = {'.git', '.venv', '.venv-onedl', 'data', 'work_dirs', 'build', 'tests'}
    left_out |= {'.pytest_cache', '.ruff_cache', '.hypothesis'}  # written while other tests run

    def ignore(parent, names):
        return left_out.intersection(names) if Path(parent) == ROOT else {'__pycache__'}

    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignore)
    return folder


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    """The built wheel. Compiling takes a minute, so the first of pytest's processes builds it for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'wheel'
    folder.mkdir(exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / 'built').exists():
            pip = (sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps')
            run(*pip, '--no-build-isolation', '--wheel-dir', folder, source, cwd=folder)
            (folder / 'built').touch()
    (built,) = folder.glob('*.whl')
    return built


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """A folder with nothing but the wheel's content."""
    folder = tmp_path_factory.mktemp('installed')
    pip = (sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps')
    run(*pip, '--target', folder, wheel, cwd=folder)
    return folder


@pytest.fixture
def environment(tmp_path):
    """The Python of a new virtual environment that finds the stack of the one in use."""
    folder = tmp_path / 'environment'
    run(sys.executable, '-m', 'venv', '--without-pip', folder, cwd=tmp_path)
    base = {'base': str(folder), 'platbase': str(folder)}
    # Named in a file they are on the path, but what makes the checkout importable is not read.
    stack_file = Path(sysconfig.get_path('purelib', vars=base)) / 'stack.pth'
    # Python 3.12 has no distutils, which mmengine takes: setuptools brings it by a .pth file of its own.
    distutils = 'import _distutils_hack; _distutils_hack.add_shim()'
    stack_file.write_text('\n'.join([*site.getsitepackages(), distutils]) + '\n')
    return folder / 'bin' / 'python'


def install(python, *what, cwd):
    """Install into another environment, without what the package requires."""
    pip = (sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps')
    run(*pip, '--force-reinstall', '--no-build-isolation', *what, cwd=cwd)


def demo_files():
    """The files of `sasa-det demo`."""
    files = {str(path.relative_to(ROOT)) for path in (demo.CHECKPOINT, *demo.images())}
    assert len(files) == 4
    return files


def test_the_wheel_holds_every_module_and_config(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / 'sasa_det').rglob('*.py')}
    configs = {
        f'sasa_det/.mim/{path.relative_to(ROOT)}' for path in (ROOT / 'configs').rglob('*.py')
    }
    modules = {name for name in modules if '.mim' not in name}
    assert f'sasa_det/.mim/configs/{CONFIG}' in configs
    assert modules | configs <= held
    assert {'sasa_det/.mim/model-index.yml', 'sasa_det.pth', 'sasa_det.start'} <= held
    assert demo_files() <= held
    # The kernels make it a wheel of one platform, and of any Python.
    assert wheel.name.startswith(f'sasa_det-{__version__}-py3-none-linux_')
    (kernels,) = (name for name in held if name.startswith('sasa_det/ops/_native.'))
    assert Path(kernels).name == HERE
    if 'CFLAGS' not in os.environ:
        assert b'.debug_info' not in zipfile.ZipFile(wheel).read(kernels)
    assert 'sasa_det/export/libsasa_det_onnx.so' in held
    assert not [name for name in held if name.startswith(('tests', 'tools', 'configs'))]
    # The sources of the GPU's kernels are compiled where there is a GPU.
    assert 'sasa_det/ops/csrc/cuda/forward.cu' in held
    assert not [name for name in held if re.search('csrc/.*README', name)]


def check_wheel(*arguments):
    """Run the tool that installs a wheel without a compiler and compares its kernels with the reference."""
    return subprocess.run(
        [sys.executable, ROOT / 'tools/checks/wheel.py', *arguments], capture_output=True, text=True
    )


def test_the_wheels_kernels_compute_what_the_reference_does(wheel):
    done = check_wheel(wheel)
    assert done.returncode == 0, done.stderr
    assert f'torch {torch.__version__}: ' in done.stdout
    assert 'from the reference in float64' in done.stdout


def test_a_wheel_for_another_torch_says_so(wheel, tmp_path):
    """Its kernels have the name of another version; the check must not pass without them."""
    other = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(other, 'w') as new:
        for name in old.namelist():
            new.writestr(name.replace(HERE, '_native.torch2.99.so'), old.read(name))
    done = check_wheel(other)
    assert done.returncode == 1
    assert 'kernels for other versions of torch (_native.torch2.99.so)' in done.stderr


@pytest.mark.skipif(
    'SASA_WHEEL' not in os.environ, reason='SASA_WHEEL names no wheel of build_wheel.sh'
)
def test_one_wheel_serves_several_pythons_and_versions_of_torch():
    """SASA_WHEEL_PYTHONS lists them, with colons between; each has torch."""
    pythons = os.environ['SASA_WHEEL_PYTHONS'].split(os.pathsep)
    done = check_wheel(os.environ['SASA_WHEEL'], *pythons)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.splitlines())) == len(pythons)


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ([], 'tools/build_wheel.sh builds one wheel'),
        (['latest'], "'latest' is neither a version of torch nor the path of a Python."),
    ],
)
def test_build_wheel_refuses_what_it_cannot_use(source, tmp_path, arguments, said):
    run('git', 'init', '--quiet', source, cwd=tmp_path)
    done = subprocess.run(
        ['bash', source / 'tools/build_wheel.sh', '--out', tmp_path / 'out', *arguments],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert said in done.stderr


def test_an_isolated_build_says_why_it_has_no_kernels(source, tmp_path):
    """As with pip's build isolation, torch does not import; the wheel then serves every platform."""
    (tmp_path / 'torch.py').write_text("raise ImportError('no torch here')\n")
    copy = tmp_path / 'copy'
    shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns('*.so', 'build'))
    command = (sys.executable, 'setup.py', '--quiet', 'bdist_wheel', '--dist-dir', tmp_path / 'out')
    printed = run(*command, cwd=copy, pythonpath=tmp_path)
    assert 'torch is not here to build the C++ kernels with' in printed
    assert '--no-build-isolation' in printed
    (built,) = (tmp_path / 'out').iterdir()
    assert built.name == f'sasa_det-{__version__}-py3-none-any.whl'


def test_the_docker_image_is_made_of_what_there_is():
    """There is no Docker here: the commands parse, the files are there, and the set-up takes the versions."""
    lines = (ROOT / 'Dockerfile').read_text().replace('\\\n', ' ').splitlines()
    steps = [line.split(' ', 1) for line in lines if line and not line.startswith('#')]
    python = re.fullmatch(r'python:(3\.\d+)-slim-\w+', dict(steps)['FROM'])[1]
    assert f'python{python}' in (ROOT / 'tools/setup_env.sh').read_text()
    for command in (text for step, text in steps if step == 'RUN'):
        run('bash', '-n', '-c', command, cwd=ROOT)
    (torch_wanted,) = (
        re.search(r'SASA_TORCH="([^"]+)"', text)[1] for step, text in steps if 'SASA_TORCH' in text
    )
    assert stack.refuse_torch(torch_wanted) is None
    assert torch_wanted.startswith(f'{stack.pin("torch")} ')
    shell, script = json.loads(dict(steps)['CMD'])
    assert shell == 'bash' and (ROOT / script).is_file()
    inner = re.search(r'RUN bash -c "(.+)"', (ROOT / 'Dockerfile').read_text())[1]
    assert Path(re.search(r'source (\S+)', inner)[1]) == Path('tools/setup_env.sh')


def test_the_sdist_is_the_same_bytes_twice(source, tmp_path):
    """Of two copies, made at other times under other umasks; it holds what an install needs."""
    archives = []
    for number, umask in enumerate(('022', '077')):
        copy = tmp_path / f'copy_{number}'
        shutil.copytree(source, copy, symlinks=True, copy_function=shutil.copy)
        out = tmp_path / f'dist_{number}'
        build = f"umask {umask}; exec '{sys.executable}' setup.py --quiet sdist --dist-dir '{out}'"
        run('bash', '-c', build, cwd=copy)
        (archive,) = out.glob('*.tar.gz')
        archives.append(archive)
    first, second = (archive.read_bytes() for archive in archives)
    assert first == second
    with tarfile.open(archives[0]) as sdist:
        held = {name.partition('/')[2] for name in sdist.getnames()}
    assert f'sasa_det/.mim/configs/{CONFIG}' in held
    assert {'sasa_det.pth', 'sasa_det.start', 'setup.py', 'sasa_det/.mim/model-index.yml'} <= held
    kernels = {str(path.relative_to(ROOT)) for path in ROOT.glob('sasa_det/*/csrc/*.*')}
    assert kernels and kernels <= held
    assert demo_files() <= held


def test_the_wheel_asks_for_what_the_stack_check_accepts(wheel):
    (metadata,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith('/METADATA'))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    required = {line.partition(': ')[2] for line in lines if line.startswith('Requires-Dist: ')}
    for name, bounds in {**stack.COMMON, **stack.OPENMMLAB}.items():
        (found,) = (each for each in required if re.match(rf'{name}[<>=]', each))
        assert set(found.removeprefix(name).split(',')) == set(bounds.split(','))
    assert f'Requires-Python: >={".".join(map(str, stack.MINIMUM_PYTHON))}' in lines


def test_the_set_up_installs_what_the_stack_check_accepts():
    bounds = {**stack.COMMON, **stack.OPENMMLAB, **stack.ONEDL}
    names = ['torch', *stack.OPENMMLAB, *stack.ONEDL]
    printed = run(sys.executable, ROOT / 'sasa_det/environment/stack.py', *names, cwd=ROOT)
    for name, pinned in zip(names, printed.split(), strict=True):
        assert pinned.startswith(f'{name}==')
        assert stack.accepts(bounds[name], pinned.partition('==')[2])
    assert stack.COMMON['setuptools'] in (ROOT / 'tools' / 'setup_env.sh').read_text()


def test_configs_resolve_with_the_wheel_on_the_path(installed, tmp_path):
    (tmp_path / 'mine.py').write_text(f"_base_ = 'sasa_det::{CONFIG}'\nmodel = dict(mine=1)\n")
    code = (
        'import sasa_det, mmengine\n'
        'from mmengine.hub import get_config\n'
        "config = mmengine.Config.fromfile('mine.py')\n"
        f"same = get_config('sasa_det::{CONFIG}')\n"
        'print(sasa_det.__file__, config.model.pop("mine"), config.model.backbone.type)\n'
        'assert config.model.backbone == same.model.backbone\n'
    )
    printed = run(sys.executable, '-c', code, cwd=tmp_path, pythonpath=installed)
    assert f'{installed}/sasa_det/__init__.py 1 SASAResNet' in printed


def test_a_config_outside_trains_a_step_by_mmdets_own_tool(environment, wheel, tmp_path):
    install(environment, wheel, cwd=tmp_path)
    where = run(environment, '-c', 'import sasa_det; print(sasa_det.__file__)', cwd=tmp_path)
    assert str(environment.parents[1]) in where
    data = tmp_path / 'digits'
    make = ('--num-train', 10, '--num-val', 10, '--image-size', 64)
    run(environment, '-m', 'sasa_det', 'demo-data', data, *make, cwd=tmp_path)

    (tmp_path / 'mine.py').write_text(ONE_STEP.format(config=CONFIG, data=str(data)))
    printed = run(environment, tool_path('train'), 'mine.py', '--work-dir', 'out', cwd=tmp_path)
    assert 'Epoch(train) [1][1/1]' in printed
    assert 'loss: nan' not in printed and 'loss: ' in printed
    assert (tmp_path / 'out' / 'epoch_1.pth').is_file()
    # The scope that such a base stamps must be known, or mmengine guesses.
    assert 'Failed to search registry' not in printed
    assert 'Failed to import' not in printed


def link_with_requirements(name, folder):
    """Link a distribution's packages, and those that it requires, into a folder."""
    distribution = metadata.distribution(name)
    for path in {Path(file).parts[0] for file in distribution.files if '..' not in file.parts}:
        if not (folder / path).exists():
            (folder / path).symlink_to(distribution.locate_file(path))
    for requirement in map(Requirement, distribution.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({'extra': ''}):
            try:
                link_with_requirements(requirement.name, folder)
            except metadata.PackageNotFoundError:
                pass  # of another platform


def test_operator_and_layer_need_torch_alone(installed, tmp_path):
    """They train a step, and on the C++ kernels of the wheel."""
    link_with_requirements('torch', tmp_path)
    code = """
import importlib.util
for name in ('numpy', 'mmengine', 'mmcv', 'mmdet', 'rich'):
    assert importlib.util.find_spec(name) is None, name
import torch
from sasa_det.layers import AttentionStem, LocalSelfAttention2d
from sasa_det.ops import available_backends

layer = LocalSelfAttention2d(8, 8, kernel_size=3, num_heads=2, bias=True, backend='native')
before = layer.query.weight.clone()
layer(torch.randn(1, 8, 6, 7)).square().sum().backward()
torch.optim.SGD(layer.parameters(), lr=0.1).step()
assert AttentionStem()(torch.zeros(2, 3, 8, 8)).shape == (2, 64, 2, 2)
print(bool((layer.query.weight != before).any()))
"""
    path = os.pathsep.join(map(str, (tmp_path, installed)))
    # -S: without the site-packages of this environment.
    assert 'True' in run(sys.executable, '-S', '-c', code, cwd=tmp_path, pythonpath=path)


READ = "import mmengine; print(mmengine.Config.fromfile('mine.py').model.neck.type)"


def test_configs_resolve_where_a_checkout_is_installed_for_editing(environment, source, tmp_path):
    install(environment, '--editable', source, cwd=tmp_path)
    (tmp_path / 'mine.py').write_text(f"_base_ = 'sasa_det::{CONFIG}'\n")
    assert 'SASAFPN' in run(environment, '-c', READ, cwd=tmp_path)


def test_configs_resolve_with_a_checkout_on_the_path(environment, source, tmp_path):
    """Nothing is installed, so nothing tells mmengine of sasa_det before it is imported."""
    (tmp_path / 'mine.py').write_text(f"_base_ = 'sasa_det::{CONFIG}'\n")
    code = f'import sasa_det; {READ}'
    assert 'SASAFPN' in run(environment, '-c', code, cwd=tmp_path, pythonpath=source)
