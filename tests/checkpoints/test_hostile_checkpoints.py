"""A checkpoint from others, wherever a user may name it: refused before anything of it runs."""

import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter, OrderedDict
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pytest
import torch
from fork_notice import without_notice
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from mmengine.runner import FlexibleRunner, Runner, checkpoint

from sasa_det.checkpoints import loading
from sasa_det.checkpoints.detector import load_detector
from sasa_det.checkpoints.fit import describe_misfit, find_fitting_config, shapes
from sasa_det.checkpoints.loading import load_from_local, safe_loading
from sasa_det.checkpoints.types import ASKS
from sasa_det.cli.main import main
from sasa_det.data.digits import make_digits
from sasa_det.environment.stack import is_fork

pytestmark = pytest.mark.skipif(
    not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'),
    reason='this torch loads whole pickles unless told otherwise',
)
DIGITS = 'quickstart/retinanet_sasa-tiny_digits.py'
PLACES = (
    'torchvision://resnet50', 'modelzoo://resnet50', 'open-mmlab://jhu/resnet50_gn_ws',
    'openmmlab://jhu/resnet50_gn_ws', 'mmcls://mobilenet_v2', 's3://bucket/a.pth',
    'mine:s3://bucket/a.pth', 'petrel://bucket/a.pth', 'pavi://model', 'http://example.invalid/a.pth',
    'https://example.invalid/a.pth',
)  # fmt: skip
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('digits') / 'set'
    return make_digits(root, num_train=10, num_val=10, image_size=64, quiet=True)


@pytest.fixture
def ran(tmp_path):
    """What the hostile file would make."""
    return tmp_path / 'ran'


@pytest.fixture
def hostile(tmp_path, ran):
    torch.save({'state_dict': {}, 'meta': {}, 'more': Touch(ran)}, tmp_path / 'hostile.pth')
    return tmp_path / 'hostile.pth'


@pytest.fixture
def runner(data, tmp_path, hostile):
    """Make a Runner for the digits that is given the hostile file, as train.py and test.py do."""

    def make(kind=Runner, **options):
        config = Config.fromfile(CONFIGS / DIGITS)
        config.merge_from_dict(
            {
                'work_dir': str(tmp_path / 'work'),
                'load_from': str(hostile),
                'val_dataloader.dataset.data_root': f'{data}/',
                'train_dataloader.dataset.data_root': f'{data}/',
                'train_dataloader.num_workers': 0,
                'train_dataloader.persistent_workers': False,
                'val_dataloader.num_workers': 0,
                'val_dataloader.persistent_workers': False,
                'val_evaluator.ann_file': f'{data}/annotations/instances_val.json',
                'log_level': 'ERROR',
                **options,
            }
        )
        config.test_dataloader, config.test_evaluator = config.val_dataloader, config.val_evaluator
        init_default_scope('mmdet')
        return kind.from_cfg(config)

    return make


REFUSED = 'hostile.pth is refused, and nothing of it was run: it asks for (pathlib|builtins|posix)'


def test_the_file_is_what_it_says(hostile, ran):
    """Loaded as torch once did, it runs."""
    torch.load(hostile, weights_only=False)
    assert ran.exists()


@pytest.mark.parametrize('resume', [False, True])
def test_train_refuses_it(runner, ran, resume):
    with pytest.raises(ValueError, match=REFUSED):
        runner(resume=resume).train()
    assert not ran.exists()


@pytest.mark.parametrize('resume', [False, True])
def test_a_flexible_runner_refuses_it_in_our_commands(runner, ran, resume):
    """It loads before it calls a hook, so that the command's own loaders must be at work."""
    with safe_loading(), pytest.raises(ValueError, match=REFUSED):
        runner(FlexibleRunner, resume=resume).train()
    assert not ran.exists()


def test_test_refuses_it(runner, ran):
    with pytest.raises(ValueError, match=REFUSED):
        runner().test()
    assert not ran.exists()


def test_a_backbones_start_is_refused(hostile, ran):
    model = Config.fromfile(CONFIGS / DIGITS).model
    model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(hostile))
    init_default_scope('mmdet')
    with pytest.raises(ValueError, match=REFUSED):
        MODELS.build(model).init_weights()
    assert not ran.exists()


def test_load_detector_refuses_it(hostile, ran):
    with pytest.raises(ValueError, match=REFUSED):
        load_detector(Config.fromfile(CONFIGS / DIGITS), str(hostile), device='cpu')
    assert not ran.exists()


def test_mmdets_own_loading_is_torchs_or_ours_where_it_is_asked_for(hostile, ran, monkeypatch):
    # As in a process in which no command of ours ran.
    monkeypatch.setitem(checkpoint.CheckpointLoader._schemes, '', checkpoint.load_from_local)
    config = Config.fromfile(CONFIGS / DIGITS)
    # The fork's mmengine would go on without torch's check, and run it.
    if not is_fork():
        with pytest.raises(UnpicklingError):
            init_detector(config, str(hostile), device='cpu')
    with safe_loading(), pytest.raises(ValueError, match=REFUSED):
        init_detector(config, str(hostile), device='cpu')
    assert not ran.exists()


def test_predict_refuses_it(hostile, ran, data, tmp_path, capsys):
    argv = [
        'predict',
        str(data / 'val'),
        '--checkpoint',
        str(hostile),
        '--out',
        str(tmp_path / 'o'),
    ]
    assert main([*argv, '--config', 'retinanet_sasa-tiny_digits']) == 2
    assert re.search(REFUSED, capsys.readouterr().err)
    assert not ran.exists()


def test_a_config_in_it_is_not_run(tmp_path, ran):
    """mmengine's resume runs the text in meta['config'] as Python."""
    text = f'import pathlib; pathlib.Path({str(ran)!r}).touch()'
    torch.save({'state_dict': {}, 'meta': {'config': text}}, tmp_path / 'text.pth')
    assert load_from_local(tmp_path / 'text.pth')['meta'] == {}
    assert not ran.exists()


def test_a_run_does_not_run_the_config_in_what_it_resumes_from(runner, data, tmp_path, ran):
    run = runner(load_from=None, **{'train_cfg.max_epochs': 1})
    run.train()
    saved = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=True)
    text = f'import pathlib; pathlib.Path({str(ran)!r}).touch()'
    saved['meta']['config'] = text
    torch.save(saved, tmp_path / 'text.pth')
    runner(load_from=str(tmp_path / 'text.pth'), resume=True, **{'train_cfg.max_epochs': 1}).train()
    assert not ran.exists()


def build(path, **options):
    config = Config.fromfile(CONFIGS / path)
    config.merge_from_dict({f'model.{key}': value for key, value in options.items()})
    init_default_scope('mmdet')
    return config, MODELS.build(config.model)


@pytest.mark.parametrize(
    ('option', 'value', 'said'),
    [
        ('backbone.attn_cfg.kernel_size', 7, 'model.backbone.attn_cfg.kernel_size=7, not 5'),
        ('neck.attn_cfg', None, 'model.neck.attn_cfg=None, not {'),
        ('bbox_head.num_classes', 3, 'model.bbox_head.num_classes=3, not 10'),
    ],
)
def test_another_variant_is_named_by_its_options(option, value, said):
    config, model = build(DIGITS)
    other, written = build(DIGITS, **{option: value})
    checkpoint = {'state_dict': written.state_dict(), 'meta': {'cfg': other.pretty_text}}
    text = describe_misfit(model, checkpoint, config.model, search=False)
    assert 'The config that the checkpoint was written with has' in text
    assert said in text, text


def test_weights_of_another_config_say_which(tmp_path):
    config, _ = build(DIGITS)
    _, convolutions = build('quickstart/retinanet_tiny_digits.py')
    torch.save(convolutions.state_dict(), tmp_path / 'conv.pth')
    with pytest.raises(ValueError, match='its weights are not those of the model of') as raised:
        load_detector(config, tmp_path / 'conv.pth')
    text = str(raised.value)
    assert 'weights are not in the model: backbone.' in text
    assert text.endswith(('tiny_digits.py', 'tiny_coco-format.py'))


def test_the_number_of_classes_is_found():
    _, model = build(DIGITS, **{'bbox_head.num_classes': 3})
    # No config has three classes; the first with these layers is named.
    found = find_fitting_config(shapes(model.state_dict()))
    assert re.fullmatch(r'quickstart/retinanet_sasa-tiny_[\w-]+\.py with 3 classes', found)


@pytest.mark.parametrize(
    'content', [b'\xff\xd8\xff\xe0 a photo', b'a text', b'\x80\x02}q\x00.', b'\x80\x04N.']
)
def test_no_message_advises_to_load_it_all_the_same(tmp_path, content):
    (tmp_path / 'photo.pth').write_bytes(content)
    with pytest.raises(ValueError, match='photo.pth (is refused|cannot be read)') as raised:
        load_from_local(tmp_path / 'photo.pth')
    assert 'weights_only' not in str(raised.value) and 'issue' not in str(raised.value)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({'state_dict': {'a': torch.zeros(1000)}}, tmp_path / 'small.pth')
    with (
        zipfile.ZipFile(tmp_path / 'small.pth') as whole,
        zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry))
    with pytest.raises(ValueError, match='bomb.pth was not written by torch: .* is compressed'):
        load_from_local(tmp_path / 'bomb.pth')


CODES = ('f2', 'f4', 'f8', 'i1', 'i4', 'i8', 'u1', '?')
NUMBERS = [np.arange(6).reshape(2, 3).astype(code) for code in CODES]


def test_numpy_arrays_and_scalars_load_and_are_saved_as_numpys_own(tmp_path):
    values = [
        *NUMBERS,
        np.asfortranarray(NUMBERS[0]),
        np.empty((0, 3)),
        np.float64(1.5),
        np.int64(-3),
    ]
    values += [np.bool_(True), np.array(2.5)]
    torch.save({'values': values}, tmp_path / 'a.pth')
    for _ in range(2):
        found = load_from_local(tmp_path / 'a.pth')['values']
        for ours, truth in zip(found, values, strict=True):
            assert ours.dtype == truth.dtype and np.array_equal(ours, truth)
        torch.save({'values': found}, tmp_path / 'a.pth')
    # What was loaded and saved again asks for nothing of ours.
    names = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / 'a.pth')
    assert not any('sasa_det' in name for name in names)
    assert b'sasa_det' not in (tmp_path / 'a.pth').read_bytes()


def test_numpys_types_of_any_state_and_damage_to_either_the_zip_or_the_old_format():
    """A dtype of a file's own flags has numpy follow pointers that the file brings along."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', ROOT / 'tools/reliability/hostile_checkpoints.py',
         '--trials', '300', '--damaged', '100'],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(re.findall(r': \d+ loaded, \d+ refused; 0 went wrong', done.stdout)) == 6


def test_the_tool_tells_a_file_that_ends_the_process_and_one_that_loads_wrongly():
    code = """
import sys
sys.argv = ['', '--trials', '300', '--damaged', '0']
from tools.reliability import hostile_checkpoints as tool
{}
tool.main()
"""
    for change, said in (
        ('tool.holds_what_was_drawn = lambda value: False', r'\d+ wrong; [1-9]\d* went wrong'),
        ("import os; tool.holds_what_was_drawn = lambda value: os.kill(os.getpid(), 11)",
         r'\d+ ended with status -11, \d+ refused; [1-9]\d* went wrong'),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', code.format(change)],
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr[-2000:]
        assert re.search(said, done.stdout)


def old_mmcv_content():
    """What runs of mmcv 1.x wrote, with numpy's scalars and arrays where users put them."""
    return dict(
        meta=dict(
            env_info='sys.platform: linux\nPyTorch: 1.9.0',
            config='model = dict(type="RetinaNet")\n',
            seed=np.int64(0),
            exp_name='retinanet.py',
            mmcv_version='1.4.8',
            time='Tue Nov 30 12:00:00 2021',
            epoch=12,
            iter=87960,
            hook_msgs=dict(
                best_score=np.float64(0.365), last_ckpt='epoch_12.pth', best=np.float32(0.5)
            ),
            CLASSES=('person', 'bicycle'),
            PALETTE=np.arange(6, dtype=np.uint8).reshape(2, 3),
            flags=np.bool_(True),
            none=np.empty((0, 4), np.float32),
        ),
        state_dict=OrderedDict(weight=torch.randn(2, 3), half=torch.ones(2).half()),
        optimizer=dict(
            state={0: dict(momentum_buffer=torch.ones(2, 3))},
            param_groups=[dict(lr=0.01, params=[0])],
        ),
    )


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('asks', [True, False])
def test_what_mmcv_1_wrote_loads_without_its_config(tmp_path, monkeypatch, zipped, asks):
    monkeypatch.setattr(loading, 'ASKS', asks)
    content = old_mmcv_content()
    content['state_dict']._metadata = OrderedDict(version=1)
    torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    found = load_from_local(tmp_path / 'a.pth')
    del content['meta']['config']
    assert found['meta'].keys() == content['meta'].keys()
    for name, value in content['meta'].items():
        assert np.array_equal(found['meta'][name], value), name
    assert found['meta']['PALETTE'].dtype == np.uint8
    assert found['state_dict']._metadata == OrderedDict(version=1)
    for name, value in content['state_dict'].items():
        assert torch.equal(found['state_dict'][name], value)
    assert torch.equal(found['optimizer']['state'][0]['momentum_buffer'], torch.ones(2, 3))


TORCHS = """
import sys, torch, mmengine, mmengine.runner
import numpy as np
{first}
import sasa_det
sasa_det.register()
{then}
mmengines = mmengine.runner.CheckpointLoader.load_checkpoint
for load in (torch.load, lambda path: mmengines(path, None, logger='silent')):
    print(load(sys.argv[1]))
"""
ALLOW = """
kinds = ['f4', 'i4', 'f8', 'U2', 'O', [('x', 'f4'), ('y', 'i4')]]
torch.serialization.add_safe_globals([
    np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in kinds},
    np.float64().__reduce__()[0], np.empty(0).__reduce__()[0]])
"""


def torchs_own(path, first='', then='', seed='0', **env):
    """Load a file by torch's and by mmengine's function in a process that has imported sasa_det."""
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', TORCHS.format(first=first, then=then), str(path)],
        env={**os.environ, 'PYTHONHASHSEED': seed, **env}, capture_output=True, text=True,
    )  # fmt: skip


def test_torch_and_mmengine_still_load_whole_pickles_where_a_user_says_so(tmp_path):
    torch.save({'value': Path('some/where')}, tmp_path / 'a.pth')
    done = torchs_own(tmp_path / 'a.pth')
    assert done.returncode and 'Weights only load failed' in done.stderr
    done = torchs_own(tmp_path / 'a.pth', TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD='1')
    assert done.stdout.count("{'value': PosixPath('some/where')}\n") == 2, done.stderr[-2000:]
    assert load_from_local_refuses(tmp_path / 'a.pth')


def load_from_local_refuses(path):
    """Whether our door stays shut in such a process."""
    code = """
import sys, sasa_det, mmengine.runner
from sasa_det.checkpoints.loading import load_from_local
load_from_local(sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code, str(path)],
        env={**os.environ, 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': '1'}, capture_output=True, text=True,
    )  # fmt: skip
    return 'is refused, and nothing of it was run: it asks for pathlib' in done.stderr


@pytest.mark.skipif(not ASKS, reason='torch before 2.6 has no list of types')
@pytest.mark.parametrize('order', ['first', 'then'])
@pytest.mark.parametrize('seed', ['0', '1'])
def test_types_of_numpys_that_a_user_allows_load_as_without_us(tmp_path, order, seed):
    """torch's list has one entry for each name, and which of two wins is by chance."""
    values = dict(floats=np.arange(3.0), scalar=np.float64(1.5), texts=np.array(['a', 'bc']))
    values |= dict(
        objects=np.array([None, 1], object), record=np.ones(2, [('x', 'f4'), ('y', 'i4')])
    )
    torch.save(values, tmp_path / 'a.pth')
    done = torchs_own(tmp_path / 'a.pth', seed=seed, **{order: ALLOW})
    printed = without_notice(done.stdout).replace('_Array(', 'array(')
    assert printed == f'{values}\n' * 2, done.stderr[-2000:]


@pytest.mark.parametrize('asks', [True, False])
def test_a_tar_file_and_a_program_are_refused_before_torch_opens_them(tmp_path, monkeypatch, asks):
    """torch extracts the one, and runs the other's code in torch.jit.load."""
    monkeypatch.setattr(loading, 'ASKS', asks)
    with tarfile.open(tmp_path / 'tar.pth', 'w') as tar:
        tar.addfile(tarfile.TarInfo('storages'))
    with pytest.raises(ValueError, match='tar.pth is a tar file'):
        load_from_local(tmp_path / 'tar.pth')
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / 'program.pth')
    with pytest.raises(ValueError, match='program.pth is a program in TorchScript'):
        load_from_local(tmp_path / 'program.pth')


def test_a_zip_with_an_encrypted_entry_is_named(tmp_path):
    torch.save({}, tmp_path / 'a.pth')
    spoilt = bytearray((tmp_path / 'a.pth').read_bytes())
    for place in (match.start() for match in re.finditer(b'PK\x01\x02', spoilt)):
        spoilt[place + 8] |= 1
    (tmp_path / 'a.pth').write_bytes(spoilt)
    with pytest.raises(ValueError, match='a.pth was not written by torch: .* is encrypted'):
        load_from_local(tmp_path / 'a.pth')


@pytest.mark.parametrize('end', ['', '..', '.?name=a.pth'])
def test_a_url_that_names_no_file_is_not_downloaded(tmp_path, monkeypatch, end):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(
        'torch.hub.download_url_to_file', lambda *_, **__: pytest.fail('downloaded')
    )
    with pytest.raises(ValueError, match='checkpoint https://example.invalid/.* names no file'):
        loading.load_from_http(f'https://example.invalid/{end}')


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'pipe.pth')
    with pytest.raises(ValueError, match='pipe.pth is no regular file'):
        load_from_local(tmp_path / 'pipe.pth')


class TestWithAnOlderTorch:
    """Below 2.6 there is no list of types that may be loaded; our own unpickler has one."""

    @pytest.fixture(autouse=True)
    def older(self, monkeypatch):
        monkeypatch.setattr(loading, 'ASKS', False)
        load = torch.load
        # This torch would load weights only where it is not told otherwise.
        monkeypatch.setattr(
            torch, 'load', lambda *args, **how: load(*args, **{'weights_only': False, **how})
        )

    @pytest.mark.parametrize('zipped', [True, False])
    def test_what_training_writes_loads(self, tmp_path, zipped):
        history = HistoryBuffer([1.0, 2.0], [1, 1])
        content = dict(
            state_dict=OrderedDict(a=torch.randn(3, 4), b=torch.arange(3), h=torch.zeros(2).half()),
            optimizer=dict(state={0: dict(step=torch.tensor(3.0))}, param_groups=[dict(lr=0.1)]),
            meta=dict(epoch=3, seed=1, numbers=NUMBERS, score=np.float64(0.5)),
            message_hub=dict(log_scalars=dict(loss=history)),
            parameter=torch.nn.Parameter(torch.ones(2)),
        )
        torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
        found = load_from_local(tmp_path / 'a.pth')
        for name, value in content['state_dict'].items():
            assert torch.equal(found['state_dict'][name], value)
        for ours, truth in zip(found['meta']['numbers'], NUMBERS, strict=True):
            assert np.array_equal(ours, truth)
        assert found['message_hub']['log_scalars']['loss'].mean() == history.mean() == 1.5
        assert torch.equal(found['parameter'], content['parameter'])

    @pytest.mark.parametrize('zipped', [True, False])
    def test_nothing_of_a_hostile_one_is_run(self, tmp_path, ran, zipped):
        content = {'state_dict': {}, 'meta': {}, 'more': Touch(ran)}
        torch.save(content, tmp_path / 'hostile.pth', _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            ValueError, match='hostile.pth is refused, and nothing of it was run: it asks for'
        ):
            load_from_local(tmp_path / 'hostile.pth')
        assert not ran.exists()

    def test_the_milestones_of_a_schedule_load(self, tmp_path):
        content = dict(
            milestones=Counter([8, 11]), some={1, 2}, raw=bytearray(b'ab'), number=1 + 2j
        )
        torch.save(content, tmp_path / 'a.pth')
        assert load_from_local(tmp_path / 'a.pth') == content

    def test_torch_writes_no_file_that_a_checkpoint_asks_for(self, tmp_path):
        """torch compares the source of modules in its old format, and writes a patch where they differ."""

        def name(module, attribute):
            return b'c' + f'{module}\n{attribute}\n'.encode()

        def text(x):
            return b'X' + len(x).to_bytes(4, 'little') + x.encode()

        kind = name('torch._utils', '_rebuild_tensor_v2')
        state = text('dump_patches') + b'\x88' + text('__name__') + text(str(tmp_path / 'written'))
        asked = b'(' + text('module') + kind + text('a.py') + text('another source') + b'tQ'
        for pickled, said in (
            (kind + b'(N}(' + state + b'utb0' + asked, 'it sets the state of a function'),
            (asked, 'it asks torch for something other than storages'),
        ):
            file = io.BytesIO()
            torch.save({}, file, _use_new_zipfile_serialization=False)
            file.seek(0)
            for _ in range(3):  # a magic number, the version, the system
                pickle.load(file)
            begin = file.tell()
            pickle.load(file)
            whole, end = file.getvalue(), file.tell()
            (tmp_path / 'a.pth').write_bytes(
                whole[:begin] + b'\x80\x02' + pickled + b'.' + whole[end:]
            )
            with pytest.raises(
                ValueError, match=f'a.pth is refused, and nothing of it was run: {said}'
            ):
                load_from_local(tmp_path / 'a.pth')
            assert not (tmp_path / 'written.patch').exists()

    @pytest.mark.parametrize('place', PLACES)
    def test_from_any_place_that_mmengine_knows(self, tmp_path, ran, hostile, monkeypatch, place):
        def download(url, path, **_):
            shutil.copy(hostile, path)

        monkeypatch.setenv('TORCH_HOME', str(tmp_path))
        monkeypatch.setattr('torch.hub.download_url_to_file', download)
        monkeypatch.setattr(loading, 'get_torchvision_models', lambda: {'resnet50': PLACES[-1]})
        monkeypatch.setattr(
            loading, 'get_file_backend', lambda *_, **__: Store(hostile.read_bytes())
        )
        with safe_loading(), pytest.raises(ValueError, match='is refused') as caught:
            checkpoint.CheckpointLoader.load_checkpoint(place)
        assert not ran.exists()
        if 's3:' in place or 'petrel:' in place:
            assert f'checkpoint {place} is refused' in str(caught.value)

    def test_no_loader_of_mmengines_is_left(self, monkeypatch):
        schemes = {
            **checkpoint.CheckpointLoader._schemes,
            'new://': checkpoint.load_from_pavi,
            'mine://': load_from_mine,
        }
        monkeypatch.setattr(checkpoint.CheckpointLoader, '_schemes', schemes)
        with safe_loading():
            inside = dict(checkpoint.CheckpointLoader._schemes)
        assert inside.pop('mine://') is load_from_mine
        assert {loader.__module__ for loader in inside.values()} == {loading.__name__}
        assert {place.partition('://')[0] for place in PLACES} >= {
            prefix.partition('://')[0].replace(r'(\S+\:)?', '') for prefix in inside if prefix
        } - {'new'}
        assert checkpoint.CheckpointLoader._schemes == schemes


def load_from_mine(filename, map_location=None):
    """A loader that a user registered with mmengine."""


class Store:
    """The object store that mmengine reads by a client of its own."""

    def __init__(self, content):
        self.content = content

    @contextmanager
    def get_local_path(self, filename):
        with tempfile.NamedTemporaryFile() as file:
            file.write(self.content)
            file.flush()
            yield file.name


@pytest.mark.parametrize('content', [b'hello', b'this is junk, not a checkpoint at all'])
def test_what_is_no_checkpoint_at_all_is_said_to_be_none(tmp_path, content):
    """torch says '101' of the first, and 'pop from empty list' of the second."""
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(
        ValueError, match='a.pth cannot be read: torch did not write it, or it is damaged'
    ):
        load_from_local(tmp_path / 'a.pth')
