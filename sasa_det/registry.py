"""The scope ``sasa_det``: parts in a base config ``sasa_det::...`` are found in mmdet's registries.

mmengine adds ``_scope_='sasa_det'`` to the dicts of such a base, then imports this module. sasa_det
registers its own parts in ``mmdet.registry.MODELS``. So each registry here is an empty child of
mmdet's, which passes on the lookup.
"""

import mmdet.registry
from mmdet.utils import register_all_modules
from mmengine.registry import Registry

# A lookup reaches mmdet's registries, but does not make them import their modules.
register_all_modules(init_default_scope=False)

_REGISTRIES = {
    name: Registry(parent.name, parent=parent, scope='sasa_det', locations=['sasa_det.parts'])
    for name, parent in vars(mmdet.registry).items()
    if isinstance(parent, Registry) and parent.scope == 'mmdet'
}
globals().update(_REGISTRIES)
__all__ = list(_REGISTRIES)
