import cv2
import numpy as np
import pytest
from PIL import Image

from sasa_det.visualization.explorer import uploads
from sasa_det.visualization.explorer.uploads import read_upload


def saved(tmp_path, size, name='image.png', mode='RGB', **kwargs):
    path = tmp_path / name
    Image.new(mode, size).save(path, **kwargs)
    return path


def refused(path):
    with pytest.raises(ValueError) as raised:
        read_upload(path)
    return str(raised.value)


def test_pixels_are_bgr(image_file, image):
    assert np.array_equal(read_upload(image_file), image)


@pytest.mark.parametrize('name', ['a.bmp', 'a.jpg', 'a.png', 'a.tif', 'a.webp'])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_formats(tmp_path, name, mode):
    assert read_upload(saved(tmp_path, (40, 30), name, mode)).shape == (30, 40, 3)


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_upload(saved(tmp_path, (40, 30), 'a.jpg', exif=exif)).shape == (40, 30, 3)


def test_large_images_are_scaled_down(tmp_path):
    assert read_upload(saved(tmp_path, (2666, 1000))).shape == (500, 1333, 3)


def test_malformed_files(tmp_path, image_file):
    whole = image_file.read_bytes()
    for name, data in {
        'empty.png': b'',
        'text.png': b'not an image',
        'cut.png': whole[: len(whole) // 2],
        'page.svg': b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        'page.jpg': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n',
    }.items():
        (tmp_path / name).write_bytes(data)
        assert 'not an image that can be read' in refused(tmp_path / name)
    assert 'not an image' in refused(saved(tmp_path, (40, 30), 'moving.gif'))


def test_too_large(tmp_path, monkeypatch):
    # A few kilobytes that would decode to 300 MB.
    bomb = saved(tmp_path, (10001, 10000), 'bomb.png', mode='1')
    assert bomb.stat().st_size < 50_000
    assert 'more than 25 million pixels' in refused(bomb)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    assert 'more than 25 million pixels' in refused(bomb)
    monkeypatch.setattr(uploads, 'MEGABYTES', 0)
    assert 'larger than 0 MB' in refused(bomb)


def test_shapes_and_depths_that_are_refused(tmp_path):
    assert 'has 15 x 40 pixels' in refused(saved(tmp_path, (15, 40)))
    assert 'at most 10 times the shorter' in refused(saved(tmp_path, (401, 40)))
    assert 'more than 8 bits a pixel' in refused(saved(tmp_path, (40, 40), mode='I;16'))


def test_what_is_read_of_a_jpeg_is_what_training_reads(tmp_path, image):
    path = tmp_path / 'a.jpg'
    cv2.imwrite(str(path), cv2.GaussianBlur(image, (0, 0), 5))
    difference = read_upload(path).astype(int) - cv2.imread(str(path)).astype(int)
    assert np.abs(difference).max() <= 3
