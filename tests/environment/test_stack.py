"""The check of the installed stack, against made-up installations."""

from importlib import metadata

import pytest

from sasa_det.environment import stack

GOOD = {
    'torch': '2.13.0+cpu',
    'numpy': '2.4.6',
    'setuptools': '80.10.2',
    'mmengine': '0.10.7',
    'mmcv': '2.1.0',
    'mmdet': '3.3.0',
}


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly these distributions are installed."""
    versions = dict(GOOD)

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(stack.metadata, 'version', version)
    # This Python may be one for which mmcv's source is mended.
    monkeypatch.delitem(stack.MMCV_BUILDS_WITH, 'python')
    return versions


@pytest.mark.parametrize(
    ('specifier', 'version', 'accepted'),
    [
        ('>=2.2', '2.1.2', False),
        ('>=2.2', '2.2', True),
        ('>=2.2', '2.13.0a0+git1234', True),
        ('>=2.1.0,<2.2', '2.1.9', True),
        ('>=2.1.0,<2.2', '2.2.0', False),
        ('==3.3.0', '3.3', True),
        ('==3.3.0', '3.3.0.1', False),
        ('<81', '80.10.2', True),
        ('<81', '81.0.0', False),
    ],
)
def test_accepts(specifier, version, accepted):
    assert stack.accepts(specifier, version) is accepted


def test_the_default_stack_is_accepted(installed):
    assert stack.find_problems() == []
    stack.require_stack()


@pytest.mark.parametrize(
    ('name', 'version', 'command'),
    [
        ('torch', '2.1.2', "pip install 'torch>=2.2'"),
        ('numpy', '1.21.0', "pip install 'numpy>=1.22'"),
        ('setuptools', '81.0.0', "pip install 'setuptools<81'"),
        ('mmengine', '0.10.4', "pip install 'mmengine>=0.10.7,<0.11'"),
        ('mmcv', '2.2.0', 'pip install --no-build-isolation mmcv==2.1.0'),
        ('mmdet', '3.2.0', "pip install 'mmdet==3.3.0'"),
    ],
)
def test_each_mismatch_is_named_with_its_command(installed, name, version, command):
    installed[name] = version
    (problem,) = stack.find_problems()
    assert problem.name == name
    assert problem.found == version
    assert problem.mend.endswith(command)
    with pytest.raises(ImportError) as error:
        stack.require_stack()
    for part in (name, version, problem.accepted, command, 'sasa-det doctor'):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ('asked', 'said'),
    [
        ('torch', None),
        ('torch==2.2.0', None),
        ('--pre torch==2.5.1 --index-url https://a.mirror/cu124', None),
        ('torch>=2.0', None),
        ('torch==2.1.*', 'torch==2.1 is not supported; accepted is torch>=2.2.'),
        ('2.5.1', "'2.5.1' is no requirement of torch for pip; write, for example, torch==2.13.0."),
    ],
)
def test_a_torch_that_is_asked_for(asked, said):
    assert stack.refuse_torch(asked) == said


def test_a_missing_package(installed):
    del installed['mmengine']
    (problem,) = stack.find_problems()
    assert (problem.name, problem.found) == ('mmengine', 'nothing')


def test_mmcv_lite_is_told_from_mmcv(installed):
    del installed['mmcv']
    installed['mmcv-lite'] = '2.1.0'
    (problem,) = stack.find_problems()
    assert problem.found == 'mmcv-lite, which has no ops'


def test_the_fork_is_checked_by_its_own_versions(installed):
    for name in stack.OPENMMLAB:
        del installed[name]
    installed.update({name: bound[2:] for name, bound in stack.ONEDL.items()})
    assert stack.find_problems() == []
    installed['onedl-mmcv'] = '2.3.0'
    (problem,) = stack.find_problems()
    assert (problem.name, problem.found, problem.accepted) == ('onedl-mmcv', '2.3.0', '==2.3.6')
    assert problem.mend.endswith('onedl-mmcv==2.3.6')


def test_an_import_that_fails_is_a_problem(installed, monkeypatch):
    def import_module(name):
        if name == 'mmcv.ops':
            raise ImportError('_ext.so: undefined symbol: _ZN3c10')
        return pytest.importorskip('torch') if name == 'torch' else object()

    monkeypatch.setattr(stack, 'import_module', import_module)
    (problem,) = stack.find_problems(imports=True)
    assert problem.name == 'mmcv'
    assert 'undefined symbol' in problem.found
    # The wheel in pip's cache is the broken one: it must not come back.
    assert 'pip cache remove mmcv' in problem.mend
    assert '--no-binary mmcv' in problem.mend


def test_opencv_without_graphics_libraries(installed, monkeypatch):
    def import_module(name):
        if name == 'cv2':
            raise ImportError('libGL.so.1: cannot open shared object file')
        return pytest.importorskip('torch') if name == 'torch' else object()

    monkeypatch.setattr(stack, 'import_module', import_module)
    (problem,) = stack.find_problems(imports=True)
    assert problem.name == 'opencv-python'
    assert problem.mend.endswith('pip install opencv-python-headless')
