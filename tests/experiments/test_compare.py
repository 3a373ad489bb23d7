"""Comparison of configs: real runs of seconds, interrupted and gone on with; tables from numbers."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from sasa_det.data.digits import make_digits
from sasa_det.evaluation.costs import Costs
from sasa_det.experiments.compare import (
    Entry,
    as_markdown,
    compare,
    cost_for_test_image,
    draw,
    draw_training,
    main,
)
from sasa_det.experiments.training_run import RunFailed, TrainingRun, read_config

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / 'configs/quickstart/retinanet_tiny_digits.py'


@pytest.fixture(scope='module')
def options(tmp_path_factory):
    """Options under which the tiny config trains two epochs on ten small images."""
    root = tmp_path_factory.mktemp('compare') / 'digits'
    make_digits(root, num_train=10, num_val=10, image_size=64, quiet=True)
    found = ['train_cfg.max_epochs=2', 'train_cfg.val_interval=2', 'model.test_cfg.score_thr=0.0']
    for split in ('train', 'val', 'test'):
        found += [
            f'{split}_dataloader.dataset.data_root={root}/',
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
        ]
    for split in ('val', 'test'):
        found.append(f'{split}_evaluator.ann_file={root}/annotations/instances_val.json')
    found.append('default_hooks.logger.interval=1')
    return found


@pytest.fixture
def entries():
    """Two configs, one of them with one seed only, and one that has not been trained."""
    result = dict(
        AP=40.0, AP50=60.0, AP75=41.0, train_seconds=600.0, train_mb=900, test_mb=500, test_ms=12.5
    )
    other = {**result, 'AP': 42.0}
    return [
        Entry(
            'a', Costs(1_500_000, 3, 2_000_000_000), {0: result, 1: other}, 'all attention', 8, 16
        ),
        Entry('b', Costs(1_000_000, 3, 1_000_000_000), {0: result}),
        Entry('c', Costs(1, 1, 1), {}),
    ]


def test_a_run_goes_on_where_it_was_interrupted_and_is_not_done_twice(
    options, tmp_path, monkeypatch
):
    class Interrupt(Exception):
        pass

    def interrupt(text):
        if (tmp_path / 'run/last_checkpoint').is_file():
            raise Interrupt

    run = TrainingRun(TINY, 3, tmp_path / 'run', options)
    with pytest.raises(Interrupt):
        run.finish(interrupt)
    assert run.result is None and not (tmp_path / 'run/trained').exists()

    told = []
    result = TrainingRun(TINY, 3, tmp_path / 'run', options).finish(told.append)
    printed = (tmp_path / 'run/train.out').read_text()
    assert 'resumed epoch: 1' in printed
    assert printed.count('Epoch(train) [1][1/2]') == 1
    assert printed.count('Epoch(train) [2][1/2]') >= 1
    assert 'seed: 3' in printed or 'seed=3' in printed
    assert 'testing' in told
    assert result.keys() == {
        'AP', 'AP50', 'AP75', 'train_seconds', 'train_mb', 'test_mb', 'test_ms'
    }  # fmt: skip
    assert 0 <= result['AP'] <= result['AP50'] <= 100
    assert result['train_mb'] > 100 and result['test_mb'] > 100
    assert result['train_seconds'] > 0 and result['test_ms'] > 0
    tested = json.loads(next((tmp_path / 'run/test').glob('*/*.json')).read_text().splitlines()[-1])
    assert result['AP'] == 100 * tested['coco/bbox_mAP']

    monkeypatch.setattr(subprocess, 'Popen', None)
    assert TrainingRun(TINY, 3, tmp_path / 'run', options).finish() == result
    with pytest.raises(ValueError, match='holds a run of another config or with other options'):
        TrainingRun(TINY, 4, tmp_path / 'run', options)

    # The comparison finds it, and writes what is asked for.
    folder = tmp_path / 'all'
    (folder / TINY.stem).mkdir(parents=True)
    (tmp_path / 'run').rename(folder / TINY.stem / 'seed_3')
    monkeypatch.setattr('sasa_det.experiments.compare.range', lambda n: [3], raising=False)
    assert (
        main([str(TINY), '--work-dir', str(folder), '--seeds', '1', '--cfg-options', *options]) == 0
    )
    content = json.loads((folder / 'compare.json').read_text())
    assert [entry['config'] for entry in content] == [TINY.stem]
    assert content[0]['results'] == {'3': result}
    assert (
        f'| {TINY.stem} | 1 | 2 | 8 | {result["AP"]:.1f} |' in (folder / 'compare.md').read_text()
    )
    for name in ('compare.png', 'training.png'):
        assert (folder / name).stat().st_size > 5000


def test_what_fails_is_said_and_the_rest_goes_on(options, tmp_path, monkeypatch):
    def finish(self, tell):
        if 'sasa' in Path(self.config_path).name:
            raise RunFailed('train failed with 1')
        log = self.work_dir / '20260101_120000' / 'vis_data' / 'scalars.json'
        log.parent.mkdir(parents=True)
        records = [dict(loss=2.0 / step, grad_norm=step, step=step) for step in (1, 2)]
        log.write_text('\n'.join(map(json.dumps, records)))
        return dict(
            AP=1.0, AP50=2.0, AP75=1.0, train_seconds=1.0, train_mb=1, test_mb=1, test_ms=1.0
        )

    monkeypatch.setattr(TrainingRun, 'finish', finish)
    configs = [TINY.with_name('retinanet_sasa-tiny_digits.py'), TINY]
    failed = compare(configs, tmp_path, 2, options, quiet=True)
    assert failed == [
        f'retinanet_sasa-tiny_digits, seed {seed}: train failed with 1' for seed in (0, 1)
    ]
    content = json.loads((tmp_path / 'compare.json').read_text())
    assert [len(entry['results']) for entry in content] == [0, 2]
    loss, norm = draw_training({TINY.stem: tmp_path / TINY.stem / 'seed_0'}).axes
    assert [list(axes.lines[0].get_ydata()) for axes in (loss, norm)] == [[2.0, 1.0], [1, 2]]


@pytest.fixture
def tested(options, tmp_path, monkeypatch):
    """A run that was trained, and whose test gives the metrics that are asked for."""
    run = TrainingRun(TINY, 0, tmp_path / 'run', options)
    (run.work_dir / 'trained').touch()
    (run.work_dir / 'last_checkpoint').write_text('epoch_2.pth')
    log = run.work_dir / '20260101_120000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps(dict(loss=1.0, step=1, memory=9)))
    monkeypatch.setattr(TrainingRun, '_run', lambda *args, **kwargs: 5)

    def finish(**metrics):
        numbers = run.work_dir / 'test' / '20260101_130000' / '20260101_130000.json'
        numbers.parent.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps(dict(metrics, data_time=0.1, time=0.2)))
        return run.finish()

    return finish


def test_a_detector_that_finds_nothing_has_an_ap_of_0(tested):
    """mmdet then logs no metric at all."""
    result = tested()
    assert (result['AP'], result['AP50'], result['AP75']) == (0, 0, 0)


def test_without_a_box_there_is_no_ap(tested):
    none = {f'coco/bbox_{name}': -1.0 for name in ('mAP', 'mAP_50', 'mAP_75')}
    with pytest.raises(RunFailed, match='its test set has no box to find'):
        tested(**none)


def test_a_full_disk_leaves_what_a_run_has_noted(options, tmp_path, monkeypatch):
    """A half of its notes would keep the run from going on."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    class Failed(subprocess.Popen):
        def __init__(self, command, **options):
            super().__init__(['false'], **options)

    run = TrainingRun(TINY, 0, tmp_path, options)
    (tmp_path / 'peaks.json').write_text('{"train": 7}')
    monkeypatch.setattr(subprocess, 'Popen', Failed)
    monkeypatch.setattr(os, 'fsync', full)
    for broken in (run.finish, lambda: TrainingRun(TINY, 0, tmp_path, options)):
        with pytest.raises(OSError, match='could not be written'):
            broken()
    monkeypatch.undo()
    assert (tmp_path / 'peaks.json').read_text() == '{"train": 7}'
    assert TrainingRun(TINY, 0, tmp_path, options).result is None


def test_a_tool_that_fails_shows_the_end_of_its_output(options, tmp_path):
    broken = [option for option in options if 'train_dataloader.dataset' not in option]
    run = TrainingRun(TINY, 0, tmp_path, [*broken, 'train_dataloader.dataset.data_root=/nowhere/'])
    with pytest.raises(
        RunFailed,
        match=r'train failed with 2; .*train\.out ends in\n(.|\n)*\nsasa-det train: .*/nowhere/',
    ):
        run.finish()


def test_costs_are_those_of_the_image_as_it_is_batched(options):
    costs = cost_for_test_image(read_config(TINY, options))
    larger = [*options, 'test_dataloader.dataset.pipeline.1.scale=(128,128)']
    # 64 px are scaled to 192 by the config, and to 128 here; all maps are divisible.
    ratio = cost_for_test_image(read_config(TINY, larger)).flops / costs.flops
    assert ratio == pytest.approx((128 / 192) ** 2, rel=0.01)


def test_table_and_plot(entries):
    *lines, _, note = as_markdown(entries).splitlines()
    assert len(lines) == 4
    assert note == 'GFLOPs are per image, and a multiply-add counts as two.'
    assert lines[2].startswith(
        '| a | 2 | 8 | 16 | 41.0 ± 1.0 | 60.0 ± 0.0 | 41.0 ± 0.0 | 600 ± 0 | 900 ± 0 |'
    )
    assert lines[2].endswith('| 1.500 | 2.000 |')
    assert lines[3].startswith(
        '| b | 1 | None | None | 40.0 | 60.0 | 41.0 | 600 | 900 | 12.5 | 500 |'
    )
    axes = draw(entries).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['all attention', 'b']
    points = [
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if len(line.get_xdata()) == 1
    ]
    assert (2.0, 41.0) in points and (1.0, 40.0) in points


def test_refuses(tmp_path, capsys):
    with pytest.raises(ValueError, match='configs must have different names'):
        compare([TINY, TINY], tmp_path)
    with pytest.raises(ValueError, match='seeds must be at least 1, but is 0'):
        compare([TINY], tmp_path, seeds=0)
    assert main([str(tmp_path / 'none.py'), '--work-dir', str(tmp_path)]) == 2
    assert 'none.py' in capsys.readouterr().err
