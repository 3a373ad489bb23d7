"""A config beside a checkpoint is used if training wrote it, and no other file is run."""

import pytest
import torch
from mmengine.config import Config

from sasa_det.checkpoints.written_config import config_beside, read_literals
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
        'a =',
        'a = [' * 5000,
        'a = 1 + 1',
    ],
)
def test_only_literals_are_read(text):
    assert read_literals(text) is None


def test_numbers_without_end_are_read():
    assert read_literals('a = -inf') == {'a': float('-inf')}


@pytest.mark.parametrize('kind', ['subprocess.Popen', 'os.system', 'mmengine.runner.Runner'])
def test_a_type_that_no_registry_holds_is_refused(tmp_path, config, kind):
    """mmengine imports and calls what such a type names, so that literals are enough to run code."""
    config.model.backbone = dict(type=kind, args=['touch', str(tmp_path / 'ran')])
    torch.save({'state_dict': {}, 'meta': {'cfg': config.pretty_text}}, tmp_path / 'epoch_1.pth')
    config.dump(tmp_path / 'config.py')
    with pytest.raises(ValueError, match=f'config.py: type={kind!r} is no name of a registry'):
        config_beside(tmp_path / 'epoch_1.pth')
