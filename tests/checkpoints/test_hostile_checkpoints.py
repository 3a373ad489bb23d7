"""A checkpoint from others, wherever a user may name it: refused before anything of it runs."""

import random
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pytest
import torch
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, checkpoint

from sasa_det.checkpoints import loading
from sasa_det.checkpoints.detector import load_detector
from sasa_det.checkpoints.fit import describe_misfit, find_fitting_config, shapes
from sasa_det.checkpoints.loading import load_from_local, safe_loading
from sasa_det.cli.main import main
from sasa_det.data.digits import make_digits

pytestmark = pytest.mark.skipif(
    not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'),
    reason='this torch loads whole pickles unless told otherwise',
)
DIGITS = 'quickstart/retinanet_sasa-tiny_digits.py'
CONFIGS = Path(__file__).parents[2] / 'configs'


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

    def make(**options):
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
        return Runner.from_cfg(config)

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


def test_damaged_files_of_the_old_format_are_named(tmp_path):
    torch.save(
        {'state_dict': {'a': torch.zeros(20)}, 'meta': {'epoch': 1}}, tmp_path / 'old.pth',
        _use_new_zipfile_serialization=False,
    )  # fmt: skip
    whole = (tmp_path / 'old.pth').read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        spoilt = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            spoilt[generator.randrange(len(spoilt))] = generator.randrange(256)
        path = tmp_path / 'spoilt.pth'
        path.write_bytes(
            spoilt[: generator.choice((len(spoilt), generator.randrange(len(spoilt))))]
        )
        try:
            load_from_local(path)
        except ValueError as error:
            assert str(path) in str(error)


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


def as_pickle(value, path):
    """Write a file of torch whose pickle is this one, as a text of pickle's own words."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as whole:
        entries = {entry: whole.read(entry) for entry in whole.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as file:
        for name, content in entries.items():
            file.writestr(name, value if name.endswith('data.pkl') else content)


def random_pickle(generator):
    """Calls of what is allowed, with arguments and states of any kind: valid pickles, wrong content."""

    def text(x):
        return b'X' + len(x).to_bytes(4, 'little') + x.encode()

    def number(x):
        return b'J' + x.to_bytes(4, 'little', signed=True)

    def group(*parts):
        return b'(' + b''.join(parts) + b't'

    def name(module, attribute):
        return b'c' + f'{module}\n{attribute}\n'.encode()

    def content():
        size = generator.choice((0, 1, 8, 16, 64))
        return name('_codecs', 'encode') + group(text('A' * size), text('latin1')) + b'R'

    def dtype(depth=0):
        code = generator.choice(('f8', 'i4', 'b1', 'O8', 'V8', 'U4', 'O'))
        made = name('numpy', 'dtype') + group(text(code), b'\x89', b'\x88') + b'R'
        if generator.random() < 0.6:
            inner = [b'N', number(generator.choice((0, 8)))]
            if depth < 2:
                inner += [group(dtype(depth + 1), group(number(4))), dtype(depth + 1)]
            state = [number(generator.choice((1, 3, 4))), text(generator.choice('|<>=O'))]
            state += [generator.choice(inner) for _ in range(3)]
            state += [number(generator.choice((-1, 0, 8, 2**30))) for _ in range(2)]
            state.append(number(generator.choice((0, 1, 63, -1))))
            made += group(*state) + b'b'
        return made

    def array():
        shape = group(
            *(
                number(generator.choice((0, 1, 2, 8, -1, 2**30)))
                for _ in range(generator.randint(0, 3))
            )
        )
        if generator.random() < 0.3:
            return name('numpy', 'ndarray') + group(shape, dtype(), content()) + b'R'
        begun = name('numpy', 'ndarray'), group(number(0)), text('b')
        made = name('numpy._core.multiarray', '_reconstruct') + group(*begun) + b'R'
        return made + group(number(1), shape, dtype(), b'\x89', content()) + b'b'

    def scalar():
        return name('numpy._core.multiarray', 'scalar') + group(dtype(), content()) + b'R'

    def buffer():
        parts = (array(), array(), number(100))
        return name('mmengine.logging.history_buffer', 'HistoryBuffer') + group(*parts) + b'R'

    return b'\x80\x02' + generator.choice((dtype, array, scalar, buffer))() + b'.'


LOAD_EACH = """
import sys
from pathlib import Path
from sasa_det.checkpoints.loading import load_from_local

outcomes = set()
for path in sorted(Path(sys.argv[1]).glob('*.pth')):
    try:
        repr(load_from_local(path))
        outcomes.add('loaded')
    except ValueError as error:
        assert str(path) in str(error)
        outcomes.add('refused')
print(*sorted(outcomes))
"""


def test_no_state_of_numpys_types_ends_the_process(tmp_path):
    """A dtype of a file's own flags has numpy follow pointers that the file brings along."""
    generator = random.Random(0)
    for number in range(300):
        as_pickle(random_pickle(generator), tmp_path / f'{number}.pth')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', f'import sasa_det, mmengine\n{LOAD_EACH}', str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ['loaded', 'refused'] or done.stdout.split()[-1:] == [
        'refused'
    ]


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

    def test_no_state_of_numpys_types_ends_the_process(self, tmp_path):
        generator = random.Random(1)
        for number in range(100):
            as_pickle(random_pickle(generator), tmp_path / f'{number}.pth')
        code = 'import sasa_det, mmengine\nfrom sasa_det.checkpoints import loading\nloading.ASKS = False\n'
        command = [sys.executable, '-W', 'ignore', '-c', code + LOAD_EACH, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
