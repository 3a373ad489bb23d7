"""ResNet with attention in place of its spatial convolutions."""

from typing import Optional, Sequence, Union

from mmdet.models.backbones.resnet import Bottleneck, ResNet
from mmdet.registry import MODELS
from mmengine.logging import print_log
from torch import nn

from ..checkpoints import safe_loading
from ..layers import AttentionStem
from ..layers.attn_cfg import build_attention, check_attn_cfg, check_keys, naming
from .weights_report import describe_head_start

# The values of the attention stem of each name; None for ResNet's own stem.
STEMS = dict(conv=None, attention='mixtures', attention_plain='plain', attention_conv_values='conv')
STEM_ARGUMENTS = ('num_heads', 'num_mixtures', 'value_kernel_size', 'bias', 'relu', 'pool')


class SASABottleneck(Bottleneck):
    """Bottleneck whose 3x3 convolution is attention.

    Args:
        attn_cfg: Arguments of :class:`~sasa_det.layers.LocalSelfAttention2d`.
        args, kwargs: Those of mmdet's Bottleneck.

    Examples:
        >>> import torch
        >>> block = SASABottleneck(64, 16, attn_cfg=dict(kernel_size=3, num_heads=4))
        >>> block(torch.zeros(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    def __init__(self, *args, attn_cfg: dict, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.conv2 = build_attention(
            attn_cfg, self.planes, self.planes, self.conv2_stride, self.dilation
        )


@MODELS.register_module()
class SASAResNet(ResNet):
    """ResNet of convolution and attention, stage by stage.

    Section 3.2 of `Stand-Alone Self-Attention in Vision Models <https://arxiv.org/abs/1906.05909>`_:
    the 3x3 convolution of each bottleneck becomes attention. Where the stride is 2, average pooling
    follows. All other layers keep mmdet's names, so ``torchvision://resnet50`` loads into them.

    Args:
        depth: 26, 38, 50, 101 or 152.
        stem: 'conv' is ResNet's own stem. The others attend inside blocks of 4 x 4 pixels. Their
            values are position-aware in 'attention', a plain projection in 'attention_plain', and a
            convolution's in 'attention_conv_values'. 'attention' with attention in all stages is the
            paper's full attention.
        stem_cfg: Arguments of an attention stem, see :class:`~sasa_det.layers.AttentionStem`:
            num_heads, num_mixtures, value_kernel_size, bias, relu, pool.
        attn_stages: One boolean per stage: whether it attends. By default all stages do, if there is an
            attn_cfg.
        attn_cfg: Arguments of :class:`~sasa_det.layers.LocalSelfAttention2d` for all stages, or a
            list of such dicts, one per stage; None for convolution everywhere.
        kwargs: Those of :class:`mmdet.models.ResNet`.

    Raises:
        ValueError: An argument is not as above.

    Examples:
        >>> import torch
        >>> backbone = SASAResNet(26, base_channels=16, attn_stages=(False, False, True, True),
        ...                       attn_cfg=dict(kernel_size=7, num_heads=4))
        >>> [tuple(out.shape) for out in backbone(torch.zeros(1, 3, 65, 96))]
        [(1, 64, 17, 24), (1, 128, 9, 12), (1, 256, 5, 6), (1, 512, 3, 3)]
    """

    arch_settings = {
        26: (Bottleneck, (1, 2, 4, 1)),
        38: (Bottleneck, (2, 3, 5, 2)),
        **{depth: ResNet.arch_settings[depth] for depth in (50, 101, 152)},
    }

    def __init__(
        self,
        depth: int,
        *,
        stem: str = 'conv',
        stem_cfg: Optional[dict] = None,
        attn_stages: Optional[Sequence[bool]] = None,
        attn_cfg: Union[None, dict, Sequence[Optional[dict]]] = None,
        **kwargs,
    ) -> None:
        num_stages = kwargs.get('num_stages', 4)
        if depth not in self.arch_settings:
            raise ValueError(f'depth must be one of {tuple(self.arch_settings)}, but is {depth!r}')
        if stem not in STEMS:
            raise ValueError(f'stem must be one of {tuple(STEMS)}, but is {stem!r}')
        if STEMS[stem] is None and stem_cfg:
            raise ValueError(f'stem_cfg is for the attention stems, but stem is {stem!r}')
        if STEMS[stem] is not None and kwargs.get('deep_stem'):
            raise ValueError(f"deep_stem is for stem='conv', but stem is {stem!r}")
        conv_cfg = kwargs.get('conv_cfg')
        if conv_cfg is not None and conv_cfg.get('type') == 'SASA':
            raise ValueError(
                f'conv_cfg={dict(conv_cfg)} would replace the stem and what is 1x1 as well: give attn_cfg=dict('
                "kernel_size=7, num_heads=8), SASAResNet's own argument"
            )
        check_keys('stem_cfg', stem_cfg, STEM_ARGUMENTS)
        self.stem_values, self.stem_cfg = STEMS[stem], stem_cfg or {}
        self.attn_cfgs = _stage_cfgs(attn_stages, attn_cfg, num_stages)
        with_dcn = kwargs.get('stage_with_dcn', (False,) * num_stages)
        if kwargs.get('dcn') is not None:
            for stage, (dcn, cfg) in enumerate(zip(with_dcn, self.attn_cfgs)):
                if dcn and cfg is not None:
                    raise ValueError(
                        f'stage {stage + 1} can attend or be deformable, but attn_stages={attn_stages} '
                        f'and stage_with_dcn={tuple(with_dcn)}'
                    )
        super().__init__(depth, **kwargs)

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        if self.stem_values is None:
            super()._make_stem_layer(in_channels, stem_channels)
            return
        # ResNet's flag for a stem that is one module; its forward and its freezing then use
        # ``self.stem``.
        self.deep_stem = True
        with naming(f'{type(self).__name__}, stem'):
            self.stem = AttentionStem(
                in_channels,
                stem_channels,
                values=self.stem_values,
                norm_cfg=self.norm_cfg,
                **self.stem_cfg,
            )
        self.maxpool = nn.Identity()

    def init_weights(self) -> None:
        """Initialise as ResNet does, and log which layers a partly fitting checkpoint initialised."""
        loaded = []
        hook = self.register_load_state_dict_post_hook(
            # mmengine reuses these lists, so copies are kept for this loading.
            lambda module, keys: loaded.append(
                (list(keys.missing_keys), list(keys.unexpected_keys))
            )
        )
        with safe_loading():
            super().init_weights()
        hook.remove()
        for missing, unexpected in loaded:
            if missing:
                message = describe_head_start(self, missing, unexpected)
                print_log(
                    f'{type(self).__name__} starts from {self.init_cfg["checkpoint"]}\n{message}',
                    logger='current',
                )

    def make_res_layer(self, **kwargs):
        """Build the next stage; ResNet calls this once per stage, in order."""
        stage = len(self.res_layers)
        attn_cfg = self.attn_cfgs[stage]
        if attn_cfg is not None:
            kwargs.update(block=SASABottleneck, attn_cfg=attn_cfg)
        with naming(f'{type(self).__name__}, stage {stage + 1}'):
            return super().make_res_layer(**kwargs)


def _stage_cfgs(attn_stages, attn_cfg, num_stages: int) -> list:
    """Read attn_stages and attn_cfg into one attn_cfg per stage, None for convolution."""
    if attn_stages is not None:
        attn_stages = tuple(attn_stages)
        if len(attn_stages) != num_stages or any(
            attends not in (True, False) for attends in attn_stages
        ):
            raise ValueError(
                f'attn_stages must be {num_stages} booleans, one per stage, but is {attn_stages!r}'
            )
    if isinstance(attn_cfg, (list, tuple)):
        if len(attn_cfg) != num_stages:
            raise ValueError(
                f'attn_cfg must be one dict or {num_stages}, one per stage, but are {len(attn_cfg)}'
            )
        cfgs = list(attn_cfg)
    else:
        cfgs = [attn_cfg] * num_stages
    for cfg in cfgs:
        check_attn_cfg(cfg)
    if attn_stages is None:
        return cfgs
    for stage, (attends, cfg) in enumerate(zip(attn_stages, cfgs)):
        if attends and cfg is None:
            raise ValueError(
                f'attn_stages={attn_stages} has stage {stage + 1} attend, but its attn_cfg is None; give it, '
                'such as attn_cfg=dict(kernel_size=7, num_heads=8), or leave attn_stages out'
            )
    return [cfg if attends else None for cfg, attends in zip(cfgs, attn_stages)]
