"""RetinaNet's bbox_head with attention in place of its spatial convolutions."""

from typing import Optional, Sequence

from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import RetinaHead
from mmdet.registry import MODELS
from torch import nn

from ..layers.attn_cfg import check_attn_cfg, naming
from .attn_parts import check_parts, replace_conv
from .gpu import compute_in_float32

PARTS = ('cls', 'reg', 'predictors')
PREDICTORS = ('attention', 'pointwise', 'mix')


@MODELS.register_module()
class SASARetinaHead(RetinaHead):
    """RetinaNet head of convolution and attention, shared by all levels of the pyramid.

    Section 4.2 of `Stand-Alone Self-Attention in Vision Models <https://arxiv.org/abs/1906.05909>`_.

    Args:
        args, kwargs: Those of :class:`mmdet.models.RetinaHead`.
        attn_cfg: Arguments of :class:`~sasa_det.layers.LocalSelfAttention2d`; None for convolution.
        attn_parts: The parts that attend. 'cls': the classification tower (cls_convs). 'reg': the regression
            tower (reg_convs). 'predictors': the last 3x3 convolution after each tower. It becomes one more
            attention in the tower and, as in the paper, a pointwise convolution that mixes the heads into
            classes and boxes. By default all, if there is an attn_cfg.

    Raises:
        ValueError: An argument is not as above.

    Examples:
        >>> import torch
        >>> head = SASARetinaHead(3, 32, feat_channels=32, stacked_convs=2,
        ...                       attn_cfg=dict(kernel_size=7, num_heads=4))
        >>> scores, boxes = head.forward_single(torch.zeros(1, 32, 10, 12))
        >>> tuple(scores.shape), tuple(boxes.shape)
        ((1, 27, 10, 12), (1, 36, 10, 12))
    """

    def __init__(
        self,
        *args,
        attn_cfg: Optional[dict] = None,
        attn_parts: Optional[Sequence[str]] = None,
        predictor: str = 'attention',
        **kwargs,
    ) -> None:
        check_attn_cfg(attn_cfg)
        if predictor not in PREDICTORS:
            raise ValueError(f'predictor must be one of {PREDICTORS}, but is {predictor!r}')
        self.predictor = predictor
        self.attn_cfg = attn_cfg
        self.attn_parts = check_parts(attn_parts, PARTS, attn_cfg)
        super().__init__(*args, **kwargs)
        compute_in_float32(self.loss_cls)

    def _init_layers(self) -> None:
        super()._init_layers()
        towers = dict(cls=self.cls_convs, reg=self.reg_convs)
        for part, tower in towers.items():
            if part in self.attn_parts:
                with naming(f'{type(self).__name__}, {part}'):
                    for module in tower:
                        replace_conv(module, self.attn_cfg)
        if 'predictors' in self.attn_parts:
            for part, tower in towers.items():
                conv = getattr(self, f'retina_{part}')
                channels = conv.in_channels
                # Last in the tower, so that RetinaHead's own forward runs it.
                if self.predictor == 'attention':
                    last = ConvModule(
                        channels, channels, 3, padding=1, norm_cfg=self.norm_cfg, act_cfg=None
                    )
                    with naming(f'{type(self).__name__}, predictors'):
                        replace_conv(last, self.attn_cfg)
                    tower.append(last)
                elif self.predictor == 'mix':
                    tower.append(ConvModule(channels, channels, 1, norm_cfg=self.norm_cfg))
                setattr(self, f'retina_{part}', nn.Conv2d(channels, conv.out_channels, 1))
