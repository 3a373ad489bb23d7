"""``sasa-det predict``: its pictures and results, what it skips, and what it leaves when interrupted."""

import json
import re

import cv2
import mmdet.apis
import numpy as np
import pytest
from mmengine.config import Config
from pycocotools.coco import COCO

from sasa_det.checkpoints.detector import load_detector
from sasa_det.cli import progress
from sasa_det.cli.images import find_sources, read_images
from sasa_det.cli.main import main


def predict(*inputs, checkpoint, out, more=()):
    inputs = [str(path) for path in inputs]
    return main(['predict', *inputs, '--checkpoint', str(checkpoint), '--out', str(out), *more])


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_results_are_those_of_mmdets_inference(trained, images, tmp_path, capsys):
    out = tmp_path / 'found'
    # Random weights score low.
    options = ['model.test_cfg.score_thr=0.0', 'model.test_cfg.max_per_img=20']
    more = ['--score-thr', '0', '--device', 'cpu', '--cfg-options', *options]
    assert predict(images, checkpoint=trained, out=out, more=more) == 0

    given = ['a.png', 'b.jpg', 'deeper/a.png']
    content = read(out, 'images.json')
    assert [image['file_name'] for image in content['images']] == given
    assert [(image['height'], image['width']) for image in content['images']] == [
        (64, 96), (80, 50), (50, 50),
    ]  # fmt: skip
    assert content['categories'][9] == dict(id=10, name='nine')

    results = read(out, 'results.json')
    config = Config.fromfile(trained.with_name('tiny.py'))
    config.merge_from_dict(dict(model=dict(test_cfg=dict(score_thr=0.0, max_per_img=20))))
    model = load_detector(config, trained)
    for image_id, name in enumerate(given, 1):
        expected = mmdet.apis.inference_detector(model, str(images / name)).pred_instances
        found = [entry for entry in results if entry['image_id'] == image_id]
        assert len(found) == len(expected) == 20
        corners = np.array([entry['bbox'] for entry in found])
        corners[:, 2:] += corners[:, :2]
        np.testing.assert_allclose(corners, expected.bboxes, atol=1e-3)
        np.testing.assert_allclose([e['score'] for e in found], expected.scores, rtol=1e-6)
        labels = [entry['category_id'] - 1 for entry in found]
        assert labels == expected.labels.tolist()

    # Boxes are drawn: the picture has the image's size and other pixels.
    for name in given:
        picture = cv2.imread(str((out / 'pictures' / name).with_suffix('.jpg')))
        original = cv2.imread(str(images / name))
        assert picture.shape == original.shape
        assert np.abs(picture.astype(int) - original).mean() > 10
    assert f'60 objects with a score of 0.0 or more in 3 images: {out}' in capsys.readouterr().out


def test_the_results_load_as_cocos(trained, images, tmp_path):
    out = tmp_path / 'found'
    options = ['--cfg-options', 'model.test_cfg.score_thr=0.0']
    assert predict(images / 'a.png', checkpoint=trained, out=out, more=options) == 0
    loaded = COCO(str(out / 'images.json')).loadRes(str(out / 'results.json'))
    assert len(loaded.anns) == len(read(out, 'results.json')) > 0


def test_colours_are_kept(trained, images, tmp_path):
    """Without boxes the picture is the image: red stays red."""
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 2] = 255
    cv2.imwrite(str(images / 'red.png'), red)
    out = tmp_path / 'found'
    more = ['--score-thr', '1.1']
    assert predict(images / 'red.png', checkpoint=trained, out=out, more=more) == 0
    picture = cv2.imread(str(out / 'pictures' / 'red.jpg')).reshape(-1, 3).mean(0)
    np.testing.assert_allclose(picture, (0, 0, 255), atol=8)


def test_each_image_has_a_picture_of_its_own(trained, tmp_path):
    names = ['a.bmp.jpg', 'a.jpg', 'a.bmp', 'a.bmp.png']
    for level, name in enumerate(names):
        cv2.imwrite(str(tmp_path / name), np.full((32, 32, 3), 60 * level, np.uint8))
    out, more = tmp_path / 'found', ['--score-thr', '1.1']
    inputs = [tmp_path / name for name in names]
    assert predict(*inputs, checkpoint=trained, out=out, more=more) == 0
    levels = sorted(cv2.imread(str(path)).mean() for path in (out / 'pictures').iterdir())
    np.testing.assert_allclose(levels, [0, 60, 120, 180], atol=5)


def test_pictures_are_not_written_over_the_inputs(trained, images, tmp_path, capsys):
    out = tmp_path / 'found'
    inputs = images.rename(out.mkdir() or out / 'pictures')
    before = {path: path.read_bytes() for path in inputs.rglob('*') if path.is_file()}
    for given in (inputs, inputs / 'deeper', inputs / 'b.jpg'):
        assert predict(given, checkpoint=trained, out=out) == 2
        assert f'would be written over the inputs in {inputs};' in capsys.readouterr().err
    assert {path: path.read_bytes() for path in inputs.rglob('*') if path.is_file()} == before


def test_an_image_that_cannot_be_read_is_named_and_skipped(trained, images, tmp_path, capsys):
    (images / 'aa.png').write_text('not an image')
    (images / 'empty.jpg').touch()
    out = tmp_path / 'found'
    assert predict(images, checkpoint=trained, out=out) == 1
    printed = capsys.readouterr()
    for name in ('aa.png', 'empty.jpg'):
        assert f'skipped: {images / name}: not an image that can be decoded' in printed.err
    assert 'in 3 images, 2 could not be read' in printed.out
    names = [image['file_name'] for image in read(out, 'images.json')['images']]
    assert names == ['a.png', 'b.jpg', 'deeper/a.png']


def test_ctrl_c_leaves_what_was_done(trained, images, tmp_path, monkeypatch, capsys):
    done, inference = [], mmdet.apis.inference_detector

    def interrupted(model, pixels):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(pixels)
        return inference(model, pixels)

    monkeypatch.setattr(mmdet.apis, 'inference_detector', interrupted)
    out = tmp_path / 'found'
    assert predict(images, checkpoint=trained, out=out) == 130
    assert [image['id'] for image in read(out, 'images.json')['images']] == [1, 2]
    assert {entry['image_id'] for entry in read(out, 'results.json')} <= {1, 2}
    assert len(list((out / 'pictures').iterdir())) == 2
    assert 'sasa-det predict: interrupted' in capsys.readouterr().err


def test_frames_of_a_video(trained, tmp_path):
    video = tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*'MJPG'), 5, (64, 48))
    assert writer.isOpened()
    for level in (0, 100, 200):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    out = tmp_path / 'found'
    assert predict(video, checkpoint=trained, out=out, more=['--score-thr', '1.1']) == 0
    content = read(out, 'images.json')['images']
    assert [image['file_name'] for image in content] == [
        f'clip.avi/{number:06d}.jpg' for number in (1, 2, 3)
    ]
    levels = [
        cv2.imread(str(out / 'pictures' / image['file_name'])).mean().round() for image in content
    ]
    np.testing.assert_allclose(levels, (0, 100, 200), atol=5)


def test_it_shows_what_it_loads_and_counts(trained, images, tmp_path, monkeypatch, capsys):
    def said():
        assert (
            predict(images, checkpoint=trained, out=tmp_path / 'found', more=['--device', 'cpu'])
            == 0
        )
        return capsys.readouterr().err

    start = [
        f'Loading {trained}',
        f'detector: {trained} with {trained.with_name("tiny.py")} on cpu',
        'Detecting: 0 of 3',
    ]
    assert [
        line for line in said().splitlines() if line.startswith(('Load', 'det', 'Det'))
    ] == start
    monkeypatch.setattr(progress, 'EVERY', 0)
    counts = [line for line in said().splitlines() if line.startswith('Detecting')]
    assert counts == [f'Detecting: {done} of 3' for done in range(4)]
    # In a terminal, a bar; not in one that cannot draw over what it has shown.
    monkeypatch.setenv('FORCE_COLOR', '1')
    monkeypatch.setenv('TERM', 'dumb')
    lines = said().splitlines()
    assert f'Loading {trained}' in lines and 'Detecting: 3 of 3' in lines
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setenv('COLUMNS', '500')  # the names of folders are long
    text = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', said())
    assert f'Loading {trained}' in text and '3/3' in text and 'Detecting: ' not in text


def test_what_is_no_video_is_skipped(trained, images, tmp_path, capsys):
    fake = tmp_path / 'clip.mp4'
    fake.write_text('not a video')
    assert predict(fake, checkpoint=trained, out=tmp_path / 'found') == 1
    assert f'skipped: {fake}: not a video that can be decoded' in capsys.readouterr().err


def test_files_of_one_name_do_not_overwrite_each_other(images):
    sources = find_sources([images / 'a.png', images / 'deeper' / 'a.png', images / 'deeper'])
    assert [source.name.as_posix() for source in sources] == ['a.png', 'a_2.png', 'a_3.png']
    shapes = [image.pixels.shape for image in read_images(sources)]
    assert shapes == [(64, 96, 3), (50, 50, 3), (50, 50, 3)]


def test_images_of_one_name_get_a_picture_each(trained, tmp_path):
    (tmp_path / 'images').mkdir()
    for name, value in (('a.jpg', 0), ('a.png', 255), ('b.png', 128)):
        cv2.imwrite(str(tmp_path / 'images' / name), np.full((40, 50, 3), value, np.uint8))
    assert predict(tmp_path / 'images', checkpoint=trained, out=tmp_path / 'found') == 0
    pictures = {path.name: path for path in (tmp_path / 'found' / 'pictures').iterdir()}
    assert pictures.keys() == {'a.jpg', 'a.png.jpg', 'b.jpg'}
    brightness = [cv2.imread(str(pictures[name])).mean() for name in sorted(pictures)]
    assert brightness[0] < brightness[2] < brightness[1]


class TestErrorsOfTheOutsideWorld:
    """One message that names the file, and exit status 2."""

    @pytest.mark.parametrize(
        'change, message',
        [
            (dict(inputs='nowhere.jpg'), 'nowhere.jpg: no such file or folder'),
            (dict(checkpoint='nowhere.pth'), 'nowhere.pth: no such checkpoint'),
            (dict(config='nowhere.py'), 'nowhere.py: no such config'),
            (
                dict(config='retinanet_tiny_digits'),
                'its weights are not those of .*retinanet_tiny_digits.py. .* have another shape:',
            ),
            (dict(option='novalue'), "--cfg-options takes key=value, but got 'novalue'"),
            (
                dict(option='model.neck.attn_cfg.kernel=3'),
                "attn_cfg has the unknown key 'kernel'; it takes kernel_size",
            ),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
    )
    def test_arguments(self, trained, images, tmp_path, capsys, change, message):
        argv = ['predict', change.get('inputs', str(images))]
        argv += ['--checkpoint', change.get('checkpoint', str(trained))]
        argv += ['--out', str(tmp_path / 'found')]
        argv += ['--config', change['config']] if 'config' in change else []
        argv += ['--cfg-options', change['option']] if 'option' in change else []
        assert main(argv) == 2
        said = capsys.readouterr().err.strip().splitlines()
        line = next(line for line in said if line.startswith('sasa-det predict: '))
        assert re.search(message, line), line

    def test_a_checkpoint_that_is_none(self, trained, images, tmp_path, capsys):
        broken = tmp_path / 'broken.pth'
        broken.write_text('not a checkpoint')
        (tmp_path / 'tiny.py').write_text(trained.with_name('tiny.py').read_text())
        assert predict(images, checkpoint=broken, out=tmp_path / 'found') == 2
        said = capsys.readouterr().err
        assert (
            f'checkpoint {broken} is refused' in said and 'no file that torch.save writes' in said
        )
        assert 'weights_only' not in said

    @pytest.mark.parametrize(
        'content, message',
        [
            ('model = dict(', r'cannot be read as a config \(SyntaxError'),
            ("_base_ = 'nowhere.py'", r'cannot be read as a config \(FileNotFoundError'),
            ('a = 1', 'has no `model`, so it is no config of a detector'),
        ],
    )
    def test_a_config_that_is_none(self, trained, images, tmp_path, capsys, content, message):
        path = tmp_path / 'mine.py'
        path.write_text(content)
        more = ['--config', str(path)]
        assert predict(images, checkpoint=trained, out=tmp_path / 'found', more=more) == 2
        assert re.search(f'{re.escape(str(path))}: {message}', capsys.readouterr().err)

    def test_no_config_beside_the_checkpoint(self, trained, images, tmp_path, capsys):
        alone = tmp_path / 'epoch_1.pth'
        alone.write_bytes(trained.read_bytes())
        assert predict(images, checkpoint=alone, out=tmp_path / 'found') == 2
        assert (
            'none is the one that it was trained with; there are: none. Name the config'
            in capsys.readouterr().err
        )

    def test_a_folder_without_images(self, trained, tmp_path, capsys):
        empty = tmp_path / 'empty'
        empty.mkdir()
        assert predict(empty, checkpoint=trained, out=tmp_path / 'found') == 2
        assert f'{empty}: neither images nor videos' in capsys.readouterr().err

    def test_traceback_on_demand(self, tmp_path):
        argv = ['--traceback', 'predict', 'nowhere.jpg', '--checkpoint', 'x', '--out', 'y']
        with pytest.raises(FileNotFoundError, match='nowhere.jpg'):
            main(argv)


def test_a_config_without_test_data_is_named(trained):
    config = Config.fromfile(trained.with_name('tiny.py'))
    config.test_dataloader = None
    with pytest.raises(ValueError, match='tiny.py: test_dataloader is not set'):
        load_detector(config, trained)
