"""One training of a config with one seed, by mmdet's own tools: its costs and its COCO metrics."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Optional, Sequence

from ..configs import read_config
from ..evaluation.training_log import read_training_log
from ..files import write_whole

_POLL = 0.5  # seconds


class RunFailed(RuntimeError):
    """A tool failed, and where its output is and how it ends; or there is nothing to measure."""


class TrainingRun:
    """Train, test and measure a config in a folder of its own, or resume there.

    Args:
        config: Path of the config.
        seed: Seed of all random choices.
        work_dir: The folder.
        cfg_options: Changes to the config, as mmdet's ``--cfg-options`` takes them.

    Raises:
        ValueError: The folder holds a run of another config or with other options.

    Examples:
        >>> run = TrainingRun('my_config.py', seed=0, work_dir='work_dirs/my_config')  # doctest: +SKIP
        >>> run.finish()['AP']  # doctest: +SKIP
        41.7
    """

    def __init__(self, config, seed: int, work_dir, cfg_options: Sequence[str] = ()) -> None:
        self.config_path, self.seed, self.work_dir = str(config), seed, Path(work_dir)
        self.cfg_options = [*cfg_options, f'randomness.seed={seed}']
        self.config = read_config(config, self.cfg_options)
        settings = hashlib.sha256(self.config.pretty_text.encode()).hexdigest()
        path = self.work_dir / 'settings.txt'
        if path.is_file() and path.read_text() != settings:
            raise ValueError(
                f'work_dir {self.work_dir} holds a run of another config or with other options; '
                'name another folder, or remove it'
            )
        self.work_dir.mkdir(parents=True, exist_ok=True)
        write_whole(path, settings.encode())

    @property
    def result(self) -> Optional[dict]:
        """The result of :meth:`finish`; None if it has not finished."""
        path = self.work_dir / 'result.json'
        return json.loads(path.read_text()) if path.is_file() else None

    def finish(self, tell: Callable[[str], None] = lambda text: None) -> dict:
        """Run the remaining steps.

        Args:
            tell: Called every half second with the current step.

        Returns:
            The COCO metrics 'AP', 'AP50' and 'AP75' in per cent. 'train_seconds' leaves validation
            out. 'train_mb' and 'test_mb' are the peak memory of the GPU, or of the process without
            one. 'test_ms' is milliseconds per image, without loading. With AttentionDiagnosisHook,
            'entropy' and 'share_qk' are its last means over heads.

        Raises:
            RunFailed: A tool failed.
        """
        if self.result is not None:
            return self.result
        trained = self.work_dir / 'trained'
        if not trained.is_file():
            resume = ['--resume'] if (self.work_dir / 'last_checkpoint').is_file() else []
            self._run('train', *resume, watch=lambda: tell(self._progress()))
            trained.touch()
        checkpoint = (self.work_dir / 'last_checkpoint').read_text().strip()
        test_mb = self._run('test', checkpoint, watch=lambda: tell('testing'))
        log = read_training_log(self.work_dir)
        gpu_mb = max((record.get('memory', 0) for record in log.train), default=0)
        result = dict(
            **self._test_numbers(),
            train_seconds=log.seconds,
            train_mb=gpu_mb or self._peaks()['train'],
            test_mb=test_mb,
        )
        for name in ('entropy', 'share_qk'):
            if log.diagnosis:
                result[name] = log.diagnosis[-1][f'diagnosis/{name}']
        text = json.dumps(result, indent=2) + '\n'
        write_whole(self.work_dir / 'result.json', text.encode())
        return result

    def _run(self, tool: str, *arguments: str, watch: Callable[[], None]) -> int:
        """Run a tool of mmdet and return its peak memory in MB, earlier parts of a run included."""
        folder = self.work_dir if tool == 'train' else self.work_dir / 'test'
        command = [
            sys.executable, '-m', 'sasa_det', tool, self.config_path, *arguments,
            '--work-dir', str(folder), '--cfg-options', *self.cfg_options,
        ]  # fmt: skip
        output = self.work_dir / f'{tool}.out'
        with output.open('a') as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            peak = 0
            try:
                while process.poll() is None:
                    peak = max(peak, _peak_mb(process.pid))
                    watch()
                    time.sleep(_POLL)
            except BaseException:  # on Ctrl-C stop the tool; its checkpoints stay
                process.send_signal(signal.SIGTERM)
                process.wait()
                raise
            finally:
                peaks = self._peaks()
                peaks[tool] = max(peak, peaks.get(tool, 0))
                text = json.dumps(peaks) + '\n'
                write_whole(self.work_dir / 'peaks.json', text.encode())
        if process.returncode:
            tail = '\n'.join(output.read_text(errors='replace').splitlines()[-15:])
            raise RunFailed(f'{tool} failed with {process.returncode}; {output} ends in\n{tail}')
        return peaks[tool]

    def _peaks(self) -> dict:
        path = self.work_dir / 'peaks.json'
        return json.loads(path.read_text()) if path.is_file() else {}

    def _progress(self) -> str:
        """The training's progress, from its log."""
        try:
            last = read_training_log(self.work_dir).train[-1]
        except (FileNotFoundError, ValueError):
            return 'starting'
        of = self.config.train_cfg.get('max_epochs')
        return (
            f'epoch {last["epoch"]} of {of}' if of and 'epoch' in last else f'step {last["step"]}'
        )

    def _test_numbers(self) -> dict:
        """The last results of mmdet's test.py: the COCO metrics in per cent, milliseconds per image."""
        numbers = {}
        for path in sorted((self.work_dir / 'test').glob('*/*.json')):
            numbers = json.loads(path.read_text().splitlines()[-1])
        found = {
            key.rpartition('bbox_')[2]: value for key, value in numbers.items() if 'bbox_' in key
        }
        # mmdet gives no number of a detector that finds nothing, and -1 where there is nothing to find.
        ap, ap50, ap75 = (found.get(name, 0) for name in ('mAP', 'mAP_50', 'mAP_75'))
        if ap < 0:
            raise RunFailed('its test set has no box to find')
        seconds = numbers['time'] - numbers['data_time']
        return dict(
            AP=100 * ap,
            AP50=100 * ap50,
            AP75=100 * ap75,
            test_ms=1000 * seconds / self.config.test_dataloader.batch_size,
        )


def _peak_mb(pid: int) -> int:
    """Peak resident memory of a process so far; 0 if the system does not report it."""
    try:
        for line in Path(f'/proc/{pid}/status').read_text().splitlines():
            if line.startswith('VmHWM:'):
                return int(line.split()[1]) // 1024
    except OSError:
        pass
    return 0
