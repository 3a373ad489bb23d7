"""Every fenced config and command of README.md, configs/README.md and docs/ runs, on few and small images.

The blocks of a document run in their order, in a folder that looks like the repository's. `SHORTER` says what a
command gets to keep it short, or which other test runs it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings

from sasa_det.data.digits import make_digits

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'configs/README.md')),
    *sorted(ROOT.glob('docs/*.md')),
]
FENCE = re.compile(r'^( *)```(\w+)\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)

ALL_ATTENTION = 'sasa_det::retinanet/retinanet_sasa-r50_sasa-fpn_sasa-head_1x_coco.py'
MMDETS = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
FEW = 'train_cfg.max_epochs=1 train_dataloader.num_workers=0 train_dataloader.persistent_workers=False'
FEW += ' val_dataloader.num_workers=0 val_dataloader.persistent_workers=False'
# R50 at COCO's size is a minute an iteration here; its weights would come from the network.
COCO = (
    'model.backbone.init_cfg=None model.backbone.base_channels=16 model.backbone.depth=26 '
    'model.neck.in_channels="[64,128,256,512]" train_dataloader.dataset.pipeline.2.scale="(64,64)" '
    'val_dataloader.dataset.pipeline.1.scale="(64,64)" test_dataloader.dataset.pipeline.1.scale="(64,64)"'
)
NO_GPU = 'sync_bn=None model_wrapper_cfg.type=AnyDeviceDistributedDataParallel'
# Of the first that matches: what follows the command, or, if that is None, the test that runs it.
SHORTER = [
    (r'--package mmpretrain train', None, 'tests/test_pretraining.py'),
    (r'pretrained_digits', None, 'tests/test_pretraining.py'),
    (r'demo-data .*box-crops', None, 'tests/test_pretraining.py'),
    (r'^sasa-det demo-data$', 'data/few --num-train 12 --num-val 10', ''),
    (r'^pip install|^git clone', None, 'tests/test_packaging.py'),
    (r'build_wheel\.sh|checks/wheel\.py|^docker ', None, 'tests/test_packaging.py'),
    (r'test_matrix\.sh', None, 'tests/tools/test_matrix.py'),
    (r'checks/mmcv_build\.py', None, 'tests/tools/test_mmcv_build_check.py'),
    (r'tools\.paper\.budgets', None, 'tests/tools/paper/test_budgets.py'),
    (r'tools\.paper\.content', None, 'tests/tools/paper/test_content.py'),
    (r'tools\.paper\.conversions', None, 'tests/tools/paper/test_conversions.py'),
    (r'tools\.paper\.tables', None, 'tests/tools/paper/test_tables.py'),
    # The first of them in full; of the others, that the arguments exist.
    (r'benchmarks\.attention -', '--help', ''),
    (r'benchmarks\.attention\b', '--shapes P7 --batches 1 --subjects core --seconds 0.05', ''),
    (
        r'benchmarks\.detector_profile',
        '--size 64 --batch 2 --rounds 1 --configs retinanet_tiny_digits',
        '',
    ),
    (r'benchmarks\.precision .*--no-time', '--help', ''),
    (r'benchmarks\.precision', f'--seconds 0.1 --cfg-options {" ".join(FEW.split()[3:])}', ''),
    (r'benchmarks\.(detector|export) .*--size', '--help', ''),
    (r'benchmarks\.detector', '--size 64 --seconds 0.1 --configs retinanet_r50_fpn_1x_coco', ''),
    (r'benchmarks\.export', '--size 64 --seconds 0.1 --configs retinanet_r50_fpn_1x_coco', ''),
    (r'--op native|^g\+\+ ', None, 'tests/export/test_native_operator.py'),
    (r'quickstart\.sh --data', '--epochs 1 --work-dir {fresh}', ''),
    (r'quickstart\.sh', '--help', ''),  # the same script, on more images
    (r'demo_detector', None, 'tests/tools/test_shrink_checkpoint.py'),
    (r'sasa-det compare', None, 'tests/experiments/test_compare.py'),
    (r'benchmarks\.attention_gpu', None, 'tests/benchmarks/test_attention_gpu.py'),
    (r'benchmarks/gpu_run', None, 'tests/benchmarks/test_gpu_run.py'),
    (r'checks\.triton_builds', None, 'tests/ops/backends/test_triton_builds.py'),
    (r'checks\.cuda_times', None, 'tests/ops/test_cuda_builds.py'),
    (r'tools/reliability/', None, 'tests/engine/hooks/test_checkpoint_hook.py'),
    (r'sasa-det convert|converted/', None, 'tests/convert/test_detectors.py'),
    (r'sasa-det explore', None, 'tests/cli/test_explore.py'),
    (r'mkdocs|^bash \.ci/run|^\.ci/run', None, 'tests/test_documents.py'),
    (r'run_tests\.sh', '--collect-only -q tests/environment/test_stack.py', ''),
    (r'checks/mixes\.py', None, 'tests/test_configs.py'),
    (r'get_flops', '', ''),
    (r'torchrun .*my_config', f'--cfg-options {FEW} {COCO} {NO_GPU}', ''),
    (r'train .*(my_config|configs/retinanet|my_fcos)', f'--cfg-options {FEW} {COCO}', ''),
    (r'test .*(my_config|my_fcos)', f'--cfg-options {COCO}', ''),
    (r'(train|test) ', f'--cfg-options {FEW}', ''),
]

# What two documents tell to run is run for the first.
LONG_AND_RUN = set()


def blocks(path, *languages):
    """The fenced blocks of a document, each with its line."""
    text = path.read_text()
    for match in FENCE.finditer(text):
        if match[2] in languages:
            indent, body = match[1], match[3]
            yield (
                text[: match.start()].count('\n') + 1,
                match[2],
                re.sub(f'(?m)^{indent}', '', body),
            )


def commands(block):
    """The commands of a block: lines that a backslash continues are one, comments go."""
    for line in block.replace('\\\n', ' ').splitlines():
        line = re.sub(r'\s+#.*', '', line).strip()
        if line and not line.startswith('#'):
            yield re.sub(r' +', ' ', line)


def as_coco(source, target, names):
    """Relabel the digits' annotations and lay them out as another data set's."""
    target.mkdir(parents=True)
    for split in ('train', 'val'):
        content = json.loads((source / f'annotations/instances_{split}.json').read_text())
        content['categories'] = [dict(id=i, name=name) for i, name in enumerate(names, 1)]
        for annotation in content['annotations']:
            annotation['category_id'] = 1 + annotation['category_id'] % len(names)
        year = '2017' if len(names) == 80 else ''
        (target / 'annotations').mkdir(exist_ok=True)
        (target / f'annotations/instances_{split}{year}.json').write_text(json.dumps(content))
        (target / f'{split}{year}').symlink_to(source / split)


def save_untrained(folder):
    """Leave what the quickstart would leave: a checkpoint, and its config beside it.

    Of attention there is only the last stage: to export a layer takes seconds.
    """
    config = get_config('sasa_det::quickstart/retinanet_sasa-tiny_digits.py')
    import_modules_from_strings(**config.custom_imports)
    init_default_scope('mmdet')
    folder.mkdir(parents=True)
    config.model.backbone.attn_stages = (False, False, False, True)
    config.model.neck.attn_cfg = config.model.bbox_head.attn_cfg = None
    config.model.bbox_head.attn_parts = None
    model = MODELS.build(config.model)
    model.init_weights()
    meta = dict(dataset_meta=dict(classes=config.metainfo.classes), cfg=config.pretty_text)
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'epoch_8.pth')
    config.dump(folder / 'retinanet_sasa-tiny_digits.py')


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp('digits') / 'digits'
    make_digits(root, num_train=12, num_val=10, image_size=64)
    return root


@pytest.fixture
def place(tmp_path, digits):
    """What a command finds: the repository's files, and small data under the documents' names."""
    from mmdet.datasets import CocoDataset

    for name in (
        'benchmarks',
        'configs',
        'sasa_det',
        'docs',
        'tests',
        'pyproject.toml',
        'setup.py',
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / 'tools', tmp_path / 'tools')
    script = tmp_path / 'tools' / 'quickstart.sh'
    script.write_text(
        script.read_text().replace(
            'sasa_det demo-data', 'sasa_det demo-data data/few --num-train 12 --num-val 10'
        ).replace('DATA:-data/digits', 'DATA:-data/few')
    )  # fmt: skip
    # A copy: what a command writes there must not reach the other documents.
    shutil.copytree(digits, tmp_path / 'data/digits')
    as_coco(digits, tmp_path / 'data/coco', CocoDataset.METAINFO['classes'])
    as_coco(digits, tmp_path / 'data/bccd', ('Platelets', 'RBC', 'WBC'))
    save_untrained(tmp_path / 'work_dirs/quickstart')
    # README.md's, which others name.
    (tmp_path / 'my_config.py').write_text(f"_base_ = '{ALL_ATTENTION}'\n")
    (tmp_path / 'path/to').mkdir(parents=True)
    (tmp_path / 'path/to/my_data').symlink_to(digits)
    return tmp_path


def shorten(command, fresh):
    """The command as it is run, or None if another test runs it."""
    for pattern, more, elsewhere in SHORTER:
        if re.search(pattern, command):
            if more is None:
                assert (ROOT / elsewhere).is_file()
                return None
            if '--cfg-options' in command:
                more = more.replace('--cfg-options', '')
            command = command.replace('epoch_12.pth', 'epoch_1.pth')
            return f'{command} {more.format(fresh=fresh)}'
    return command


def check_config(path):
    """Build a config's model; one without a base is what changes in another."""
    config = Config.fromfile(path)
    if '_base_' not in path.read_text():
        mine = config.to_dict()
        config = get_config(MMDETS if 'conv_cfg' in path.read_text() else ALL_ATTENTION)
        config.merge_from_dict({'custom_imports': dict(imports=['sasa_det']), **mine})
    import_modules_from_strings(**config.custom_imports)
    init_default_scope('mmdet')
    config.model.backbone.init_cfg = None
    assert MODELS.build(config.model).bbox_head is not None


def environment():
    """The tests' Python under the names that documents call it by."""
    folder = str(Path(sys.executable).parent)
    return {
        **os.environ,
        'PATH': folder + os.pathsep + os.environ['PATH'],
        'PYTHONPATH': str(ROOT),
        'SASA_PYTHON': sys.executable,
        'OMP_NUM_THREADS': '1',
    }


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_configs_and_commands_run(document, place, monkeypatch):
    monkeypatch.chdir(place)
    for number, (line, language, block) in enumerate(blocks(document, 'python', 'bash')):
        where = f'{document.relative_to(ROOT)}:{line}'
        if language == 'bash':
            for command in commands(block):
                short = shorten(command, fresh=f'work_dirs/{number}')
                if short is None or command in LONG_AND_RUN:
                    continue
                begin = time.monotonic()
                done = subprocess.run(
                    ['bash', '-c', short], env=environment(), capture_output=True, text=True
                )
                print(f'{time.monotonic() - begin:5.1f} s  {short}')
                output = (done.stdout + done.stderr)[-3000:]
                assert done.returncode == 0, f'{where}\n{short}\n{output}'
                if 'quickstart.sh' in command:
                    LONG_AND_RUN.add(command)
        elif re.search(r'^(model|train_dataloader|custom_imports|_base_)\b', block, re.MULTILINE):
            name = re.match(r'# (\w+\.py)', block)
            path = place / (name[1] if name else f'block_{number}.py')
            path.write_text(block)
            check_config(path)
        else:
            exec(compile(block, where, 'exec'), {})


def test_the_documents_name_no_file_that_is_not_there():
    for document in DOCUMENTS:
        for target in re.findall(r'\]\(([^)#]+?)(?:#[^)]*)?\)', document.read_text()):
            if not target.startswith('http'):
                assert (document.parent / target).exists(), f'{document.name}: {target}'
