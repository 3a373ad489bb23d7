"""A config beside a checkpoint is used if training wrote it, and no other file is run."""

import os
import pickle

import pytest
import torch
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from sasa_det.checkpoints.detector import load_detector
from sasa_det.checkpoints.fit import describe_misfit, require_fit_before_run
from sasa_det.checkpoints.loading import safe_loading
from sasa_det.checkpoints.written_config import config_beside, read_literals
from sasa_det.cli.main import main
from sasa_det.configs import find_config, read_config


@pytest.fixture
def config():
    return read_config(find_config('retinanet_sasa-tiny_digits'))


@pytest.fixture
def checkpoint(tmp_path, config):
    torch.save({'state_dict': {}, 'meta': {'cfg': config.pretty_text}}, tmp_path / 'epoch_1.pth')
    return tmp_path / 'epoch_1.pth'


def test_what_training_wrote_is_found_and_is_the_same(checkpoint, config):
    config.dump(checkpoint.with_name('any.py'))
    found = config_beside(checkpoint)
    assert found.filename == str(checkpoint.with_name('any.py'))
    assert found.to_dict() == Config.fromfile(found.filename).to_dict() == config.to_dict()


def test_keys_that_are_no_names_of_arguments_are_read(config):
    """Of parts of the model, as in paramwise_cfg and in a converted detector's config."""
    keys = {'backbone.layer1': dict(lr_mult=0.1), 'b': [{'c.d': ({},)}]}
    config.optim_wrapper.paramwise_cfg = dict(custom_keys=keys)
    assert read_literals(config.pretty_text) == config.to_dict()


def test_another_file_is_not_run(checkpoint, config, tmp_path):
    ran = tmp_path / 'ran'
    code = f'import pathlib; pathlib.Path({str(ran)!r}).touch()\n'
    checkpoint.with_name('other.py').write_text(code)
    for text in (code + config.pretty_text, config.pretty_text + f'a = open({str(ran)!r}, "w")\n'):
        checkpoint.with_name('hidden.py').write_text(text)
        with pytest.raises(
            ValueError, match='none is the one .*hidden.py, other.py. Name the config'
        ):
            config_beside(checkpoint)
    checkpoint.with_name('hidden.py').unlink()
    config.dump(checkpoint.with_name('mine.py'))
    assert config_beside(checkpoint).filename.endswith('mine.py')
    assert not ran.exists()


def test_a_config_of_another_model_is_not_taken(checkpoint, config):
    config.model.backbone.depth = 38
    config.dump(checkpoint.with_name('deeper.py'))
    with pytest.raises(ValueError, match='none is the one'):
        config_beside(checkpoint)


def test_two_that_fit_are_named(checkpoint, config):
    config.dump(checkpoint.with_name('a.py'))
    config.dump(checkpoint.with_name('b.py'))
    with pytest.raises(ValueError, match='more than one .* a.py, b.py'):
        config_beside(checkpoint)


@pytest.mark.parametrize(
    'text',
    [
        'a = f()',
        'a = b = 1',
        'a.b = 1',
        'if 1: a = 1',
        'a = dict(f())',
        "a = dict({'b.c': f()})",
        'a = dict({}, {})',
        'a =',
        'a = [' * 5000,
        'a = 1 + 1',
    ],
)
def test_only_literals_are_read(text):
    assert read_literals(text) is None


def test_numbers_without_end_are_read():
    assert read_literals('a = -inf') == {'a': float('-inf')}


def write_both(folder, config, weights=()):
    torch.save(
        {'state_dict': dict(weights), 'meta': {'cfg': config.pretty_text}}, folder / 'epoch_1.pth'
    )
    config.dump(folder / 'config.py')
    return folder / 'epoch_1.pth'


@pytest.mark.parametrize(
    'kind',
    [
        'subprocess.Popen',
        'os.system',
        'mmengine.runner.Runner',
        'mmengine.load',
        'mmdet.load',
        'code_of_mine',
    ],
)
def test_a_type_that_no_registry_holds_is_refused(tmp_path, config, kind):
    """mmengine imports and calls what such a type names, so that literals are enough to run code."""
    config.model.backbone = dict(type=kind, args=['touch', str(tmp_path / 'ran')])
    with pytest.raises(ValueError, match=f'config.py: type={kind!r} is no name of a registry'):
        config_beside(write_both(tmp_path, config))


@pytest.mark.parametrize(
    ('key', 'value', 'said'),
    [
        ('model.test_cfg.nms.type', 'exec("1")', 'type=.* is no name of a registry'),
        (
            'custom_imports.imports',
            ['code_of_mine'],
            "custom_imports='code_of_mine' is of none of sasa_det,",
        ),
        ('custom_imports', 'code_of_mine', "custom_imports='code_of_mine' is of none of sasa_det,"),
        ('model._scope_', 'code_of_mine', "_scope_='code_of_mine' is none of mm"),
        ('default_scope', 'code_of_mine', "default_scope='code_of_mine' is none of mm"),
        (
            'test_dataloader.dataset.proposal_file',
            'a.pkl',
            "proposal_file='a.pkl' may be read as a pickle",
        ),
        (
            'model.teacher_config',
            'code_of_mine.py',
            "teacher_config='code_of_mine.py' may be .* run as Python",
        ),
        (
            'backend_args',
            dict(backend='memcached', sys_path='.'),
            "sys_path='.' may be .* run as Python",
        ),
    ],
)
def test_an_option_that_would_run_code_is_refused(tmp_path, config, monkeypatch, key, value, said):
    (tmp_path / 'code_of_mine.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")')
    monkeypatch.syspath_prepend(tmp_path)
    config.merge_from_dict({key: value})
    with pytest.raises(ValueError, match=f'config.py: {said}.*; if you trust the file, name it by'):
        config_beside(write_both(tmp_path, config))
    assert not (tmp_path / 'ran').exists()


@pytest.fixture
def weights(config):
    config.merge_from_dict({
        'model.backbone.base_channels': 8, 'model.neck.in_channels': [32, 64, 128, 256],
    })  # fmt: skip
    init_default_scope('mmdet')
    return MODELS.build(config.model).state_dict()


class Hostile:
    """Its pickle makes a folder."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


@pytest.mark.parametrize('suffix', ['pkl', 'yaml'])
def test_the_data_set_is_not_read_for_its_colours(tmp_path, config, weights, suffix):
    """mmdet builds it, and a data set in another one reads its file, whatever the config says."""
    ran, file = tmp_path / 'ran', tmp_path / f'boxes.{suffix}'
    yaml = f'!!python/object/apply:os.mkdir [{ran}]'
    file.write_bytes(pickle.dumps(Hostile(ran)) if suffix == 'pkl' else yaml.encode())
    dataset = dict(type='BaseDetDataset', ann_file=str(file), metainfo=dict(palette=[(1, 2, 3)]))
    config.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[dataset])
    checkpoint = write_both(tmp_path, config, weights)
    model = load_detector(config_beside(checkpoint), checkpoint)
    assert model.dataset_meta['palette'] == [(1, 2, 3)]
    assert not ran.exists()


@pytest.mark.parametrize('palette', [None, [(1, 2, 3)]])
def test_colours_are_those_that_mmdet_chooses(tmp_path, config, weights, palette):
    if palette:
        config.test_dataloader.dataset.metainfo.palette = palette
    checkpoint = write_both(tmp_path, config, weights)
    with safe_loading():
        expected = init_detector(config.copy(), str(checkpoint), device='cpu').dataset_meta[
            'palette'
        ]
    assert load_detector(config, checkpoint).dataset_meta['palette'] == expected


@pytest.mark.parametrize(
    'name', ['retinanet_sasa-r50_sasa-fpn_sasa-head_1x_coco', 'retinanet_tiny_coco-format']
)
def test_configs_of_the_package_are_taken(tmp_path, name):
    config = read_config(find_config(name))
    assert config_beside(write_both(tmp_path, config)).model.type == 'RetinaNet'


def test_what_else_may_lie_there_is_no_reason_to_wait_or_fail(tmp_path, checkpoint):
    os.mkfifo(tmp_path / 'pipe.py')
    with pytest.raises(ValueError, match='none is the one'):
        config_beside(checkpoint)
    torch.save([1], checkpoint)
    with pytest.raises(ValueError, match='none is the one'):
        config_beside(checkpoint)


class TestMisfit:
    """Weights of a config that is not the one given: the error names the one beside the checkpoint."""

    @pytest.fixture
    def trained(self, tmp_path, config, weights):
        config.dump(tmp_path / 'mine.py')
        meta = {
            'cfg': config.pretty_text,
            'dataset_meta': {'classes': tuple(config.metainfo.classes)},
        }
        torch.save({'state_dict': weights, 'meta': meta}, tmp_path / 'epoch_1.pth')
        return tmp_path / 'epoch_1.pth'

    @pytest.fixture(autouse=True)
    def no_search(self, monkeypatch):
        def refuse(found):
            raise AssertionError('it builds the configs of the package, which takes long')

        monkeypatch.setattr('sasa_det.checkpoints.fit.find_fitting_config', refuse)

    def test_predict_and_explain_name_it(self, trained):
        other = read_config(find_config('retinanet_sasa-tiny_digits'))
        beside = trained.with_name('mine.py')
        with pytest.raises(
            ValueError, match=f'It was trained with the config beside it: {beside}$'
        ):
            load_detector(other, trained)

    def test_test_names_it_before_it_reads_data(self, trained, tmp_path, monkeypatch, capsys):
        """The data is not there, and the working folder of the run is not made."""
        monkeypatch.chdir(tmp_path)
        assert main(['test', 'retinanet_sasa-tiny_digits', str(trained), '--work-dir', 'run']) == 2
        said = capsys.readouterr().err
        assert said.startswith(
            f"sasa-det test: checkpoint {trained} is not of this config's model."
        )
        assert said.endswith(f'It was trained with the config beside it: {tmp_path}/mine.py\n')
        assert not (tmp_path / 'run').exists()

    def test_report_names_it_and_writes_nothing(self, trained, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        more = ['--predictions', 'none.pkl', '--work-dir', 'run']
        assert main(['report', 'retinanet_sasa-tiny_digits', str(trained), *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"sasa-det report: checkpoint {trained} is not of this config's")
        assert not (tmp_path / 'run').exists()

    @pytest.mark.parametrize('how', ['named', 'found', 'in the config'])
    def test_a_resumed_training_names_it_before_it_reads_data(
        self, trained, tmp_path, monkeypatch, capsys, how
    ):
        monkeypatch.chdir(tmp_path)
        more = {
            'named': ['--resume', str(trained), '--work-dir', 'run'],
            'found': ['--resume', '--work-dir', str(tmp_path)],
            'in the config': [
                '--work-dir',
                'run',
                '--cfg-options',
                'resume=True',
                f'load_from={trained}',
            ],
        }[how]
        assert main(['train', 'retinanet_sasa-tiny_digits', *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith(
            f"sasa-det train: checkpoint {trained} is not of this config's model."
        )
        assert said.endswith(f'It was trained with the config beside it: {tmp_path}/mine.py\n')

    def test_a_training_does_not_go_on_from_weights_alone(
        self, trained, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.chdir(tmp_path)
        assert main(['train', 'mine.py', '--work-dir', 'run', '--resume', str(trained)]) == 2
        said = capsys.readouterr().err
        assert f"{trained} has no 'message_hub' and no 'optimizer', so a run cannot go on" in said

    @pytest.mark.parametrize('content', [None, [1], {'state_dict': [1]}, {'state_dict': {1: 2}}])
    def test_what_holds_no_weights_is_named(self, trained, content):
        torch.save(content, trained)
        config = read_config(trained.with_name('mine.py'))
        with pytest.raises(ValueError, match=f'checkpoint {trained} holds no weights by name'):
            require_fit_before_run(config, trained)

    def test_options_of_the_command_count(self, trained, tmp_path, monkeypatch, capsys):
        """The config is the checkpoint's but for an option; with the right options the data is missing next."""
        monkeypatch.chdir(tmp_path)
        more = ['--work-dir', 'run', '--cfg-options', 'model.backbone.attn_cfg.kernel_size=3']
        assert main(['test', 'mine.py', str(trained), *more]) == 2
        assert 'kernel_size=5, not 3' in capsys.readouterr().err
        more = [
            '--cfg-options',
            'model.backbone.base_channels=8',
            'model.neck.in_channels=[32,64,128,256]',
        ]
        assert main(['test', 'retinanet_sasa-tiny_digits', str(trained), *more]) == 2
        assert 'instances_val.json' in capsys.readouterr().err.splitlines()[-1]

    def test_a_config_of_the_same_model_is_not_named(self, trained, config):
        """Here the weights themselves differ."""
        saved = torch.load(trained)
        saved['state_dict'].popitem()
        model = MODELS.build(config.model)
        said = describe_misfit(model, saved, config.model, path=trained, search=False)
        assert '1 weight is not in the checkpoint' in said and 'beside' not in said
