"""Comparison of configs: real runs of seconds, interrupted and gone on with; tables from numbers."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
from matplotlib.figure import Figure

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
from sasa_det.experiments.sweep import as_cfg_options, read_sweep
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


LR, BATCH = 'optim_wrapper.optimizer.lr', 'train_dataloader.batch_size'


@pytest.fixture
def trained(monkeypatch):
    """Runs that end at once: their folders in order. Each config's AP is highest at a rate of its own."""
    folders = []

    def run(self, tool, *arguments, watch):
        if tool == 'train':
            folders.append(self.work_dir)
            log = self.work_dir / '20260101_120000' / 'vis_data' / 'scalars.json'
            log.parent.mkdir(parents=True)
            found = {'diagnosis/entropy': 0.25, 'diagnosis/share_qk': 0.125}
            log.write_text(
                f'{json.dumps(dict(loss=1.0, step=1))}\n{json.dumps(dict(found, step=2))}\n'
            )
            (self.work_dir / 'last_checkpoint').write_text('epoch_2.pth')
            (self.work_dir / 'peaks.json').write_text('{"train": 7}')
        return 5

    def numbers(self):
        best = 0.02 if 'sasa' in Path(self.config_path).name else 0.01
        ap = 50 - 1000 * abs(self.config.optim_wrapper.optimizer.lr - best) + self.seed
        return dict(AP=ap, AP50=60.0, AP75=41.0, test_ms=1.0)

    monkeypatch.setattr(TrainingRun, '_run', run)
    monkeypatch.setattr(TrainingRun, '_test_numbers', numbers)
    monkeypatch.setattr(
        'sasa_det.experiments.compare.cost_for_test_image', lambda _: Costs(1, 1, 1)
    )
    monkeypatch.setattr(Figure, 'savefig', lambda self, path, **options: Path(path).touch())
    return folders


def test_a_sweep_takes_each_config_at_its_best_and_goes_on_where_it_stopped(
    trained, tmp_path, monkeypatch
):
    sasa = TINY.with_name('retinanet_sasa-tiny_digits.py')
    sweep = [f'{LR}=0.01,0.02', f'{BATCH}=4']
    finish = TrainingRun.finish

    def interrupted(self, tell):
        if len(trained) == 3:
            raise KeyboardInterrupt
        return finish(self, tell)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingRun, 'finish', interrupted)
        compare([TINY, sasa], tmp_path, 2, quiet=True, sweep=sweep)
    assert len(json.loads((tmp_path / 'compare.json').read_text())[0]['tried']) == 2

    assert compare([TINY, sasa], tmp_path, 2, quiet=True, sweep=sweep) == []
    assert [str(folder.relative_to(tmp_path)) for folder in trained] == [
        f'{TINY.stem}/lr=0.01,batch_size=4/seed_0',
        f'{sasa.stem}/lr=0.01,batch_size=4/seed_0',
        f'{TINY.stem}/lr=0.02,batch_size=4/seed_0',
        f'{sasa.stem}/lr=0.02,batch_size=4/seed_0',
        f'{TINY.stem}/lr=0.01,batch_size=4/seed_1',
        f'{sasa.stem}/lr=0.02,batch_size=4/seed_1',
    ]
    conv, attention = json.loads((tmp_path / 'compare.json').read_text())
    assert conv['setting'] == {LR: '0.01', BATCH: '4'} and conv['batch_size'] == 4
    assert attention['setting'] == {LR: '0.02', BATCH: '4'}
    assert [result['AP'] for result in attention['results'].values()] == [50, 51]
    assert [(each['setting'][LR], each['AP']) for each in conv['tried']] == [
        ('0.01', 50), ('0.02', 40)
    ]  # fmt: skip
    text = (tmp_path / 'compare.md').read_text()
    assert f'| {TINY.stem} | 2 | 8 | 4 | lr=0.01, batch_size=4 | 50.5 ± 0.5 |' in text
    assert '| config | lr | batch_size | AP | entropy | share of q.k |' in text
    assert f'| {sasa.stem} | 0.01 | 4 | 40.0 | 0.250 | 0.125 |' in text
    assert (tmp_path / 'attention.png').is_file()


def test_a_setting_that_fails_is_not_the_best(trained, tmp_path, monkeypatch):
    def fail(self):
        raise RunFailed('no')

    numbers = TrainingRun._test_numbers
    monkeypatch.setattr(
        TrainingRun,
        '_test_numbers',
        lambda self: (fail if self.config.optim_wrapper.optimizer.lr == 0.01 else numbers)(self),
    )
    failed = compare([TINY], tmp_path, 2, quiet=True, sweep=[f'{LR}=0.01,0.02'])
    assert failed == [f'{TINY.stem}, lr=0.01, seed 0: no']
    (entry,) = json.loads((tmp_path / 'compare.json').read_text())
    assert entry['setting'] == {LR: '0.02'} and len(entry['results']) == 2
    assert f'| {TINY.stem} | 0.01 | failed |' in (tmp_path / 'compare.md').read_text()

    failed = compare([TINY], tmp_path / 'none', 2, quiet=True, sweep=[f'{LR}=0.01'])
    assert failed == [f'{TINY.stem}, lr=0.01, seed 0: no']


def test_a_sweep_names_what_a_config_lacks(tmp_path):
    expected = "retinanet_tiny_digits has no 'optim_wrapper.lr'; .* which has clip_grad, optimizer"
    with pytest.raises(ValueError, match=expected):
        compare([TINY], tmp_path, sweep=['optim_wrapper.lr=1,2'])
    assert not list(tmp_path.iterdir())


def test_a_star_stands_for_each_key_at_its_place():
    config = read_config(TINY)
    options = as_cfg_options({'optim_wrapper.paramwise_cfg.*.*.lr_mult': '1'}, config, TINY.stem)
    names = ('query', 'key', 'rel_row', 'rel_col')
    assert options == [
        f'optim_wrapper.paramwise_cfg.custom_keys.{name}.lr_mult=1' for name in names
    ]
    assert as_cfg_options({'param_scheduler.1.end': '24'}, config, TINY.stem) == [
        'param_scheduler.1.end=24'
    ]


@pytest.mark.parametrize('text', ['lr', 'lr=', 'lr=1,,2', '=1'])
def test_a_sweep_is_keys_and_values(text):
    with pytest.raises(ValueError, match='--sweep takes KEY=V1,V2, but got'):
        read_sweep([text])


@pytest.mark.parametrize('sweep', [['lr=1,1'], ['lr=1', 'lr=2']])
def test_a_sweep_has_nothing_twice(sweep):
    with pytest.raises(ValueError, match='--sweep has a key or a value twice'):
        read_sweep(sweep)


def test_a_comma_in_brackets_is_a_values_own():
    assert read_sweep(['a=(1,2),[(3,4),5]']) == [{'a': '(1,2)'}, {'a': '[(3,4),5]'}]


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
