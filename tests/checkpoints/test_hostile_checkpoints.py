"""A checkpoint from others, wherever a user may name it: refused before anything of it runs."""

import random
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, checkpoint

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
