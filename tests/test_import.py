"""What importing sasa_det needs, and what it leaves alone."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fork_notice import without_notice

ROOT = Path(__file__).resolve().parents[1]


def python(code, **env):
    """Run code in a new process that finds the checkout; return what it printed."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        env={**os.environ, 'PYTHONPATH': str(ROOT), **env}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return without_notice(done.stdout).strip()


def test_importing_the_layer_adds_little_to_torch():
    """Most of the limit is for a busy machine: it takes some 0.05 s."""
    code = """
import time
import torch
begin = time.process_time()
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import local_attention
print(time.process_time() - begin)
"""
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_importing_the_package_imports_nothing_heavy():
    code = (
        'import sys; before = set(sys.modules); import sasa_det; print(*set(sys.modules) - before)'
    )
    imported = {name.partition('.')[0] for name in python(code).split()}
    assert not imported & {'torch', 'numpy', 'mmengine', 'mmcv', 'mmdet', 'cv2', 'rich'}


SNAPSHOT = """
import sys
import mmengine, mmdet, mmcv, torch
import mmengine.runner, mmengine.hooks, mmengine.fileio, mmdet.registry, torch.serialization

def snapshot():
    from mmengine.runner import CheckpointLoader
    state = {f'{name}.{key}': id(value)
             for name, module in sys.modules.items() if module is not None
             and name.partition('.')[0] in ('mmengine', 'mmdet', 'mmcv', 'torch', 'torchvision', 'numpy')
             for key, value in vars(module).items() if not key.startswith('__')}
    for prefix, loader in CheckpointLoader._schemes.items():
        state[f'loader {prefix!r}'] = id(loader)
    for registry in ('MODELS', 'HOOKS', 'DATASETS', 'MODEL_WRAPPERS'):
        for module in (mmengine.registry, mmdet.registry):
            for key, value in getattr(module, registry).module_dict.items():
                state[f'{module.__name__}.{registry} {key}'] = id(value)
    # Our types are added to this one, as docs/faq.md says.
    del state['torch._weights_only_unpickler._marked_safe_globals_set']
    for name in ('load', 'save'):
        state[f'torch.{name}'] = id(getattr(torch, name))
    return state

before = snapshot()
"""


@pytest.mark.parametrize('what', ['import sasa_det', 'import sasa_det; sasa_det.register()'])
def test_importing_replaces_nothing_of_others(what):
    code = """
after = snapshot()
print(*(key for key in before if after.get(key) != before[key]), sep='; ')
"""
    assert python(f'{SNAPSHOT}{what}\n{code}') == ''


def test_our_classes_are_found_whichever_comes_first():
    for imports in (
        'import sasa_det, mmdet.registry',
        'import mmdet.registry, sasa_det',
        # The registry was asked before, and looks for modules only once.
        'import mmdet.registry as r; r.MODELS.get("FPN"); r.HOOKS.get("x"); import sasa_det',
    ):
        code = f"""
{imports}
from mmdet.registry import DATASETS, HOOKS, MODELS
print(MODELS.get('SASAFPN').__module__, DATASETS.get('CheckedCocoDataset').__module__,
      HOOKS.get('EpochSeedHook').__module__, MODELS.get('SASA') is not None)
"""
        found = python(code).splitlines()[-1]
        assert found == (
            'sasa_det.models.sasa_fpn sasa_det.data.checked_coco '
            'sasa_det.engine.hooks.epoch_seed_hook True'
        )


def test_only_who_asks_for_a_part_of_ours_is_told_of_a_wrong_stack():
    code = """
import sasa_det.environment.stack as stack
stack.OPENMMLAB['mmdet'] = stack.ONEDL['onedl-mmdetection'] = '==1.0'
import mmdet.registry
from mmdet.registry import MODELS
norm = MODELS.get('FPN')
try:
    MODELS.build(dict(type='SASAFPN'))
except ImportError as error:
    print(norm.__name__, 'accepted is ==1.0' in str(error), 'sasa-det doctor' in str(error))
"""
    assert python(code).splitlines()[-1] == 'FPN True True'


def test_the_refused_names_are_those_that_are_registered():
    from mmdet.registry import DATASETS, HOOKS, MODELS

    import sasa_det  # noqa: F401

    tree = ast.parse((ROOT / 'sasa_det/parts.py').read_text())
    (names,) = (
        {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.value.keywords}
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and node.targets[0].id == '_NAMES'
    )
    for registry, expected in (('MODELS', MODELS), ('DATASETS', DATASETS), ('HOOKS', HOOKS)):
        expected.get('nothing')  # has it import what it is to hold
        holds = {**expected.parent.module_dict, **expected.module_dict}
        ours = {name for name, cls in holds.items() if cls.__module__.startswith('sasa_det.')}
        assert ours - {'SASA', 'DepthwiseSeparable'} == set(names[registry])


def test_looking_for_a_module_does_not_count_as_importing_it():
    code = """
import importlib.util
import sasa_det.ops
importlib.util.find_spec('torch.utils.flop_counter')
import torch
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(1, 8, 6, 7)
with FlopCounterMode(display=False) as counter:
    sasa_det.ops.local_attention(x, x, x, kernel_size=3, num_heads=2)
print(counter.get_total_flops())
"""
    assert int(python(code)) == 2 * (8 * 6 * 7) * (2 * 9)


def test_another_plugins_loader_is_called_as_without_us():
    code = """
import mmengine.runner
from mmengine.runner import CheckpointLoader
CheckpointLoader.register_scheme('mine://', lambda filename, map_location: dict(state_dict={}), force=True)
import sasa_det
sasa_det.register()
from sasa_det.checkpoints import safe_loading
first = CheckpointLoader._get_checkpoint_loader('some/file.pth').__module__
with safe_loading():
    second = CheckpointLoader._get_checkpoint_loader('some/file.pth').__module__
    mine = CheckpointLoader.load_checkpoint('mine://x')
third = CheckpointLoader._get_checkpoint_loader('some/file.pth').__module__
print(first, second, third, mine)
"""
    assert python(code).splitlines()[-1] == (
        'mmengine.runner.checkpoint sasa_det.checkpoints.loading mmengine.runner.checkpoint '
        "{'state_dict': {}}"
    )
