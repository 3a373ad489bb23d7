"""What is checked before one of mmdet's tools starts, as it would be found only after the data is read."""

import os
from pathlib import Path
from typing import Mapping


def check_run(tool: str, config, given: Mapping) -> None:
    """Refuse a training in a folder in use, and a test of a checkpoint that does not fit.

    Args:
        tool: 'train' or 'test'.
        config: The run's config, with the options of the command line.
        given: The tool's arguments by name.

    Raises:
        RuntimeError: Another process trains in the work_dir.
        FileNotFoundError, ValueError: The checkpoint cannot be read or does not fit.
        OSError: The work_dir cannot be written to.

    Examples:
        >>> check_run('test', {}, dict(launcher='none', checkpoint='https://host/a.pth'))
    """
    # Of a distributed run, the first process. Only torchrun says before its start which one that is.
    if given['launcher'] != 'none' and os.environ.get('RANK') != '0':
        return
    if tool == 'train':
        from ..engine.work_dir_lock import hold_work_dir

        # As mmdet's train.py chooses it.
        name = Path('work_dirs', Path(given['config']).stem)
        hold_work_dir(given['work_dir'] or config.get('work_dir') or name)
    elif '://' not in given['checkpoint']:
        from ..checkpoints.fit import require_fit_before_run

        require_fit_before_run(config, given['checkpoint'])
