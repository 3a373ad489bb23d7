from copy import deepcopy

import pytest
import torch
from mmcv.ops import batched_nms
from mmdet.structures import DetDataSample
from small_detectors import DETECTORS, build

from sasa_det.export.decoded import Candidates, DecodedDetector, check_nms


def mmdets_own(detector, images, **options):
    """What mmdet's head makes of the same images."""
    height, width = images.shape[2:]
    samples = [DetDataSample(metainfo=dict(img_shape=(height, width))) for _ in images]
    data = detector.data_preprocessor(dict(inputs=list(images), data_samples=samples))
    metas = [dict(img_shape=(height, width)) for _ in images]
    outputs = detector.bbox_head(detector.extract_feat(data['inputs']))
    return detector.bbox_head.predict_by_feat(*outputs, batch_img_metas=metas, **options)


@pytest.mark.parametrize('kind', DETECTORS)
@torch.no_grad()
def test_every_box_and_score_is_mmdets(kind, images):
    detector = build(kind)
    cfg = deepcopy(detector.test_cfg)
    cfg.update(nms_pre=10**6, score_thr=-1.0, min_bbox_size=-1)
    expected = mmdets_own(detector, images, cfg=cfg, with_nms=False)
    boxes, scores = DecodedDetector(detector)(images)
    assert scores.std() > 0.01
    for image, found in enumerate(expected):
        assert len(found) == scores[image].numel()
        # mmdet lists pairs of box and class level by level, best first.
        ours = torch.cat([boxes[image].repeat_interleave(3, 0), scores[image].reshape(-1, 1)], 1)
        theirs = torch.cat([found.bboxes, found.scores[:, None]], 1)
        keys = [torch.cat([each, each.new_zeros(1, 5)])[:-1].double() for each in (ours, theirs)]
        ours, theirs = (each[sort_rows(each)] for each in keys)
        assert torch.allclose(ours, theirs, atol=1e-4)


def sort_rows(rows):
    """An order of rows that small differences do not change: by a random direction."""
    weights = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    return (rows @ weights).argsort()


@pytest.mark.parametrize('kind', DETECTORS)
@torch.no_grad()
def test_suppressed_candidates_are_what_mmdet_finds(kind, images):
    detector = build(kind)
    expected = mmdets_own(detector, images)
    boxes, scores, labels = Candidates(detector)(images)
    assert boxes.shape == (2, 3 * 60, 4)
    for image, found in enumerate(expected):
        part = scores[image] >= 0
        left, kept = batched_nms(
            boxes[image][part], scores[image][part], labels[image][part], detector.test_cfg.nms
        )
        assert 0 < len(found) <= 30
        assert torch.allclose(left[:30, :4], found.bboxes, atol=1e-4)
        assert torch.allclose(left[:30, 4], found.scores, atol=1e-6)
        assert labels[image][part][kept][:30].tolist() == found.labels.tolist()


def test_a_head_that_decodes_by_itself_is_refused():
    detector = build('retina')

    class OwnHead(type(detector.bbox_head)):
        def predict_by_feat(self, *args, **kwargs):
            raise NotImplementedError

    detector.bbox_head.__class__ = OwnHead
    with pytest.raises(
        ValueError, match='RetinaNet cannot be exported: its head, OwnHead, decodes'
    ):
        DecodedDetector(detector)


def test_a_module_of_two_stages_is_refused():
    with pytest.raises(ValueError, match='Linear cannot be exported: only detectors of one stage'):
        DecodedDetector(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(nms=dict(type='soft_nms', iou_threshold=0.5)), "but is {'type': 'soft_nms'"),
        (dict(nms_pre=-1), 'test_cfg.nms_pre must be above 0'),
        (dict(max_per_img=-1), 'test_cfg.max_per_img must be above 0'),
    ],
)
def test_other_suppression_is_refused(change, message):
    detector = build('retina')
    detector.test_cfg.update(change)
    if 'nms' in change:
        detector.test_cfg.nms = change['nms']
    with pytest.raises(ValueError, match=message):
        check_nms(detector)
