"""Act on a module that somebody else may import."""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Callable


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call ``act`` with a module: now if it is imported already, else as soon as it is.

    Args:
        name: The module's full name.
        act: What to call.

    Examples:
        >>> when_imported('sys', lambda module: print(module.__name__))
        sys
    """
    if name in sys.modules:
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watch(name, act))


class _Watch(MetaPathFinder):
    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name, self.act = name, act

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module):
                execute(module)
                self.act(module)

            spec.loader.exec_module = execute_and_act
        return spec
