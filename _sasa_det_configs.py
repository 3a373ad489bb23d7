"""Makes ``_base_ = 'sasa_det::...'`` known to mmengine, which resolves only packages in its table.

mmengine reads a config's bases before its ``custom_imports``, so importing sasa_det from the config
comes too late. An installed sasa_det therefore has Python import this module at its start
(``sasa_det_configs.pth``). It must stay cheap: it imports nothing, and waits for mmengine's table
to be imported by somebody else.
"""

import sys

TABLE = 'mmengine.config.utils'


def add_to_table(table_module) -> None:
    """Add sasa_det to mmengine's table of packages that have configs.

    Args:
        table_module: The module ``mmengine.config.utils``.

    Example:
        >>> import mmengine.config.utils
        >>> add_to_table(mmengine.config.utils)
        >>> 'sasa_det' in mmengine.config.utils.MODULE2PACKAGE
        True
    """
    # mmengine would look where pip's metadata lies, which is wrong for an editable install. It has
    # no metadata of this name, a module's, and then asks Python's import system: always right.
    table_module.MODULE2PACKAGE.setdefault('sasa_det', 'sasa_det.version')


class WaitForTable:
    """An import hook that adds sasa_det to mmengine's table when that is imported, then is gone."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Find a module as usual; wrap the loading of mmengine's table.

        Args:
            name: The full name of the module that is imported.
            path: The folders of its parent package.
            target: A module to be reloaded.

        Returns:
            None for all modules but one: the other finders are asked.
        """
        if name != TABLE:
            return None
        sys.meta_path.remove(cls)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is None:
            return None
        load = spec.loader.exec_module

        def load_and_add(module):
            load(module)
            add_to_table(module)

        spec.loader.exec_module = load_and_add
        return spec


if TABLE in sys.modules:
    add_to_table(sys.modules[TABLE])
else:
    sys.meta_path.insert(0, WaitForTable)
