"""mmdet's own tools, APIs and visualizers on a run of ours: each once."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmdet.apis import DetInferencer, inference_detector, init_detector

from sasa_det.data.digits import make_digits
from sasa_det.environment import stack

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
_base_ = 'sasa_det::quickstart/retinanet_sasa-tiny_digits.py'
data_root = {data!r}
model = dict(
    backbone=dict(base_channels=8), neck=dict(in_channels=[32, 64, 128, 256]),
    test_cfg=dict(score_thr=0.0, max_per_img=20))
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False,
                        dataset=dict(data_root=data_root))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(logger=dict(interval=1),
                     attention=dict(type='AttentionVisualizationHook'),
                     diagnosis=dict(type='AttentionDiagnosisHook', num_images=2, accuracy=True))
vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
visualizer = dict(vis_backends=vis_backends)
tta_model = dict(type='DetTTAModel',
                 tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=20))
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale=(96, 96), keep_ratio=True),
         dict(type='Resize', scale=(64, 64), keep_ratio=True)],
        [dict(type='RandomFlip', prob=0.0)],
        [dict(type='LoadAnnotations', with_bbox=True)],
        [dict(type='PackDetInputs', meta_keys=(
            'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
            'flip_direction'))]])]
"""


class Run:
    """A folder with a config, in which tools run."""

    def __init__(self, folder):
        data = make_digits(folder / 'digits', num_train=10, num_val=10, image_size=64, quiet=True)
        self.folder = folder
        self.config = folder / 'tiny.py'
        self.config.write_text(CONFIG.format(data=f'{data}/'))
        self.image = next((data / 'val').glob('*.*'))

    def tool(self, name, *arguments):
        """Run one of mmdet's tools and return what it said."""
        done = subprocess.run(
            [sys.executable, '-m', 'sasa_det', 'tool', name, *map(str, arguments)],
            cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', MPLBACKEND='agg', PATH=''),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    @property
    def checkpoint(self):
        return self.folder / 'run/epoch_1.pth'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp('tools'))
    run.said = run.tool('train', run.config, '--work-dir', 'run')
    return run


@pytest.fixture(scope='module')
def results(run):
    """What test.py finds."""
    run.tool(
        'test', run.config, run.checkpoint, '--work-dir', 'tested', '--out', 'found.pkl',
        '--show-dir', 'shown',
    )  # fmt: skip
    return run.folder / 'found.pkl'


def log_of(run):
    return next((run.folder / 'run').glob('*/vis_data/scalars.json'))


def test_attention_is_drawn_and_measured_while_training(run):
    pictures = list((run.folder / 'run').glob('*/vis_data/vis_image/attention_0_*.png'))
    assert len(pictures) == 1 and pictures[0].stat().st_size > 10_000
    (entry,) = [line for line in map(json.loads, log_of(run).open()) if 'attention' in str(line)]
    entropies = {k: v for k, v in entry.items() if k.startswith('attention_entropy/')}
    # Each head starts at one neighbour, and looks further little by little.
    assert len(entropies) == 20 and all(0 < x < 0.9 for x in entropies.values())
    assert 'Attention entropy, of 1: backbone.layer1.0.conv2' in run.said


def test_attention_is_diagnosed_while_training(run):
    (entry,) = [line for line in map(json.loads, log_of(run).open()) if 'diagnosis' in str(line)]
    heads = {k: v for k, v in entry.items() if k.startswith('diagnosis_entropy/')}
    assert len(heads) == 20 * 4
    assert entry['diagnosis/entropy'] == pytest.approx(sum(heads.values()) / len(heads))
    # After three steps, all heads are nearly where they start: the first at the right.
    assert 0.5 < entry['diagnosis_dx/neck.fpn_convs.0.conv/head_1'] < 1.5
    assert 0.5 < entry['diagnosis/share_fixed'] < 1
    away = {k for k in entry if k.startswith('diagnosis_accuracy/')}
    assert away == {
        f'diagnosis_accuracy/{name}'
        for name in ('without_q.k', 'without_q.r', 'with_the_same_weights_at_every_pixel')
    }
    assert 'Attention, means over heads: entropy 0.' in run.said


def test_tensorboard_reads_what_was_logged(run):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    folder = next((run.folder / 'run').glob('*/vis_data'))
    read = accumulator.EventAccumulator(str(folder)).Reload()
    assert {'loss', 'coco/bbox_mAP'} <= set(read.Tags()['scalars'])
    assert read.Tags()['images'] == ['attention_0']
    assert len(read.Scalars('loss')) == 3


def test_test_py_stores_and_shows(run, results):
    found = pickle.loads(results.read_bytes())
    assert len(found) == 10 and all(len(each['pred_instances']['scores']) == 20 for each in found)
    assert len(list((run.folder / 'tested').glob('*/shown/*.*'))) == 10


def test_test_time_augmentation(run):
    said = run.tool('test', run.config, run.checkpoint, '--tta', '--work-dir', 'tta')
    assert 'bbox_mAP_copypaste' in said


def test_analyze_logs(run):
    # The fork hands its default style, seaborn's, to matplotlib, which has none of that name.
    style = ('--style', 'default') if stack.is_fork() else ()
    run.tool('analysis_tools/analyze_logs', 'plot_curve', log_of(run), '--keys', 'loss_cls',
             '--out', 'curve.png', *style)  # fmt: skip
    assert (run.folder / 'curve.png').stat().st_size > 5_000
    assert 'average iter time' in run.tool(
        'analysis_tools/analyze_logs', 'cal_train_time', log_of(run)
    )


def test_browse_dataset(run):
    run.tool('analysis_tools/browse_dataset', run.config, '--output-dir', 'browsed', '--not-show')
    assert len(list((run.folder / 'browsed').glob('*.*'))) == 10


def test_confusion_matrix(run, results):
    run.tool('analysis_tools/confusion_matrix', run.config, results, 'matrix')
    assert (run.folder / 'matrix/confusion_matrix.png').stat().st_size > 5_000


def test_analyze_results(run, results):
    run.tool('analysis_tools/analyze_results', run.config, results, 'analyzed', '--topk', 2)
    for kind in ('good', 'bad'):
        assert len(list((run.folder / 'analyzed' / kind).glob('*.*'))) == 2


def test_apis_agree(run):
    detector = init_detector(str(run.config), str(run.checkpoint), device='cpu')
    found = inference_detector(detector, str(run.image)).pred_instances
    inferencer = DetInferencer(str(run.config), str(run.checkpoint), device='cpu')
    (same,) = inferencer(str(run.image), out_dir=str(run.folder / 'inferred'))['predictions']
    assert np.allclose(same['scores'], found.scores.tolist())
    assert len(list((run.folder / 'inferred/vis').glob('*.*'))) == 1
