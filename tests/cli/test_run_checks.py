"""A run writes its config into its work_dir, and not over one that somebody wrote there."""

import pytest
from mmengine.config import Config

from sasa_det.cli.main import main
from sasa_det.cli.run_checks import check_run

MINE = "# What I tried last.\n_base_ = 'sasa_det::quickstart/retinanet_sasa-tiny_digits.py'\n"


def check(tool, config, work_dir, **given):
    read = Config.fromfile(config) if config.is_file() else Config()
    read.pop('default_hooks', None)
    given = dict(resume=None, checkpoint='https://host/a.pth', launcher='none', **given)
    check_run(tool, read, dict(config=str(config), work_dir=work_dir and str(work_dir), **given))


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / 'exp/mine.py'
    path.parent.mkdir()
    path.write_text(MINE)
    return path


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_a_config_in_its_own_work_dir_is_kept(tool, mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = ['a.pth'] if tool == 'test' else []
    (tmp_path / 'a.pth').touch()
    assert main([tool, 'exp/mine.py', *checkpoint, '--work-dir', 'exp']) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f'sasa-det {tool}: exp/mine.py would be replaced: a run writes its config'
    )
    assert mine.read_text() == MINE
    assert [path.name for path in mine.parent.iterdir()] == ['mine.py']


@pytest.mark.parametrize('text', [MINE, 'a = 1  # flat, with a comment', 'import torch', 'a = ('])
def test_so_is_another_of_its_name(mine, tmp_path, text):
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'mine.py').write_text(text)
    with pytest.raises(ValueError, match='other/mine.py would be replaced'):
        check('train', mine, other)
    check('train', mine, tmp_path / 'new')


def test_what_a_run_wrote_is_run_again(mine):
    """From there, with its keys that are no names of arguments."""
    config = Config.fromfile(mine)
    config.optim_wrapper.paramwise_cfg = dict(custom_keys={'backbone.layer1': dict(lr_mult=0.1)})
    written = mine.parent / 'run/mine.py'
    written.parent.mkdir()
    config.dump(written)
    for given in (mine, written):
        check('train', given, written.parent)


def test_a_work_dir_that_is_the_config(mine):
    with pytest.raises(ValueError, match='mine.py is a file; name a folder by --work-dir'):
        check('train', mine, mine)
