"""What is checked before one of mmdet's tools starts, as it would be found only after the data is read."""

import os
from pathlib import Path
from typing import Mapping, Optional


def check_run(tool: str, config, given: Mapping) -> None:
    """Refuse a training in a folder in use, and a run from a checkpoint that does not fit.

    Args:
        tool: 'train' or 'test'.
        config: The run's config, with the options of the command line.
        given: The tool's arguments by name.

    Raises:
        RuntimeError: Another process trains in the work_dir.
        FileNotFoundError, ValueError: The checkpoint cannot be read or does not fit.
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
