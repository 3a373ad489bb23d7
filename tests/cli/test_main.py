"""``sasa-det``: help, listing, describing, explaining, and handing over to mmdet's tools."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from mmengine.config import Config

from sasa_det.cli.main import main
from sasa_det.configs import shipped_configs

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    'doctor', 'demo', 'demo-data', 'coco-config', 'box-crops', 'train', 'test', 'tool', 'report', 'compare',
    'configs', 'convert', 'check-data', 'predict', 'explain', 'diagnose', 'explore', 'export',
)  # fmt: skip


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        main([*argv, '--help'])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys):
    printed = help_of(capsys)
    named = {
        line.split()[0]
        for line in printed.splitlines()
        if line.startswith('    ') and line[4] != ' '
    }
    assert named == set(COMMANDS)
    assert 'examples:\n  sasa-det doctor' in printed


def test_the_documentation_lists_every_command():
    table = (ROOT / 'docs' / 'commands.md').read_text()
    assert set(re.findall(r'^\| `sasa-det ([\w-]+)', table, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize('command', COMMANDS)
def test_each_command_has_examples_in_its_help(capsys, command):
    assert f'examples:\n  sasa-det {command}' in help_of(capsys, command)


def test_help_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'sasa_det', '--help'],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert 'sasa_det.cli.main' in imported
    assert not imported & {
        'torch',
        'numpy',
        'mmengine',
        'mmcv',
        'mmdet',
        'cv2',
        'rich',
        'matplotlib',
    }


def test_arguments_that_are_not_known_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['configs', '--sizes', '3'])
    assert stopped.value.code == 2
    assert 'unrecognized arguments: --sizes' in capsys.readouterr().err


class TestConfigs:
    def test_lists_every_leaf(self, capsys):
        assert main(['configs']) == 0
        printed = capsys.readouterr().out.splitlines()
        leaves = {
            path.stem for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts
        }
        assert {line.strip() for line in printed if line.startswith('    ')} == leaves
        assert shipped_configs().keys() == leaves

    def test_flattens_one(self, capsys, tmp_path):
        whole = tmp_path / 'new' / 'whole.py'
        name = 'retinanet_sasa-tiny_digits'
        assert main(['configs', name, '--flatten', str(whole)]) == 0
        assert capsys.readouterr().out == f'wrote {whole}\n'
        assert not re.search(r'^_base_\b', whole.read_text(), re.MULTILINE)
        original, written = (Config.fromfile(path) for path in (shipped_configs()[name], whole))
        assert written.to_dict() == original.to_dict()
        assert main(['configs', name, '--flatten', str(whole)]) == 2
        assert capsys.readouterr().err == (
            f'sasa-det configs: {whole}: is there already; name another file\n'
        )
        assert main(['configs', '--flatten', str(tmp_path / 'other.py')]) == 2
        assert 'name the config' in capsys.readouterr().err

    def test_describes_one(self, capsys):
        """The parameters are those of test_configs.py, which counts them by hand."""
        name = 'retinanet_sasa-r50_sasa-fpn_sasa-head_1x_coco'
        assert main(['configs', name, '--size', '64', '96']) == 0
        rows = [
            [cell.strip() for cell in line.split('│')[1:4]]
            for line in capsys.readouterr().out.splitlines()
            if '│' in line
        ]
        assert [row[:2] for row in rows] == [
            ['backbone', '16'], ['neck', '5'], ['bbox_head', '10'], ['all', '31'],
        ]  # fmt: skip
        numbers = [int(row[2].replace(',', '')) for row in rows]
        assert sum(numbers[:3]) == numbers[3]

    @pytest.mark.parametrize(
        'name', ['faster-rcnn_sasa-r50_sasa-fpn_1x_coco', 'detr_sasa-r50_8xb2-150e_coco']
    )
    def test_counts_other_detectors(self, capsys, name):
        assert main(['configs', name, '--size', '64', '64']) == 0
        printed = capsys.readouterr().out
        assert float(printed.splitlines()[-1].split(' G multiply-adds')[0]) > 0.1
        assert printed.splitlines()[-1].endswith('for an image of 64 x 64')

    def test_a_name_that_is_not_quite_right(self, capsys):
        assert main(['configs', 'retinanet_sasa-tiny_digit']) == 2
        assert 'did you mean retinanet_sasa-tiny_digits' in capsys.readouterr().err


class TestExplain:
    def test_draws_the_layers_asked_for(self, trained, images, tmp_path, capsys):
        out = tmp_path / 'pictures' / 'attention.png'
        argv = ['explain', str(images / 'a.png'), '--checkpoint', str(trained), '--out', str(out)]
        argv += ['--point', '10', '20', '--point', '60', '90']
        assert main([*argv, '--layer', 'backbone.layer2.0.conv2']) == 0
        one = cv2.imread(str(out)).shape
        assert 'backbone.layer2.0.conv2: ' in capsys.readouterr().out
        assert main(argv) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line.split('.')[0] for line in printed[:-1]] == ['backbone', 'neck', 'bbox_head']
        assert printed[-1] == str(out)
        # A block for each of three layers.
        assert cv2.imread(str(out)).shape[0] == pytest.approx(3 * one[0], rel=0.01)

    @pytest.mark.parametrize(
        'more, message',
        [
            (['--layer', 'nowhere'], "layers: ['nowhere'] are no attention layers"),
            (['--point', '64', '0'], 'are not all inside the image'),
            (['--level', '9'], 'level: 9, but'),
        ],
    )
    def test_refuses(self, trained, images, tmp_path, capsys, more, message):
        argv = ['explain', str(images / 'a.png'), '--checkpoint', str(trained), *more]
        assert main([*argv, '--out', str(tmp_path / 'a.png')]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / 'a.png').exists()


class TestHandOver:
    def test_demo_data_then_train_then_test(self, tmp_path):
        """In processes of their own, as mmdet's tools set up much that is global."""

        def run(*argv):
            command = [sys.executable, '-m', 'sasa_det', *map(str, argv)]
            env = {'PYTHONPATH': str(ROOT), 'PATH': '', 'OMP_NUM_THREADS': '1'}
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        run('demo-data', '--num-train', 10, '--num-val', 10, '--image-size', 64)
        assert (tmp_path / 'data/digits/manifest.json').is_file()
        small = [f'{split}_dataloader.dataset.indices=2' for split in ('train', 'val', 'test')]
        loaders = [f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')]
        loaders += [
            f'{split}_dataloader.persistent_workers=False' for split in ('train', 'val', 'test')
        ]
        options = ['--work-dir', 'run', '--cfg-options', *small, *loaders]
        name = 'retinanet_sasa-tiny_digits'
        run('train', name, *options, 'train_cfg.max_epochs=1', 'train_cfg.val_interval=9')
        assert (tmp_path / 'run/epoch_1.pth').is_file()
        assert 'Epoch(test) [1/1]' in run('test', name, 'run/epoch_1.pth', *options)
        # What training left is enough to predict and explain with.
        run('predict', 'data/digits/val', '--checkpoint', 'run/epoch_1.pth', '--out', 'found')
        assert len(json.loads((tmp_path / 'found/images.json').read_text())['images']) == 10

    @pytest.mark.parametrize('command', ['train', 'test'])
    def test_a_config_that_is_not_there(self, capsys, command):
        assert main([command, 'nowhere.py', *['nowhere.pth'] * (command == 'test')]) == 2
        assert f'sasa-det {command}: nowhere.py: no such config' in capsys.readouterr().err

    def test_compare_takes_names_and_files(self, tmp_path, capsys):
        argv = ['retinanet_tiny_digits', 'retinanet_tiny_digits', '--work-dir', str(tmp_path)]
        assert main(['compare', *argv]) == 2
        assert 'compare: configs must have different names' in capsys.readouterr().err

    def test_data_that_is_not_there(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(['train', 'retinanet_sasa-tiny_digits', '--work-dir', 'run']) == 2
        assert 'data/digits/annotations/instances_train.json' in capsys.readouterr().err

    def test_demo_data_where_something_else_is(self, tmp_path, capsys):
        (tmp_path / 'mine.txt').write_text('precious')
        assert main(['demo-data', str(tmp_path)]) == 2
        assert str(tmp_path) in capsys.readouterr().err
        assert (tmp_path / 'mine.txt').read_text() == 'precious'

    def test_doctor(self, capsys):
        assert main(['doctor', '--quiet']) == 0
        assert capsys.readouterr().out == ''
