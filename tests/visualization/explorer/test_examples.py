import cv2
import pytest

pytest.importorskip('sklearn', reason='the examples are made of what scikit-learn ships')

from sasa_det.visualization.explorer.examples import make_examples


def test_three_images_and_nothing_else(tmp_path):
    paths = make_examples(tmp_path)
    assert sorted(tmp_path.iterdir()) == paths and len(paths) == 3
    images = [cv2.imread(str(path)) for path in paths]
    assert [image.shape for image in images] == [(192, 192, 3)] * 3
    assert len({image.tobytes() for image in images}) == 3
