"""The exported function of a detector: tensors in, tensors out, from raw pixels to boxes."""

from typing import List, Tuple

import torch
import torch.nn.functional as F
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.dense_heads import GFLHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector
from torch import Tensor, nn

NMS_KEYS = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}


class DecodedDetector(nn.Module):
    """Map pixels to every prior's box, without loops over images or levels of unknown size.

    Args:
        detector: A one-stage detector of mmdet whose bbox_head decodes by mmdet's BaseDenseHead
            (RetinaNet, FCOS, ATSS and others), or GFL.

    Shape:
        (B, 3, H, W), raw pixels of 0 to 255 in the test pipeline's channel order, BGR. Returns
        boxes (B, N, 4) in pixels of the input and scores (B, N, classes).

    Raises:
        ValueError: The detector is of another kind; says which, and which are accepted.

    Examples:
        >>> import torch
        >>> from mmdet.utils import register_all_modules
        >>> from mmengine.config import Config
        >>> from mmdet.registry import MODELS
        >>> register_all_modules()
        >>> model = Config.fromfile('configs/quickstart/retinanet_sasa-tiny_digits.py').model
        >>> detector = DecodedDetector(MODELS.build(model)).eval()
        >>> boxes, scores = detector(torch.zeros(1, 3, 60, 90))
        >>> tuple(boxes.shape), tuple(scores.shape)
        ((1, 384, 4), (1, 384, 10))
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        check_exportable(detector)
        self.detector = detector

    def forward(self, images: Tensor) -> Tuple[Tensor, Tensor]:
        """Detect."""
        boxes, scores, factors = zip(*self._levels(images))
        if factors[0] is not None:
            scores = [score * factor for score, factor in zip(scores, factors)]
        return torch.cat(boxes, 1), torch.cat(scores, 1)

    def _levels(self, images: Tensor) -> List[tuple]:
        """Boxes, scores, and score factors or None, per level."""
        head = self.detector.bbox_head
        outputs = head(self.detector.extract_feat(self._preprocess(images)))
        priors = head.prior_generator.grid_priors(
            [scores.shape[-2:] for scores in outputs[0]], images.dtype, images.device
        )
        factors = outputs[2] if len(outputs) > 2 else [None] * len(priors)
        levels = []
        for level, (scores, boxes, factor) in enumerate(zip(outputs[0], outputs[1], factors)):
            boxes = _by_prior(boxes, boxes.shape[1] // self._priors_at(level))
            boxes = self._decode(priors[level], boxes, level, images.shape[-2:])
            factor = None if factor is None else _by_prior(factor, 1).sigmoid()
            levels.append((boxes, self._activate(_by_prior(scores, head.cls_out_channels)), factor))
        return levels

    def _preprocess(self, images: Tensor) -> Tensor:
        """Preprocess a batch of images of one size as mmdet's DetDataPreprocessor does."""
        preprocessor = self.detector.data_preprocessor
        if preprocessor._channel_conversion:
            images = images.flip(1)
        if preprocessor._enable_normalize:
            images = (images - preprocessor.mean) / preprocessor.std
        divisor = preprocessor.pad_size_divisor
        if divisor == 1:
            return images
        # In this form torch.export can infer that the padded size is a multiple of the divisor.
        rows, cols = ((edge + divisor - 1) // divisor * divisor - edge for edge in images.shape[2:])
        return F.pad(images, (0, cols, 0, rows), value=preprocessor.pad_value)

    def _priors_at(self, level: int) -> int:
        return self.detector.bbox_head.prior_generator.num_base_priors[level]

    def _activate(self, scores: Tensor) -> Tensor:
        if self.detector.bbox_head.use_sigmoid_cls:
            return scores.sigmoid()
        return scores.softmax(-1)[..., :-1]  # the last is the background

    def _decode(self, priors: Tensor, boxes: Tensor, level: int, size) -> Tensor:
        head = self.detector.bbox_head
        batch = boxes.shape[0]
        if isinstance(head, GFLHead):
            boxes = head.integral(boxes) * head.prior_generator.strides[level][0]
            priors = head.anchor_center(priors)
        priors = priors.expand(batch, -1, -1).flatten(0, 1)
        boxes = head.bbox_coder.decode(priors, boxes.reshape(priors.shape[0], -1))
        boxes = boxes.unflatten(0, (batch, -1))
        if not head.bbox_coder.clip_border:
            return boxes
        across, down = boxes[..., 0::2].clamp(0, size[1]), boxes[..., 1::2].clamp(0, size[0])
        return torch.stack((across, down), -1).flatten(-2)


class Candidates(DecodedDetector):
    """Detect up to, but without, NMS: the best boxes per level, a fixed number of them.

    Args:
        detector: As for :class:`DecodedDetector`, with mmdet's plain NMS in its ``test_cfg``.

    Shape:
        (B, 3, H, W) to boxes (B, M, 4), scores (B, M) and labels (B, M). Unused boxes have a score of -1.

    Raises:
        ValueError: As for :class:`DecodedDetector`, or the detector uses another kind of NMS.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__(detector)
        check_nms(detector)

    def forward(self, images: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Detect."""
        boxes, scores, labels = zip(*(self._best(*level) for level in self._levels(images)))
        return torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(labels, 1)

    def _best(self, boxes: Tensor, scores: Tensor, factors) -> tuple:
        cfg = self.detector.test_cfg
        classes, keep = scores.shape[2], cfg.nms_pre
        flat = scores.flatten(1)
        flat = torch.where(flat > cfg.get('score_thr', 0), flat, -1)
        # Padding ensures at least `keep` candidates, so that their number is static.
        scores, places = F.pad(flat, (0, keep), value=-1).topk(keep)
        priors = (places // classes).clamp(max=boxes.shape[1] - 1)
        boxes = boxes.gather(1, priors[..., None].expand(-1, -1, 4))
        takes_part = scores >= 0
        if factors is not None:
            scores = scores * factors[..., 0].gather(1, priors)
        least = cfg.get('min_bbox_size', -1)
        if least >= 0:
            width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
            takes_part = takes_part & (width > least) & (height > least)
        return boxes, torch.where(takes_part, scores, -1), places % classes


def check_exportable(detector: nn.Module) -> None:
    """Raise a ValueError with the reason if a detector cannot be exported.

    Args:
        detector: Any detector of mmdet.
    """
    name = type(detector).__name__
    if not isinstance(detector, SingleStageDetector):
        raise ValueError(
            f'{name} cannot be exported: only detectors of one stage can, with a dense head'
        )
    head = detector.bbox_head
    own = [
        method
        for method in ('predict', 'predict_by_feat', '_predict_by_feat_single')
        if getattr(type(head), method, None) is not getattr(BaseDenseHead, method)
    ]
    gfl = getattr(type(head), '_predict_by_feat_single', None) is GFLHead._predict_by_feat_single
    if not isinstance(head, BaseDenseHead) or (own and not (gfl and len(own) == 1)):
        raise ValueError(
            f'{name} cannot be exported: its head, {type(head).__name__}, decodes boxes in a way of its '
            'own; heads can be exported that leave it to mmdet, such as RetinaHead, FCOSHead, ATSSHead, '
            'and GFLHead'
        )
    if getattr(head.loss_cls, 'custom_cls_channels', False):
        raise ValueError(
            f'{name} cannot be exported: {type(head.loss_cls).__name__} turns logits into scores in a way '
            'of its own'
        )
    if type(detector.data_preprocessor) is not DetDataPreprocessor:
        raise ValueError(
            f'{name} cannot be exported: its data_preprocessor must be a DetDataPreprocessor, but is '
            f'{type(detector.data_preprocessor).__name__}'
        )


def check_nms(detector: nn.Module) -> None:
    """Raise a ValueError if a detector's ``test_cfg`` suppresses boxes by other than plain NMS.

    Args:
        detector: A one-stage detector.
    """
    cfg = detector.test_cfg
    nms = cfg.get('nms') or {}
    unknown = sorted(set(nms) - NMS_KEYS)
    if nms.get('type') != 'nms' or 'iou_threshold' not in nms or unknown:
        raise ValueError(
            "test_cfg.nms must be dict(type='nms', iou_threshold=...) to become part of the exported "
            f'model, but is {dict(nms)}; without suppression the model can be exported'
        )
    for key in ('nms_pre', 'max_per_img'):
        if cfg.get(key, -1) <= 0:
            raise ValueError(
                f'test_cfg.{key} must be above 0 for suppression to become part of the exported model, '
                f'but is {cfg.get(key)}'
            )


def _by_prior(maps: Tensor, width: int) -> Tensor:
    """Reshape (B, priors * width, H, W) to (B, H * W * priors, width), mmdet's order of priors."""
    return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, width)
