"""How sasa_det acts on modules that others import, and on Python's start.

mmengine resolves ``_base_ = 'sasa_det::...'`` only for packages in a table of its own, and reads a config's
bases before its ``custom_imports``. Importing sasa_det from a config therefore comes too late. So an installed
``sasa_det.pth`` (``sasa_det.start`` from Python 3.15 on, PEP 829) makes Python call :func:`start`. It imports
nothing, but waits until mmengine's table is imported.
"""

import sys

TABLE = 'mmengine.config.utils'


class _Watcher:
    """An import hook that calls functions with the modules they wait for."""

    def __init__(self):
        self.waiting = {}

    def find_spec(self, name, path=None, target=None):
        """Find a module by the other finders; make its loader call the waiting functions."""
        if name not in self.waiting:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, 'find_spec', None)
            spec = find and find(name, path, target)
            if spec is not None:
                break
        else:
            return None
        execute = getattr(spec.loader, 'exec_module', None)
        if execute is None:
            return None

        def execute_and_act(module):
            execute(module)
            # Not in find_spec: a caller may look for a module without importing it.
            for act in self.waiting.pop(name, ()):
                act(module)

        spec.loader.exec_module = execute_and_act
        return spec


_WATCHER = _Watcher()


def when_imported(name, act):
    """Call ``act`` with a module: now if it is imported already, else after its import.

    Args:
        name: The module's full name.
        act: The function to call.

    Example:
        >>> when_imported('sys', lambda module: print(module.__name__))
        sys
    """
    if name in sys.modules:
        act(sys.modules[name])
        return
    _WATCHER.waiting.setdefault(name, []).append(act)
    if _WATCHER not in sys.meta_path:
        sys.meta_path.insert(0, _WATCHER)


def add_to_table(table):
    """Add sasa_det to mmengine's table of packages that have configs.

    Args:
        table: The module ``mmengine.config.utils``.

    Example:
        >>> import mmengine.config.utils
        >>> add_to_table(mmengine.config.utils)
        >>> 'sasa_det' in mmengine.config.utils.MODULE2PACKAGE
        True
    """
    # By a distribution's name mmengine would search beside pip's metadata, which is wrong for an
    # editable install. This is a module's name, without metadata: for it mmengine asks Python's
    # import system, which is always right.
    table.MODULE2PACKAGE.setdefault('sasa_det', 'sasa_det.version')


def start():
    """Add sasa_det to mmengine's table once that is imported.

    Example:
        >>> start()
    """
    when_imported(TABLE, add_to_table)
