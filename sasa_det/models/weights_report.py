"""Which weights a backbone takes from another backbone's checkpoint, as one message."""

import re
from typing import Iterable, List, Sequence

from torch import nn

from ..layers import AttentionStem, LocalSelfAttention2d


def describe_head_start(
    backbone: nn.Module, missing_keys: Sequence[str], unexpected_keys: Sequence[str]
) -> str:
    """Say which layers were loaded, which were missing and start anew, and which are left over.

    Args:
        backbone: The backbone that loaded the weights.
        missing_keys: Keys of the backbone that the weights lacked.
        unexpected_keys: Keys of the weights that the backbone lacks.

    Returns:
        Three lines. The blocks of a stage share one name: ``layer1.*.conv2``.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> print(describe_head_start(model, ['1.weight'], ['fc.bias']))
        taken as they are: 0
        initialised anew: 1
        left over: fc
    """
    missing = set(missing_keys)
    # torch starts num_batches_tracked anew if a checkpoint lacks it.
    taken = [
        key
        for key in backbone.state_dict()
        if key not in missing and not key.endswith('num_batches_tracked')
    ]
    attention = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, (LocalSelfAttention2d, AttentionStem))
    ]
    lines = {
        'taken as they are': taken,
        'initialised anew': missing_keys,
        'left over': unexpected_keys,
    }
    return '\n'.join(
        f'{title}: {", ".join(_layers(keys, attention)) or "nothing"}'
        for title, keys in lines.items()
    )


def _layers(keys: Iterable[str], attention: Sequence[str]) -> List[str]:
    """List the layers that keys belong to, each once and in order."""
    names = {}
    for key in keys:
        name = next((each for each in attention if key.startswith(f'{each}.')), None)
        name = name or key.rpartition('.')[0]
        names[re.sub(r'^(layer\d)\.\d+\.', r'\1.*.', name)] = None
    return list(names)
