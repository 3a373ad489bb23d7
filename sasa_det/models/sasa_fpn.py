"""FPN with attention in place of its spatial convolutions."""

from typing import Optional, Sequence

from mmdet.models.necks import FPN
from mmdet.registry import MODELS

from ..layers.attn_cfg import check_attn_cfg, naming
from .attn_parts import check_parts, replace_conv

PARTS = ('outputs', 'extras')


@MODELS.register_module()
class SASAFPN(FPN):
    """Feature pyramid whose 3x3 convolutions are attention; the laterals stay 1x1 convolutions.

    Section 4.2 of `Stand-Alone Self-Attention in Vision Models <https://arxiv.org/abs/1906.05909>`_.

    Args:
        args, kwargs: Those of :class:`mmdet.models.FPN`.
        attn_cfg: Arguments of :class:`~sasa_det.layers.LocalSelfAttention2d`; None for convolution.
        attn_parts: The parts that attend. 'outputs': the layer after each level's merge. 'extras': the
            extra levels of stride 2 on top (RetinaNet's P6 and P7). By default both, if there is an
            attn_cfg.

    Raises:
        ValueError: An argument is not as above.

    Examples:
        >>> import torch
        >>> neck = SASAFPN([16, 32], 32, num_outs=3, add_extra_convs='on_output',
        ...                attn_cfg=dict(kernel_size=7, num_heads=4))
        >>> outs = neck([torch.zeros(1, 16, 20, 21), torch.zeros(1, 32, 10, 11)])
        >>> [tuple(out.shape) for out in outs]
        [(1, 32, 20, 21), (1, 32, 10, 11), (1, 32, 5, 6)]
    """

    def __init__(
        self,
        *args,
        attn_cfg: Optional[dict] = None,
        attn_parts: Optional[Sequence[str]] = None,
        **kwargs,
    ) -> None:
        check_attn_cfg(attn_cfg)
        attn_parts = check_parts(attn_parts, PARTS, attn_cfg)
        super().__init__(*args, **kwargs)
        levels = len(self.lateral_convs)
        parts = dict(outputs=self.fpn_convs[:levels], extras=self.fpn_convs[levels:])
        for part in attn_parts:
            with naming(f'{type(self).__name__}, {part}'):
                for module in parts[part]:
                    replace_conv(module, attn_cfg)
