"""Any detector, with attention in the place of convolutions that are named one by one."""

from typing import Mapping

from mmdet.registry import MODELS
from torch import nn

from ..layers.replace import replace_convolutions


@MODELS.register_module()
def AttendingDetector(*, detector: str, attention: Mapping[str, Mapping], **model_cfg) -> nn.Module:
    """Build a detector, then put attention in the place of some of its convolutions.

    ``sasa-det convert`` writes it: the config of the convolutional detector stays as it is, but for the type.

    Args:
        detector: The type of the detector, such as 'RetinaNet'.
        attention: By the convolution's name, the arguments of its attention; see
            :func:`sasa_det.layers.replace.replace_convolutions`.
        model_cfg: The arguments of the detector.

    Returns:
        The detector, of its own type.

    Raises:
        ValueError: A name is no convolution's, or an argument is not accepted; names it.

    Examples:
        >>> from sasa_det.configs import find_config, read_config
        >>> model = dict(read_config(find_config('retinanet_tiny_digits')).model)
        >>> attention = {'neck.fpn_convs.0.conv': dict(kernel_size=5, num_heads=8)}
        >>> model.update(type='AttendingDetector', detector=model['type'], attention=attention)
        >>> type(MODELS.build(model).neck.fpn_convs[0].conv).__name__
        'LocalSelfAttention2d'
    """
    model = MODELS.build(dict(type=detector, **model_cfg))
    replace_convolutions(model, attention)
    return model
