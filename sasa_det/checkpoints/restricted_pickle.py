"""How are checkpoints loaded by a torch that has no list of allowed types? By an unpickler that has one.

``torch.load(pickle_module=...)`` takes this module. It knows tensors, plain containers and the types of
:func:`~sasa_det.checkpoints.types.checkpoint_types`, and refuses all else before anything is called.
"""

import collections
import pickle
from functools import cache
from typing import Any, Dict

import torch

from .types import checkpoint_types

UnpicklingError = pickle.UnpicklingError


@cache
def _allowed() -> Dict[str, Any]:
    names = {
        'collections.Counter': collections.Counter,  # the milestones of MultiStepLR
        'collections.OrderedDict': collections.OrderedDict,
        'builtins.bytearray': bytearray,
        'builtins.complex': complex,
        'builtins.set': set,
        'torch.Size': torch.Size,
        'torch.device': torch.device,
        '_codecs.encode': _encode,
    }
    for name in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter'):
        names[f'torch._utils.{name}'] = getattr(torch._utils, name)
    for name in vars(torch):
        if name.endswith('Storage') or isinstance(getattr(torch, name), torch.dtype):
            names[f'torch.{name}'] = getattr(torch, name)
    names['torch.storage.UntypedStorage'] = torch.UntypedStorage
    names.update((name, value) for value, name in checkpoint_types())
    return names


def _encode(text: str, encoding: str) -> bytes:
    """Replace ``_codecs.encode``, by which pickle's second protocol writes bytes."""
    if not isinstance(text, str) or encoding != 'latin1':
        raise UnpicklingError('the checkpoint has bytes that pickle does not write')
    return text.encode('latin1')


class Unpickler(pickle._Unpickler):
    """Python's unpickler, which finds what is allowed and nothing else.

    It is the one written in Python, whose steps can be restricted, too.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str):
        """Give what a name stands for.

        Raises:
            UnpicklingError: It is not allowed.
        """
        if module == '__builtin__':  # of Python 2, and of the second protocol
            module = 'builtins'
        full = f'{module}.{name}'
        if full not in _allowed():
            raise UnpicklingError(
                f"WeightsUnpickler error: it asks for {full}, and only tensors, plain values and mmengine's "
                'logs may be loaded'
            )
        return _allowed()[full]

    def load_build(self) -> None:
        """Set the state of an object, and of no function or class: they are the whole process's.

        Raises:
            UnpicklingError: It is another object.
        """
        kind = type(self.stack[-2])
        if not any(kind is allowed for allowed in _allowed().values()):
            raise UnpicklingError(f'WeightsUnpickler error: it sets the state of a {kind.__name__}')
        super().load_build()

    def load_binpersid(self) -> None:
        """Load a storage, and nothing else that torch looks up outside of the pickle.

        Raises:
            UnpicklingError: It is something else, such as a module's source, which torch compares and writes.
        """
        asked = self.stack[-1]
        if not isinstance(asked, tuple) or asked[:1] not in (('storage',), (b'storage',)):
            raise UnpicklingError(
                'WeightsUnpickler error: it asks torch for something other than storages'
            )
        super().load_binpersid()

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BINPERSID[0]] = load_binpersid


def load(file, **options):
    """Load one object, as ``pickle.load`` does; torch's old format holds several, one after the other."""
    return Unpickler(file, **options).load()
