"""The study of budgets: which share each budget is asked for, and what its table says of it."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from sasa_det.cli.main import build_parser
from tools.paper import budgets
from tools.paper.budgets import MIXES, Study, as_markdown, main

# By the part, what its conversion costs in AP and saves, of the time and of the FLOPs.
COSTS = dict(backbone=(4.0, 0.2, 0.3), neck=(1.0, -0.1, 0.1), head=(2.0, 0.3, 0.2))


def cost_of(folder):
    """What a conversion costs and saves; a budget of 10 per cent costs one AP."""
    kind, _, amount = folder.partition('=')
    if amount:
        saved = 0.4 if amount == 'least' else 1 - float(amount)
        return 10 * saved, saved, saved
    return tuple(map(sum, zip(*(COSTS[part] for part in folder.split('+')))))


@pytest.fixture
def teachers(tmp_path):
    folder = tmp_path / 'teachers'
    for seed in (0, 1, 2):
        (folder / f'seed_{seed}' / 'teacher').mkdir(parents=True)
        (folder / f'seed_{seed}' / 'teacher' / 'last_checkpoint').write_text('/gone/epoch_8.pth')
        if seed < 2:  # the last one is in training
            (folder / f'seed_{seed}' / 'teacher' / 'trained').touch()
    (folder / 'tiny.py').write_text('name = "teacher"\n')
    return folder


@pytest.fixture
def converted(monkeypatch, teachers):
    """Stands for conversions and measurements: notes the options, and what was measured."""
    noted = SimpleNamespace(options=[], measured=[], failing=set())

    def convert(command, **_):
        options = build_parser().parse_args(command[3:])
        noted.options.append(options)
        out = budgets.Path(options.out)
        assert options.checkpoint == str(teachers / out.parent.name / 'teacher' / 'epoch_8.pth')
        if out.name in noted.failing:
            return SimpleNamespace(returncode=2)
        ap, _, flops = cost_of(out.name)
        total = dict(parameters_after=1e6, gflops_before=2.0, gflops_after=2.0 * (1 - flops))
        report = dict(
            total=total, layers=[1, 2], ap=dict(before=84.0, after=84.0 - ap + options.seed)
        )
        (out / 'report.json').write_text(json.dumps(report))
        (out / 'tiny_converted.py').write_text(f'name = {out.name!r}\n')
        return SimpleNamespace(returncode=0)

    def alternate(runs, device, least):
        names = [run.args[0].cfg.name for run in runs]
        noted.measured.append(names)
        return [0.05 * (1 - (name != 'teacher' and cost_of(name)[1])) for name in names]

    monkeypatch.setattr(subprocess, 'run', convert)
    monkeypatch.setattr(budgets, 'load_detector', lambda config, *_: SimpleNamespace(cfg=config))
    monkeypatch.setattr(budgets, 'find_images', lambda config: [])
    monkeypatch.setattr(budgets, 'load_images', lambda *_: torch.zeros(2, 3, 4, 4))
    monkeypatch.setattr(budgets, 'stages_of', lambda model: [])
    monkeypatch.setattr(budgets, 'alternate', alternate)
    return noted


def command(teachers, tmp_path, *more):
    return ['--teachers', str(teachers), '--work-dir', str(tmp_path / 'study'), *more]


def test_each_budget_is_asked_for_the_time_of_its_mix(teachers, converted, tmp_path, capsys):
    assert main(command(teachers, tmp_path, '--', '--num-images', '8')) == 0
    asked = [
        options.budget for options in converted.options if options.seed == 1 and options.budget
    ]
    # Each share once: the neck alone is slower than the teacher.
    assert asked == [
        'time=0.6',
        'time=0.8',
        'time=1',
        'time=0.7',
        'time=0.9',
        'time=0.5',
        'time=least',
    ]
    assert {options.num_images for options in converted.options} == {8}
    assert (
        converted.measured[0] == ['teacher', *MIXES]
        and ['teacher', 'time=0.5'] in converted.measured
    )
    table = (tmp_path / 'study' / 'results.md').read_text()
    assert capsys.readouterr().out.endswith(table)
    assert table.startswith('Budgets of time:\n\n| parts | teachers | their AP |')
    rows = dict(line[2:].split(' | ', 1) for line in table.splitlines() if line.startswith('| '))
    assert rows['backbone+neck+head'] == (
        '2 | 84.0 ± 0.0 | 0.600 ± 0.000 | 0.800 ± 0.000 | 1.000 ± 0.000 | 77.5 ± 0.5 '
        '| 0.600 ± 0.000 | 1.200 ± 0.000 | 1.000 ± 0.000 | 80.5 ± 0.5 | +3.0 ± 0.0 | yes |'
    )
    assert rows['head'].endswith('| 81.5 ± 0.5 | -1.0 ± 0.0 | no |')
    assert rows['neck'].endswith(
        '| 1.000 ± 0.000 | 2.000 ± 0.000 | 1.000 ± 0.000 | 84.5 ± 0.5 | +1.0 ± 0.0 | yes |'
    )
    assert rows['the least that can be had'].endswith('| 80.5 ± 0.5 | – | – |')
    conversions = len(converted.options)
    assert main(command(teachers, tmp_path, '--', '--num-images', '8')) == 0
    assert len(converted.options) == conversions and len(converted.measured) == 2 * 8


def test_budgets_of_flops_have_a_table_of_their_own(teachers, converted, tmp_path):
    assert main(command(teachers, tmp_path, '--kinds', 'time', 'flops')) == 0
    table = (tmp_path / 'study' / 'results.md').read_text().partition('Budgets of flops:')[2]
    rows = dict(line[2:].split(' | ', 1) for line in table.splitlines() if line.startswith('| '))
    assert rows['backbone+neck'].split(' | ')[-2:] == ['+1.0 ± 0.0', 'yes |']
    asked = [options.budget for options in converted.options if options.seed == 0]
    assert 'flops=0.6' in asked and 'flops=least' in asked


def test_a_budget_that_fails_leaves_out_its_row_of_that_teacher(
    teachers, converted, tmp_path, capsys
):
    converted.failing.add('time=0.8')
    assert main(command(teachers, tmp_path)) == 1
    assert 'seed 1, budget of time for backbone: convert failed' in capsys.readouterr().err
    table = (tmp_path / 'study' / 'results.md').read_text()
    assert '\n| backbone |' not in table and '\n| head |' in table


def test_a_budget_that_takes_more_than_was_asked_is_no_success():
    mix = dict(AP=80.0, AP_before=84.0, layers=2, parameters=1e6, GFLOPs=1.0, flops=0.5)
    found = {
        'seed 0, head': mix,
        'seed 0, times': dict(head=0.8),
        'seed 0, budget of time for head': dict(mix, AP=83.0, time=0.9),
    }
    assert '| +3.0 | no: 1.12 of the budget |' in as_markdown(found, [0], ['time'])


def test_a_folder_without_teachers_is_told(tmp_path, capsys):
    assert main(command(tmp_path / 'nothing', tmp_path)) == 2
    assert 'has 0 configs and 0 trained teachers' in capsys.readouterr().err


def test_another_study_in_the_folder_is_refused(teachers, tmp_path):
    Study(teachers, tmp_path / 'study')
    with pytest.raises(ValueError, match='holds results with other settings'):
        Study(teachers, tmp_path / 'study', threads=2)
