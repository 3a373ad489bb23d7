"""Does an exported file find the same boxes on real images as PyTorch?"""

from contextlib import suppress
from pathlib import Path
from typing import Iterable, List, NamedTuple, Union

import numpy as np
import torch
from torch import nn

from .decoded import DecodedDetector
from .onnx_library import native_op_library

BOX_LIMIT = 0.01  # pixels
SCORE_LIMIT = 1e-4


class Deviation(NamedTuple):
    """The deviation of an exported model from PyTorch.

    Attributes:
        boxes: Number of compared boxes.
        box: The largest difference of a coordinate, in pixels.
        score: The largest difference of a score.
        unmatched: Number of boxes that only one of the two found, beyond rounding.
    """

    boxes: int
    box: float
    score: float
    unmatched: int = 0

    @property
    def small(self) -> bool:
        """Whether the deviation is within the limits.

        Examples:
            >>> Deviation(10, box=0.001, score=1e-6).small
            True
        """
        return self.box <= BOX_LIMIT and self.score <= SCORE_LIMIT and not self.unmatched


def load_images(config, paths: Iterable[Union[str, Path]]) -> List[dict]:
    """Load images as the config's test pipeline does.

    Args:
        config: The detector's.
        paths: Image files.

    Returns:
        The ``inputs`` and ``data_samples`` of each.

    Raises:
        ValueError: The config has no test pipeline, or a file is not an image.
    """
    from mmcv.transforms import Compose

    pipeline = test_pipeline(config)
    run = Compose([step for step in pipeline if 'LoadAnnotations' not in step['type']])
    loaded = []
    for path in paths:
        try:
            loaded.append(run(dict(img_path=str(path), img_id=0)))
        except Exception as error:  # a transform may raise any error
            raise ValueError(f'{path}: cannot be loaded by the test pipeline ({error})') from error
    return loaded


def test_pipeline(config) -> list:
    """Find the pipeline that loads a config's test images.

    Args:
        config: The detector's.

    Raises:
        ValueError: There is none; names the key.
    """
    try:
        return list(config.test_dataloader.dataset.pipeline)
    except AttributeError:
        raise ValueError(
            f'{config.filename}: has no test pipeline (test_dataloader.dataset.pipeline), by which images '
            'are loaded'
        ) from None


def open_session(path: Union[str, Path], threads: int = 0, spinning: bool = True):
    """Open a file of either kind, ``--op standard`` or ``native``, in onnxruntime on the CPU.

    Args:
        path: The file.
        threads: Number of threads; 0 leaves it to onnxruntime.
        spinning: Whether threads wait for work by keeping the cores busy, as onnxruntime's do by default.

    Returns:
        An ``onnxruntime.InferenceSession``.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # otherwise it warns of each constant that it does not fold
    options.intra_op_num_threads = threads
    options.add_session_config_entry('session.intra_op.allow_spinning', str(int(spinning)))
    # A file of standard operators does not need the library, and it may not be built.
    with suppress(FileNotFoundError):
        options.register_custom_ops_library(native_op_library())
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def check_onnx(path: Union[str, Path], detector: nn.Module, images: List[dict], nms: bool):
    """Run a file in onnxruntime and compare with PyTorch, image by image.

    Args:
        path: The file.
        detector: The detector that it was exported from.
        images: See :func:`load_images`.
        nms: Whether the file includes NMS.

    Returns:
        The largest :class:`Deviation`, over all images.
    """
    session = open_session(path)
    found = []
    for image in images:
        pixels = image['inputs'][None].float()
        exported = session.run(None, {'images': pixels.numpy()})
        found.append((_compare_found if nms else _compare_all)(detector, image, pixels, exported))
    boxes, box, score, unmatched = zip(*found)
    return Deviation(sum(boxes), max(box), max(score), sum(unmatched))


@torch.no_grad()
def _compare_all(detector, image, pixels, exported) -> Deviation:
    expected = [each.numpy() for each in DecodedDetector(detector).eval()(pixels)]
    box, score = (float(np.abs(a - b).max()) for a, b in zip(exported, expected))
    return Deviation(expected[0].shape[1], box, score)


@torch.no_grad()
def _compare_found(detector, image, pixels, exported) -> Deviation:
    data = dict(inputs=[image['inputs']], data_samples=[image['data_samples'].clone()])
    data = detector.data_preprocessor(data, False)
    found = detector.predict(data['inputs'], data['data_samples'], rescale=False)[0].pred_instances
    expected = [found[name].numpy() for name in ('bboxes', 'scores', 'labels')]
    cfg = detector.test_cfg
    return compare_found(expected, exported[:3], cfg.get('score_thr', 0), cfg.max_per_img)


def compare_found(expected, exported, score_thr: float, most: int) -> Deviation:
    """Compare two lists of detections, in any order.

    Near the lowest listed score, within its limit, a box may be in one list alone.

    Args:
        expected: Boxes, scores and labels, as arrays.
        exported: The same, of the exported model.
        score_thr: The score below which no box is listed.
        most: The maximum length of a list.

    Examples:
        >>> found = np.array([[0., 0., 9., 9.]]), np.array([0.5]), np.array([3])
        >>> compare_found(found, (found[0] + 0.5, *found[1:]), 0.05, 100)
        Deviation(boxes=1, box=0.5, score=0.0, unmatched=0)
    """
    free = list(range(len(exported[1])))
    box = score = 0.0
    left = []
    for corners, value, label in zip(*expected):
        same = [each for each in free if exported[2][each] == label]
        if not same:
            left.append(value)
            continue
        apart = np.abs(exported[0][same] - corners).max(1)
        if apart.min() > 1:  # another object, or one that the other list lacks
            left.append(value)
            continue
        match = same[int(apart.argmin())]
        free.remove(match)
        box = max(box, float(apart.min()))
        score = max(score, abs(float(exported[1][match] - value)))
    left += [exported[1][each] for each in free]
    end = score_thr
    for scores in (expected[1], exported[1]):
        if len(scores) >= most:
            end = max(end, float(np.min(scores)))
    unmatched = sum(value > end + SCORE_LIMIT for value in left)
    return Deviation(len(expected[1]), box, score, int(unmatched))
