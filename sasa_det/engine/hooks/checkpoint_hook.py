"""How a killed run keeps whole checkpoints only, and resumes from the last one."""

import os
from collections import deque
from copy import copy
from pathlib import Path
from string import Formatter
from typing import List, Optional, Set, Tuple

import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, join_path, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop

from ...checkpoints.fit import describe_misfit, require_fit, require_state
from ...checkpoints.loading import find_damage, safe_loading
from ...files import write_whole
from ..work_dir_lock import hold_work_dir, release_work_dir


class WholeFileBackend(LocalBackend):
    """mmengine's backend for local files, which writes under another name and renames after fsync.

    A file is always the old one or the new one, even if the process or the machine stops.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> WholeFileBackend().put(b'all of it', folder / 'file')
        >>> [path.name for path in folder.iterdir()]
        ['file']
    """

    def put(self, obj: bytes, filepath) -> None:
        """Write a file.

        Args:
            obj: Its content.
            filepath: Its path; missing folders are made.

        Raises:
            OSError: It cannot be written, as on a full disk. The previous file is kept.
        """
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_whole(path, obj)
        except OSError as error:
            raise OSError(
                error.errno,
                f'{error.strerror}. Checkpoints that were there before are whole; make room, then go on from '
                'the last one with --resume',
                str(path),
            ) from None


register_backend('WholeFileBackend', WholeFileBackend, force=True)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, for runs that may be killed at any moment.

    - A checkpoint is written under another name, then renamed. Only then are older ones removed, the best
      so far among them.
    - A second training in the same work_dir is refused. What a killed run was writing is removed.
    - ``--resume`` skips damaged checkpoints, names them, and resumes from the newest whole one.
    - A checkpoint of another model is refused, with the differences. mmengine would fail in the
      optimizer, or test a partly random model. So is one whose classes were in another order.
    - A training whose weights are no longer finite ends with an error that names the iteration and a weight.
      Its weights are not saved, so that the checkpoints before remain. Weights are looked at before each
      checkpoint, and where a loss is not finite.
    - The run loads its checkpoint, and a backbone's initial weights, under
      :func:`~sasa_det.checkpoints.safe_loading`. An mmengine FlexibleRunner loads before it calls any hook:
      its checkpoints are read so by the command ``sasa-det``, and in a script under ``safe_loading()``.

    Args:
        args, kwargs: Those of :class:`mmengine.hooks.CheckpointHook`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._held: Set[Path] = set()
        if self.backend_args is None and '://' not in str(self.out_dir):
            self.backend_args = {'backend': 'WholeFileBackend'}

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Save where the config says so; end a training whose weights are no longer finite.

        Args:
            runner: The runner.
            batch_idx: The batch's index in the epoch.
            data_batch: The batch.
            outputs: The losses by name.

        Raises:
            RuntimeError: A loss and weights are not finite; names the iteration and a weight.
        """
        loss = outputs.get('loss') if isinstance(outputs, dict) else None
        # With a scaled loss an iteration may overflow, and is then left out: the weights stay finite.
        if loss is not None and not torch.as_tensor(loss).isfinite().all():
            _require_finite_weights(runner, runner.iter + 1, outputs)
        super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def before_run(self, runner) -> None:
        """Hold the work_dir, make the run load safely, and choose what to resume from, if it is not named.

        Args:
            runner: The runner.

        Raises:
            RuntimeError: Another run trains in the work_dir.
            ValueError: There are checkpoints, but none is whole.
        """
        if isinstance(runner._train_loop, BaseLoop) and is_main_process():
            self._held = {Path(runner.work_dir), self._folder(runner.work_dir)}
            for folder in self._held:
                if hold_work_dir(folder):
                    _remove_leftovers(folder)
        # Only this runner's methods: outside of them mmengine's loaders are unchanged.
        for name in ('load_checkpoint', '_init_model_weights'):
            if hasattr(runner, name):  # a FlexibleRunner's strategy loads by itself
                setattr(runner, name, safe_loading()(getattr(runner, name)))
        if not runner._resume or runner._load_from is not None:
            return
        path, damaged = self.find_checkpoint(runner.work_dir)
        for line in damaged:
            runner.logger.warning(f'Passed over: {line}')
        runner._load_from = None if path is None else str(path)

    def find_checkpoint(self, work_dir) -> Tuple[Optional[Path], List[str]]:
        """Choose what to resume from: the checkpoint recorded last, then all others, newest first.

        Args:
            work_dir: The run's folder.

        Returns:
            The first checkpoint that is whole, None if there is none at all; and a line for each damaged one
            that was passed over.

        Raises:
            ValueError: There are checkpoints, but none is whole.

        Examples:
            >>> WholeCheckpointHook().find_checkpoint('no/such/folder')
            (None, [])
        """
        damaged: List[str] = []
        for path in self._candidates(work_dir):
            damage = find_damage(path)
            if damage is None:
                return path, damaged
            damaged.append(f'checkpoint {path} {damage}')
        if damaged:
            raise ValueError(
                'nothing to resume from: '
                + '; '.join(damaged)
                + '. Without --resume it trains anew'
            )
        return None, damaged

    def after_run(self, runner) -> None:
        """Let others train in the work_dir.

        Args:
            runner: The runner.
        """
        for folder in self._held:
            release_work_dir(folder)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Refuse a checkpoint that does not fit.

        Args:
            runner: The runner.
            checkpoint: Its content.

        Raises:
            ValueError: The checkpoint cannot be resumed from or tested; says what differs. A new
                training from it with other layers only logs the difference.
        """
        name = runner._load_from or 'it'
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model_cfg, search = runner.cfg.get('model'), is_main_process()
        if runner._resume or not isinstance(runner._train_loop, BaseLoop):
            require_fit(model, checkpoint, name, model_cfg, search)
            _check_classes(runner, checkpoint, name)
        else:  # a new training may start from other weights
            misfit = describe_misfit(model, checkpoint, model_cfg, path=name, search=search)
            if misfit:
                runner.logger.warning(f'Not all weights are those of checkpoint {name}. {misfit}')
        if not runner._resume:
            return
        require_state(checkpoint, name)
        _check_optimizer(runner, checkpoint, name)

    def _save_checkpoint_with_step(self, runner, step, meta) -> None:
        """Save, record the file, and only then remove the oldest: the others exist at any time."""
        _require_finite_weights(runner, meta['iter'])
        filename = self.filename_tmpl.format(step)
        self.last_ckpt = join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        kept = self._kept_with(step)
        # Includes the oldest: a run killed before it removes that one does so when resumed.
        runner.message_hub.update_info('keep_ckpt_ids', kept)
        runner.save_checkpoint(
            self.out_dir,
            filename,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            note = os.path.join(runner.work_dir, 'last_checkpoint')
            WholeFileBackend().put(self.last_ckpt.encode(), note)
        if self.max_keep_ckpts > 0:
            for old in kept[: -self.max_keep_ckpts]:
                self._remove(self.filename_tmpl.format(old))
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)

    def _save_best_checkpoint(self, runner, metrics) -> None:
        """Save a new best one, and only then remove the one before; mmengine removes first."""
        if not self.save_best:
            return
        _require_finite_weights(runner, runner.iter)
        backend, outdated = self.file_backend, []
        self.file_backend = copy(backend)
        self.file_backend.remove = self.file_backend.rmtree = outdated.append
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        best = [getattr(self, 'best_ckpt_path', None)]
        best += getattr(self, 'best_ckpt_path_dict', {}).values()
        for path in outdated:
            name = os.path.basename(path)
            # In a copied work_dir the best so far may be recorded as a file of the first one.
            if path not in best and path == join_path(self.out_dir, name):
                self._remove(name)

    def _kept_with(self, step: int) -> List[int]:
        earlier = getattr(self, 'keep_ckpt_ids', [])
        return [*(old for old in earlier if old != step), step]

    def _remove(self, filename: str) -> None:
        path = join_path(self.out_dir, filename)
        if not is_main_process():
            return
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # deepspeed's are folders
            self.file_backend.rmtree(path)

    def _folder(self, work_dir) -> Path:
        """The folder of the checkpoints, before mmengine has changed out_dir to it."""
        work_dir = os.path.abspath(work_dir)
        if '://' in str(self.out_dir) or os.path.abspath(self.out_dir or work_dir) == work_dir:
            return Path(work_dir)
        return Path(self.out_dir, os.path.basename(work_dir))

    def _candidates(self, work_dir) -> List[Path]:
        """Checkpoints that may be resumed from."""
        note = Path(work_dir, 'last_checkpoint')
        folder = self._folder(work_dir)
        noted: Optional[Path] = None
        if note.is_file() and note.read_text().strip():
            # Of a folder that was copied, the note still names the first one.
            noted = folder / os.path.basename(note.read_text().strip())
        parts = Formatter().parse(self.filename_tmpl or '*_{}.pth')
        pattern = ''.join(text + ('' if name is None else '[0-9]*') for text, name, *_ in parts)
        others = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
        return [*filter(None, [noted]), *(path for path in others if path != noted)]


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left of files that they were writing."""
    for name in ('*.pth', 'last_checkpoint'):
        for leftover in folder.glob(f'{name}*.partial'):
            leftover.unlink(missing_ok=True)


def _require_finite_weights(runner, iteration: int, losses: Optional[dict] = None) -> None:
    """Raise if weights are infinite or no numbers."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    # A mask may well hold infinities.
    broken += [name for name, buffer in model.named_buffers() if buffer.isnan().any()]
    if not broken:
        return
    named = [
        f'{name} is {torch.as_tensor(loss).item()}, and '
        for name, loss in (losses or {}).items()
        if not torch.as_tensor(loss).isfinite().all()
    ]
    raise RuntimeError(
        f'training ended at iteration {iteration}: {"".join(named[:1])}weights are not finite: '
        f'{", ".join(broken[:3])}{", ..." if len(broken) > 3 else ""}. They are not saved: checkpoints from '
        'before are kept. Lower the learning rate (optim_wrapper.optimizer.lr) or clip gradients '
        '(optim_wrapper.clip_grad), then go on from the last checkpoint with --resume'
    )


def _check_classes(runner, checkpoint: dict, name: str) -> None:
    """Raise if the data set numbers its classes in another order than that of the checkpoint."""
    loops = (runner._train_loop, runner._val_loop, runner._test_loop)
    loop = next(each for each in loops if isinstance(each, BaseLoop))
    here = getattr(loop.dataloader.dataset, 'metainfo', {})
    there = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
    classes = [[str(each) for each in meta.get('classes') or ()] for meta in (there, here)]
    if classes[0] != classes[1] and sorted(classes[0]) == sorted(classes[1]):
        raise ValueError(
            f'checkpoint {name} has the classes {classes[0]}, and the data set of the config has them in '
            f'another order, {classes[1]}: its labels would stand for other classes'
        )


def _check_optimizer(runner, checkpoint: dict, name: str) -> None:
    """Raise if the saved optimizer has other parameter groups than the config's."""
    if not isinstance(runner.optim_wrapper, OptimWrapper):
        return
    # The wrapper's own param_groups are unsuitable: paramwise_cfg adds one that only reports the rate.
    here = runner.optim_wrapper.optimizer.param_groups
    there = checkpoint['optimizer'].get('param_groups', [])
    sizes = [[len(group['params']) for group in groups] for groups in (there, here)]
    if sizes[0] != sizes[1]:
        texts = [f'{len(each)} groups of {sum(each)} weights in all' for each in sizes]
        raise ValueError(
            f"checkpoint {name} is of this config's model, but its optimizer had {texts[0]}, and "
            f"the config's has {texts[1]}: optim_wrapper (paramwise_cfg) or frozen stages differ"
        )
