"""With which config was a checkpoint trained? Its text is read as literals and never run."""

import ast
from importlib import import_module
from pathlib import Path
from typing import List, Mapping, Optional, Set, Tuple

from mmengine import registry
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.utils import import_modules_from_strings

from .loading import load_from_local

# A config beside a checkpoint may import these.
_PACKAGES = ('sasa_det', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain')
# Options by which mmdet and mmengine unpickle a file, run it, or import from its folder.
_RUN = ('proposal_file', 'meta_file', 'warp_mode', 'teacher_config', 'sys_path')


def read_literals(text: str) -> Optional[dict]:
    """Read a config's text as mmengine writes it: assignments of literals, and nothing else.

    Args:
        text: Such as ``meta['cfg']`` of a checkpoint, or the file that training puts beside it.

    Returns:
        The values by name; None if the text has anything else in it.

    Examples:
        >>> read_literals("model = dict(depth=26, stages=(True, False))")
        {'model': {'depth': 26, 'stages': (True, False)}}
        >>> read_literals('import os') is None
        True
    """
    values = {}
    try:
        for statement in ast.parse(text).body:
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                return None
            values[statement.targets[0].id] = _literal(statement.value)
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        return None
    return values


def written_config(checkpoint: Mapping) -> Optional[dict]:
    """Read the config that mmengine stored in a checkpoint.

    Args:
        checkpoint: What was read from the file.

    Returns:
        The values by name; None if there is no such text, or it is no config that mmengine wrote.

    Examples:
        >>> written_config({'meta': {'cfg': 'model = dict(depth=26)'}})
        {'model': {'depth': 26}}
    """
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    text = meta.get('cfg') if isinstance(meta, Mapping) else None
    return read_literals(text) if isinstance(text, str) else None


def configs_beside(path, checkpoint: Mapping) -> List[Config]:
    """Find the configs in a checkpoint's folder that have the model of its own copy of the config.

    Args:
        path: The checkpoint.
        checkpoint: What was read from it.

    Returns:
        A Config for each of them, with the file's name. Nothing that they name is imported.

    Examples:
        >>> configs_beside('no/such.pth', {})
        []
    """
    written = written_config(checkpoint)
    found = []
    for file in _python_files(path) if written and 'model' in written else ():
        values = read_literals(file.read_text(errors='replace'))
        if values and plain(values.get('model')) == plain(written['model']):
            found.append(Config(values, filename=str(file)))
    return found


def config_beside(path) -> Config:
    """Find the config that a checkpoint was trained with among the files in its folder.

    It must have the model that the checkpoint's own copy of the config has. A file that happens to lie
    there is not run. Since both may come from others, the config may name only what is in a registry.

    Args:
        path: The checkpoint.

    Returns:
        mmengine's Config, with the file's name.

    Raises:
        ValueError: There is none, or more than one; names the files. Or the config has an option by which
            it could run code; names the option.
    """
    path = Path(path)
    found = configs_beside(path, load_from_local(str(path), 'cpu'))
    if len(found) != 1:
        names = ', '.join(file.name for file in _python_files(path)) or 'none'
        how_many = 'none' if not found else 'more than one'
        raise ValueError(
            f'{path}: of the configs beside it, {how_many} is the one that it was trained with; there are: '
            f'{names}. Name the config by --config'
        )
    try:
        _import_parts(found[0].get('custom_imports') or {})
        _check_options(found[0].to_dict(), *_registered())
    except ValueError as error:
        raise ValueError(
            f'{found[0].filename}: {error}; if you trust the file, name it by --config'
        ) from None
    return found[0]


def _python_files(path) -> List[Path]:
    return sorted(file for file in Path(path).parent.glob('*.py') if file.is_file())


def _import_parts(custom_imports) -> None:
    """Import what a config asks for, if it is of this package or of OpenMMLab's: an import runs code."""
    imports = custom_imports.get('imports') if isinstance(custom_imports, dict) else custom_imports
    for name in [imports] if isinstance(imports, str) else imports or ():
        if not isinstance(name, str) or name.partition('.')[0] not in _PACKAGES:
            raise ValueError(f'custom_imports={name!r} is of none of {", ".join(_PACKAGES)}')
        import_modules_from_strings(name)


def _registered() -> Tuple[Set[str], Set[str]]:
    """Names in the registries that are loaded, and the registries' scopes."""
    from ..plugin import register

    register()
    import_module(
        'sasa_det.registry'
    )  # the scope of bases such as sasa_det::..., and all of mmdet's modules
    names, scopes = {'nms', 'soft_nms'}, set()
    registries = [value for value in vars(registry).values() if isinstance(value, Registry)]
    while registries:
        each = registries.pop()
        names |= each.module_dict.keys()
        scopes.add(each.scope)
        registries += each.children.values()
    return names, scopes


def _check_options(value, names: Set[str], scopes: Set[str]) -> None:
    """Refuse what mmengine, mmcv or mmdet would import, run or unpickle."""
    if isinstance(value, Mapping):
        kind = value.get('type')
        if isinstance(kind, str) and kind not in names:
            # mmengine imports such a name, and calls it; mmcv runs the type of an nms as Python.
            scope, _, name = kind.partition('.')
            if scope not in scopes or name not in names:
                raise ValueError(f'type={kind!r} is no name of a registry')
        for key in ('_scope_', 'default_scope'):  # imported, too
            if value.get(key) is not None and str(value[key]) not in scopes:
                raise ValueError(f'{key}={value[key]!r} is none of {", ".join(sorted(scopes))}')
        for key in _RUN:
            if value.get(key):
                raise ValueError(f'{key}={value[key]!r} may be read as a pickle or run as Python')
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    for item in value:
        _check_options(item, names, scopes)


def plain(value):
    """Turn tuples into lists and mmengine's dicts into plain ones: in a config they mean the same.

    Examples:
        >>> plain((1, {'a': (2,)}))
        [1, {'a': [2]}]
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if key != '_scope_'}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _literal(node):
    """The value of a literal in which dicts may be written as ``dict(name=...)`` or ``dict({'a.b': ...})``."""
    if isinstance(node, ast.Call) and getattr(node.func, 'id', None) == 'dict':
        # mmengine writes keys that are no names of arguments in braces, within the parentheses.
        named = {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
        if not node.args:
            return named
        (braces,) = node.args
        if named or not isinstance(braces, ast.Dict):
            raise ValueError('no dict that mmengine writes')
        return _literal(braces)
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item) for item in node.elts)
    # mmengine writes numbers as Python prints them.
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_literal(node.operand)
    if isinstance(node, ast.Name) and node.id in ('inf', 'nan'):
        return float(node.id)
    return ast.literal_eval(node)
