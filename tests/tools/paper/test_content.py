"""The study of content in converted detectors: the rates that it trains with, and its table."""

import json
import subprocess
from types import SimpleNamespace

import pytest
from mmengine.config import Config

from sasa_det.configs import find_config
from sasa_det.evaluation.diagnosis_accuracy import AWAY
from sasa_det.visualization.diagnosis_page import AS_TRAINED
from tools.paper import content


@pytest.fixture
def converted(tmp_path):
    """A converted detector's config."""
    path = tmp_path / 'tiny_converted.py'
    path.write_text(f'_base_ = {str(find_config("retinanet_sasa-tiny_digits"))!r}\n')
    return path


@pytest.fixture
def trained(monkeypatch):
    """Stands for trainings and diagnoses: notes the trainings' configs."""
    configs = []

    class Run:
        def __init__(self, config, seed, work_dir):
            self.config, self.work_dir = config, work_dir

        def finish(self, tell):
            configs.append(Config.fromfile(self.config))
            self.work_dir.mkdir(parents=True, exist_ok=True)
            (self.work_dir / 'last_checkpoint').write_text(str(self.work_dir / 'last.pth'))

    def diagnose(command, stdout, **_):
        folder = content.Path(command[-1])
        if 'content_4_10' in command[4]:
            stdout.write('out of memory')
            return SimpleNamespace(returncode=1)
        folder.mkdir()
        aps = {AS_TRAINED: 0.8, AWAY['q.k']: 0.79, AWAY['q.r']: 0.1, AWAY['pixel']: 0.7}
        numbers = dict(
            metric='coco/bbox_mAP',
            accuracy={name: {'coco/bbox_mAP': ap} for name, ap in aps.items()},
            layers=dict(
                a=dict(heads=[dict(share_qk=0.1, share_qr=0.2, static=True)]),
                b=dict(heads=[dict(share_qk=0.3, share_qr=0.4, static=False)]),
            ),
        )
        (folder / 'diagnosis.json').write_text(json.dumps(numbers))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(content, 'TrainingRun', Run)
    monkeypatch.setattr(subprocess, 'run', diagnose)
    return configs


def test_each_training_has_its_rate_and_length(converted, trained, tmp_path, capsys):
    folder = tmp_path / 'study'
    arguments = [str(converted), '--work-dir', str(folder), '--epochs', '4', '12', '--factors']
    assert content.main([*arguments, '0', '3']) == 0
    rates = [
        config.optim_wrapper.paramwise_cfg.custom_keys['.query.'].lr_mult for config in trained
    ]
    assert [config.train_cfg.max_epochs for config in trained] == [4, 4, 12, 12]
    assert rates == [0, 3, 0, 3]
    table = capsys.readouterr().out.splitlines()[-6:]
    assert table[2] == '| 4 | 0 | 80.0 | 79.0 | 70.0 | 20 %, 30 % | 50 % |'
    assert (folder / 'results.md').read_text().splitlines() == table
    assert len(json.loads((folder / 'results.json').read_text())) == 4


def test_a_failed_diagnosis_leaves_out_its_row_alone(converted, trained, tmp_path, capsys):
    folder = tmp_path / 'study'
    arguments = [str(converted), '--work-dir', str(folder), '--epochs', '4', '--factors']
    assert content.main([*arguments, '10', '1']) == 1
    told = capsys.readouterr().err
    assert 'content: FAILED, [1 of 2] 4 epochs, factor 10: diagnose failed with 1' in told
    assert told.endswith('out of memory\n')
    table = (folder / 'results.md').read_text().splitlines()
    assert len(table) == 3 and table[2].startswith('| 4 | 1 | 80.0 |')
