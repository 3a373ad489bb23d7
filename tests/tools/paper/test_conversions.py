"""The study of converted detectors: which step starts from which weights, and what a failure leaves."""

import json
import subprocess
from types import SimpleNamespace

import pytest
from mmengine.config import Config

from sasa_det.cli.main import build_parser
from sasa_det.configs import find_config
from sasa_det.experiments.training_run import RunFailed
from tools.paper import conversions
from tools.paper.conversions import ROWS, TEACHER, TUNED, Study, as_markdown, main
from tools.paper.study import run_steps

APS = dict(teacher=80.0, converted_2=78.0, converted_4=81.0, teacher_4=80.5, random_4=20.0)


@pytest.fixture
def trained(monkeypatch):
    """Stands for trainings and conversions: notes the configs, and writes what they would."""
    configs = {}

    class Run:
        def __init__(self, config, seed, work_dir):
            self.config, self.seed, self.work_dir = config, seed, work_dir

        def finish(self, tell):
            name = self.work_dir.name
            if (name, self.seed) in failing:
                raise RunFailed('train failed with 1')
            configs[name, self.seed] = Config.fromfile(self.config)
            self.work_dir.mkdir(parents=True, exist_ok=True)
            (self.work_dir / 'last_checkpoint').write_text(str(self.work_dir / 'epoch_8.pth'))
            tell('epoch 1 of 8')
            return dict(AP=APS[name] + self.seed)

    def convert(command, **_):
        options = build_parser().parse_args(command[3:])
        assert options.checkpoint.endswith('teacher/epoch_8.pth')
        config = find_config('retinanet_sasa-tiny_digits')
        name = options.config.rpartition('/')[2].replace('.py', '_converted.py')
        with open(f'{options.out}/{name}', 'w') as file:
            file.write(f'_base_ = {str(config)!r}\nload_from = "converted.pth"\n')
        total = dict(parameters_before=2e6, gflops_before=2, parameters_after=1e6, gflops_after=1)
        with open(f'{options.out}/report.json', 'w') as file:
            json.dump(dict(total=total, ap=dict(after=70.0 + options.seed)), file)
        configs['convert', options.seed] = options
        return SimpleNamespace(returncode=0)

    failing = set()
    monkeypatch.setattr(conversions, 'TrainingRun', Run)
    monkeypatch.setattr(subprocess, 'run', convert)
    return SimpleNamespace(configs=configs, failing=failing)


def test_each_step_starts_from_the_weights_that_its_row_names(trained, tmp_path, capsys):
    folder = tmp_path / 'study'
    arguments = ['retinanet_tiny_digits', '--work-dir', str(folder), '--seeds', '2']
    arguments += ['--data', str(tmp_path / 'mine'), '--', '--heads', '4']
    assert main(arguments) == 0
    assert trained.configs['convert', 1].heads == 4
    teacher = trained.configs['teacher', 1]
    assert teacher.train_dataloader.dataset.data_root == f'{tmp_path / "mine"}/'
    rate = teacher.optim_wrapper.optimizer.lr
    for name, epochs, weights in (
        ('converted_2', 2, 'converted.pth'),
        ('converted_4', 4, 'converted.pth'),
        ('teacher_4', 4, f'{folder}/seed_1/teacher/epoch_8.pth'),
        ('random_4', 4, f'{folder}/seed_1/teacher/epoch_8.pth'),
    ):
        config = trained.configs[name, 1]
        assert (config.load_from, config.train_cfg.max_epochs) == (weights, epochs)
        share = {2: 0.146, 4: 0.5}[epochs]  # of a cosine over the teacher's 8 epochs
        assert config.optim_wrapper.optimizer.lr == pytest.approx(share * rate, rel=0.01)
        attends = config.model.backbone.get('attn_cfg') is not None
        assert attends == (name != 'teacher_4')
    table = (folder / 'results.md').read_text()
    assert (
        table
        == capsys.readouterr().out.partition('| detector')[1] + table.partition('| detector')[2]
    )
    assert '| teacher | 2 | 80.5 ± 0.5 | 1.000 | 2.000 | 2.000 |' in table
    assert '| converted, no training | 2 | 70.5 ± 0.5 | 0.876 | 1.000 | 1.000 |' in table
    assert 'the converted detector has +0.5 ± 0.0 AP more than the teacher' in table


def test_other_settings_are_refused_in_a_folder_that_is_used(trained, tmp_path, capsys):
    arguments = ['retinanet_tiny_digits', '--work-dir', str(tmp_path), '--seeds', '1']
    assert main(arguments) == 0
    assert main([*arguments, '--', '--heads', '4']) == 2
    assert 'holds results with other settings' in capsys.readouterr().err


def test_a_failed_step_leaves_out_what_needs_it_alone(trained, tmp_path):
    trained.failing.update({('teacher', 0), ('converted_2', 1)})
    study = Study(find_config('retinanet_tiny_digits'), tmp_path)
    lines = []
    failed = run_steps(study.plan(2), tmp_path, lines.append)
    assert [line.partition(':')[0] for line in failed] == [
        '[1 of 12] seed 0, teacher', '[9 of 12] seed 1, converted, 2 epochs',
    ]  # fmt: skip
    assert sum('left out, as it needs: seed 0, teacher' in line for line in lines) == 2
    found = json.loads((tmp_path / 'results.json').read_text())
    assert list(found) == list(ROWS)
    assert found[TEACHER] == {'1': 81.0} and found[TUNED] == {'1': 82.0}


def test_a_teacher_that_finds_nothing_has_no_shares():
    assert '| teacher | 1 | 0.0 | – | – | – |' in as_markdown({TEACHER: {0: 0.0}}, {})
