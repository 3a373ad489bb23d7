"""Which losses and metrics did mmengine log during a training?"""

import json
from pathlib import Path
from typing import List, NamedTuple, Sequence, Union


class TrainingLog(NamedTuple):
    """The records of one training, across interrupted and resumed runs.

    Args:
        train: Records with losses, in order of 'step', the iteration.
        val: Records with metrics, in order of 'step', the epoch or else the iteration.
        files: Their files, oldest first.
        diagnosis: Records of AttentionDiagnosisHook, in order of 'step', the iteration.
    """

    train: List[dict]
    val: List[dict]
    files: List[Path]
    diagnosis: Sequence[dict] = ()

    @property
    def val_unit(self) -> str:
        """The unit of the steps of ``val``: 'epoch' or 'iteration'."""
        epochs = max((record.get('epoch', 0) for record in self.train), default=0)
        last = max((record['step'] for record in self.val), default=0)
        return 'epoch' if last <= epochs else 'iteration'

    @property
    def seconds(self) -> float:
        """Time spent in iterations, validation left out."""
        seconds, before = 0.0, 0
        for record in self.train:
            seconds += record.get('time', 0.0) * (record['step'] - before)
            before = record['step']
        return seconds


def read_training_log(work_dir: Union[str, Path]) -> TrainingLog:
    """Merge the ``<timestamp>/vis_data/scalars.json`` in a work folder of mmengine in order.

    A resumed run repeats the steps after the last checkpoint, so the earlier run's records of these
    are dropped.

    Args:
        work_dir: The folder given to mmdet's tools/train.py.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file is broken, or none holds a training record.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / '20260101_120000' / 'vis_data').mkdir(parents=True)
        >>> path = folder / '20260101_120000' / 'vis_data' / 'scalars.json'
        >>> _ = path.write_text('{"loss": 1.5, "time": 0.2, "step": 50}')
        >>> read_training_log(folder).seconds
        10.0
    """
    pattern = '*/vis_data/scalars.json'
    paths = sorted(Path(work_dir).glob(pattern))
    if not paths:
        raise FileNotFoundError(f'{Path(work_dir) / pattern}: no such training log')
    train, val, files, diagnosis = [], [], [], []
    for path in paths:
        records = _read_lines(path)
        new_train = [record for record in records if 'loss' in record]
        if not new_train:
            continue
        first = new_train[0]
        # Validation follows its epoch, so the record of epoch e is void once epoch e is trained again.
        by_epoch = TrainingLog(train + new_train, val, []).val_unit == 'epoch'
        start = first.get('epoch', first['step']) if by_epoch else first['step']
        train = [record for record in train if record['step'] < first['step']]
        val = [record for record in val if record['step'] < start]
        diagnosis = [record for record in diagnosis if record['step'] < first['step']]
        train += new_train
        val += [record for record in records if any('mAP' in key for key in record)]
        diagnosis += [record for record in records if 'diagnosis/entropy' in record]
        files.append(path)
    if not train:
        raise ValueError(f'{paths[-1]}: no record of training in it; is it empty?')
    return TrainingLog(train, val, files, diagnosis)


def _read_lines(path: Path) -> List[dict]:
    lines = path.read_text(errors='replace').splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # the run was stopped while it wrote this line
            raise ValueError(f'{path}: line {number} is not JSON ({error})') from error
        if not isinstance(record, dict) or 'step' not in record:
            raise ValueError(f"{path}: line {number} is not a record with a 'step'")
        for key in ('step', 'epoch', 'time', 'loss'):
            if not isinstance(record.get(key, 0), (int, float)):
                raise ValueError(
                    f'{path}: line {number} has {key} {record[key]!r}, which is no number'
                )
        records.append(record)
    return records
