"""``sasa-det demo``: the detector that ships with the package, and the pictures that it draws."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sasa_det import demo
from sasa_det.checkpoints.loading import load_from_local
from sasa_det.checkpoints.written_config import plain, written_config
from sasa_det.cli.main import main
from sasa_det.configs import find_config, read_config


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """The folder of a run from a folder that cannot be written to, and what it printed."""
    folder, printed = tmp_path_factory.mktemp('drawn') / 'first pictures', io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir('/proc')
        assert main(['demo', '--out', str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """The digits as `sasa-det demo-data` makes them."""
    pytest.importorskip('sklearn')
    from sasa_det.data.digits import make_digits

    folder = tmp_path_factory.mktemp('data') / 'digits'
    return make_digits(folder, num_train=10, num_val=10, quiet=True)


def share_of_common_area(box, others):
    """IoU of a box with others, each as [x, y, width, height]."""
    x, y, width, height = box
    others = np.reshape(others, (-1, 4))
    low = np.maximum(others[:, :2], (x, y))
    high = np.minimum(others[:, :2] + others[:, 2:], (x + width, y + height))
    common = (high - low).clip(0).prod(1)
    return common / (width * height + others[:, 2:].prod(1) - common)


def test_its_images_are_of_the_digits(digits):
    """JPEG's decoders and encoders may round in other ways."""
    for path in demo.images():
        made = digits / 'val' / f'{int(path.stem.removeprefix("digits_")):06d}.jpg'
        image, same = (cv2.imread(str(each)).astype(int) for each in (path, made))
        assert np.abs(image - same).mean() < 2


def test_the_digits_are_found(drawn, digits):
    folder, _ = drawn
    truth = json.loads((digits / 'annotations/instances_val.json').read_text())['annotations']
    results = json.loads((folder / 'results.json').read_text())
    content = json.loads((folder / 'images.json').read_text())
    found = total = 0
    for image in content['images']:
        number = int(Path(image['file_name']).stem.removeprefix('digits_'))
        for entry in truth:
            if entry['image_id'] == number and not entry['iscrowd']:
                boxes = [
                    each['bbox']
                    for each in results
                    if each['image_id'] == image['id']
                    and each['category_id'] == entry['category_id']
                    and each['score'] >= 0.3
                ]
                total += 1
                found += share_of_common_area(entry['bbox'], boxes).max(initial=0) > 0.5
    assert total == 31
    assert found >= 28


def test_pictures_are_drawn_and_named(drawn):
    folder, printed = drawn
    pictures = sorted((folder / 'pictures').iterdir())
    assert [path.name for path in pictures] == [path.name for path in demo.images()]
    for path in (*pictures, folder / 'attention.png'):
        assert f'  {path}\n' in printed
        assert cv2.imread(str(path)) is not None
    for path in pictures:
        before = cv2.imread(str(folder / 'images' / path.name)).astype(int)
        assert np.abs(cv2.imread(str(path)) - before).mean() > 3


def test_what_it_ran_can_be_run_again(drawn):
    """As a shell reads it: the folder has a space in its name."""
    folder, printed = drawn
    explain = next(line for line in printed.splitlines() if line.startswith('$ sasa-det explain'))
    command = explain.removeprefix('$ sasa-det ').replace('attention.png', 'again.png')
    assert main(shlex.split(command)) == 0
    same = [cv2.imread(str(folder / name)) for name in ('attention.png', 'again.png')]
    assert np.array_equal(*same)


def test_the_next_commands_exist(drawn):
    _, printed = drawn
    _, _, after = printed.partition('What to do next:')
    named = re.findall(r'sasa-det ([\w-]+)', after)
    assert named == ['explore', 'predict', 'demo-data', 'train', 'coco-config']


@pytest.fixture(scope='module')
def content():
    """The checkpoint's, read by torch alone: nothing in it asks for more than weights."""
    return torch.load(demo.CHECKPOINT, 'cpu', weights_only=True)


class TestCheckpoint:
    def test_it_is_small(self, content):
        assert demo.CHECKPOINT.stat().st_size < 2e6
        assert content.keys() == {'state_dict', 'meta'}
        kinds = {value.dtype for value in content['state_dict'].values()}
        assert kinds == {torch.float16, torch.int64}

    def test_it_is_of_the_config_as_it_is_now(self):
        written = written_config(load_from_local(str(demo.CHECKPOINT), 'cpu'))
        config = read_config(find_config(demo.CONFIG))
        for name in ('model', 'train_dataloader', 'test_dataloader', 'optim_wrapper', 'train_cfg'):
            assert plain(written[name]) == plain(config[name])

    def test_it_says_what_made_it(self, content):
        meta = content['meta']
        facts = {name: meta[name] for name in ('config_name', 'seed', 'epochs', 'batch_size')}
        assert facts == dict(config_name=demo.CONFIG, seed=0, epochs=8, batch_size=8)
        assert meta['dataset_meta']['classes'][3] == 'three'
        assert 0.8 < meta['AP'] < 0.9
        # Neither where nor when.
        assert not re.search(r'/tmp|/home|/root|20[2-9]\d-|20\d{6}_', json.dumps(meta))


class TestRefusals:
    def refused(self, capsys, folder):
        assert main(['demo', '--out', str(folder)]) == 2
        _, line = capsys.readouterr().err.splitlines()
        return line

    def test_a_folder_that_cannot_be_written_to(self, capsys):
        said = self.refused(capsys, '/proc/first')
        assert said.startswith('sasa-det demo: /proc/first/digits.pth cannot be written (')
        assert said.endswith('; name another folder by --out')

    def test_a_file_in_the_place_of_the_folder(self, capsys, tmp_path):
        (tmp_path / 'first').write_text('precious')
        assert 'cannot be written (' in self.refused(capsys, tmp_path / 'first')
        assert (tmp_path / 'first').read_text() == 'precious'

    def test_a_file_of_another(self, capsys, tmp_path):
        (tmp_path / 'digits.pth').write_text('precious')
        said = self.refused(capsys, tmp_path)
        assert f'{tmp_path}/digits.pth is there already, with other content' in said
        assert [path.name for path in tmp_path.iterdir()] == ['digits.pth']
        assert (tmp_path / 'digits.pth').read_text() == 'precious'
