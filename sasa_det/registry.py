"""The scope ``sasa_det``: what comes from a base ``sasa_det::`` is found in mmdet's registries.

mmengine stamps ``_scope_='sasa_det'`` on what comes from such a base and then asks for this module.
sasa_det registers its own parts in ``mmdet.registry.MODELS``, so each registry here is an empty
child of mmdet's that passes on the search.
"""

import mmdet.registry
from mmdet.utils import register_all_modules
from mmengine.registry import Registry

# A search goes up to mmdet's registries, but does not make them import what they are to hold.
register_all_modules(init_default_scope=False)

_REGISTRIES = {
    name: Registry(parent.name, parent=parent, scope='sasa_det', locations=['sasa_det.parts'])
    for name, parent in vars(mmdet.registry).items()
    if isinstance(parent, Registry) and parent.scope == 'mmdet'
}
globals().update(_REGISTRIES)
__all__ = list(_REGISTRIES)
