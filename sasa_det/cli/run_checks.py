"""What is checked before one of mmdet's tools starts, as it would be found only after the data is read."""

import io
import os
import tokenize
from pathlib import Path
from typing import Mapping, Optional


def check_run(tool: str, config, given: Mapping) -> None:
    """Refuse a run in a folder in use, one that replaces a config, and one from a checkpoint that does not fit.

    Args:
        tool: 'train' or 'test'.
        config: The run's config, with the options of the command line.
        given: The tool's arguments by name.

    Raises:
        RuntimeError: Another process trains in the work_dir.
        FileNotFoundError, ValueError: The checkpoint cannot be read or does not fit. Or the work_dir holds a
            config that the run would replace, or is a file.
        OSError: The work_dir cannot be written to.

    Examples:
        >>> given = dict(launcher='none', checkpoint='https://host/a.pth', config='a.py', work_dir=None)
        >>> check_run('test', {}, given)
    """
    # Of a distributed run, the first process. Only torchrun says before its start which one that is.
    if given['launcher'] != 'none' and os.environ.get('RANK') != '0':
        return
    # As mmdet's tools choose it.
    name = Path('work_dirs', Path(given['config']).stem)
    work_dir = Path(given['work_dir'] or config.get('work_dir') or name)
    _require_no_config_of_a_user(work_dir, given['config'])
    hook = config.get('default_hooks', {}).get('checkpoint') or {}
    checks = hook.get('type') == 'WholeCheckpointHook'
    if tool == 'train':
        from ..engine.work_dir_lock import hold_work_dir

        hold_work_dir(work_dir)
        checkpoint = _resumed_from(config, given, hook, work_dir) if checks else None
    else:
        checkpoint = given['checkpoint']
    if checks and checkpoint and '://' not in checkpoint:
        from ..checkpoints.fit import require_fit_before_run

        require_fit_before_run(config, checkpoint, resume=tool == 'train')


def _require_no_config_of_a_user(work_dir: Path, config: str) -> None:
    """Raise if a run would put its config, with its bases merged in, in the place of what somebody wrote."""
    if work_dir.is_file():
        raise ValueError(f'work_dir {work_dir} is a file; name a folder by --work-dir')
    # mmengine writes it there, under the given config's name.
    path = work_dir / f'{Path(config).stem}.py'
    if path.is_file() and not _is_mmengines(path.read_text(errors='replace')):
        raise ValueError(
            f'{path} would be replaced: a run writes its config, with all bases merged in, into its work_dir, '
            'under this name; name another folder by --work-dir'
        )


def _is_mmengines(text: str) -> bool:
    """Tell a config that mmengine wrote from one that somebody wrote: it has no base and no comment."""
    from ..checkpoints.written_config import read_literals

    values = read_literals(text)
    if values is None or '_base_' in values:
        return False
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return all(token.type != tokenize.COMMENT for token in tokens)


def _resumed_from(config, given: Mapping, hook: Mapping, work_dir: Path) -> Optional[str]:
    """The checkpoint that a training goes on from, if it does: as mmdet's train.py reads its arguments."""
    if not (given['resume'] or config.get('resume')):
        return None
    named = config.get('load_from') if given['resume'] is None else given['resume']
    if named not in (None, 'auto'):
        return named
    from mmengine.registry import HOOKS

    path, _ = HOOKS.build(hook).find_checkpoint(work_dir)
    return None if path is None else str(path)
