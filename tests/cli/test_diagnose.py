"""``sasa-det diagnose``: on a tiny detector with attention in two layers, on ten small images."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from sasa_det.cli.main import main
from sasa_det.data.digits import make_digits
from sasa_det.evaluation.diagnosis import HeadDiagnosis
from sasa_det.evaluation.diagnosis_accuracy import AWAY

CONFIG = """
_base_ = 'sasa_det::quickstart/retinanet_sasa-tiny_digits.py'
data_root = '{data}/'
train_dataloader = val_dataloader = test_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
val_evaluator = test_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
model = dict(
    backbone=dict(base_channels=8, attn_stages=(True, False, False, True), attn_cfg=dict(num_heads=2)),
    neck=dict(in_channels=[32, 64, 128, 256], attn_cfg=None),
    bbox_head=dict(attn_cfg=None, attn_parts=None, feat_channels=16, stacked_convs=1),
    test_cfg=dict(score_thr=0.0, nms_pre=50, max_per_img=10))
"""
LAYERS = ['backbone.layer1.0.conv2', 'backbone.layer4.0.conv2']


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """A config and a checkpoint. In its first layer a head is fixed, and another one follows the content."""
    folder = tmp_path_factory.mktemp('diagnose')
    data = make_digits(folder / 'digits', num_train=10, num_val=10, image_size=64, quiet=True)
    config = folder / 'tiny.py'
    config.write_text(CONFIG.format(data=data))
    init_default_scope('mmdet')
    torch.manual_seed(0)
    read = Config.fromfile(config)
    model = MODELS.build(read.model)
    model.init_weights()
    attention = model.backbone.layer1[0].conv2
    with torch.no_grad():
        attention.query.weight[:4] = 0
        attention.query.bias[4:] = 0
        attention.key.weight[4:] *= 500
    meta = dict(dataset_meta=dict(classes=read.metainfo.classes))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'epoch_1.pth')
    return config, folder / 'epoch_1.pth'


class Page(HTMLParser):
    """Collects what a page asks for, its pictures' texts, and its own."""

    def __init__(self, path):
        super().__init__()
        self.links, self.alts, self.text, self.static = [], [], '', 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == 'img':
            assert attrs['src'].startswith('data:image/png;base64,')
            self.alts.append(attrs['alt'])
        if tag == 'a':
            self.links.append(attrs['href'])
        self.static += attrs.get('class') == 'static'

    def handle_data(self, data):
        self.text += data


def test_everything(detector, tmp_path, capsys):
    config, checkpoint = map(str, detector)
    out = tmp_path / 'new' / 'diagnosis'
    arguments = [config, checkpoint, '--out', str(out), '--num-images', '3', '--per-layer']
    assert main(['diagnose', *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(out / 'index.html')
    # As trained, three terms of the whole and of each of the layers; two batches each.
    assert 'Looking at validation images: 0 of 3' in captured.err
    assert f'Evaluating: 0 of {2 * (1 + 3 + 2 * 3)}' in captured.err

    numbers = json.loads((out / 'diagnosis.json').read_text())
    assert (numbers['config'], numbers['checkpoint'], numbers['images']) == (config, checkpoint, 3)
    assert list(numbers['layers']) == LAYERS
    heads = {name: layer['heads'] for name, layer in numbers['layers'].items()}
    assert all(
        list(head) == list(HeadDiagnosis._fields) for each in heads.values() for head in each
    )
    assert [layer['pixels'] for layer in numbers['layers'].values()] == [3 * 64] * 2
    first = heads[LAYERS[0]]
    assert [head['static'] for head in first] == [True, False]
    assert first[0]['share_fixed'] > 0.999 and first[1]['share_qk'] > 0.8
    # The first head starts at the neighbour on the right.
    assert (round(first[0]['dy'], 1), round(first[0]['dx'], 1)) == (0, 1)
    maps = torch.tensor(numbers['layers'][LAYERS[0]]['mean_weights'])
    assert maps.shape == (2, 5, 5)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2), atol=1e-4, rtol=0)

    assert numbers['metric'] == 'coco/bbox_mAP'
    assert list(numbers['accuracy']) == ['as trained', *AWAY.values()]
    assert list(numbers['accuracy_per_layer']) == LAYERS
    assert list(numbers['accuracy_per_layer'][LAYERS[1]]) == list(AWAY.values())
    assert numbers['accuracy']['as trained']['coco/bbox_mAP_50'] >= 0

    printed = captured.out
    for name in (*LAYERS, *AWAY.values(), 'as trained'):
        assert name in printed
    static = sum(head['static'] for each in heads.values() for head in each)
    assert len(re.findall(r'│ static │', printed)) == static

    page = Page(out / 'index.html')
    assert page.links == ['diagnosis.json'] and 'http' not in (out / 'index.html').read_text()
    assert len(page.alts) == 4 and page.static == static
    assert 'at row +0, column +1 from the pixel' in page.alts[0]
    assert f'sasa-det diagnose {config} {checkpoint}' in page.text
    assert f'{static} of 4' in page.text


def test_without_evaluations_in_the_default_folder(detector, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['diagnose', *map(str, detector), '--num-images', '1', '--no-accuracy']) == 0
    assert capsys.readouterr().out.splitlines()[-1] == 'epoch_1_diagnosis/index.html'
    assert 'accuracy' not in json.loads((tmp_path / 'epoch_1_diagnosis/diagnosis.json').read_text())
    assert 'taken away' not in Page(tmp_path / 'epoch_1_diagnosis/index.html').text


def test_a_detector_that_finds_nothing(detector, tmp_path, capsys):
    options = ['--num-images', '1', '--cfg-options', 'model.test_cfg.score_thr=0.9']
    assert main(['diagnose', *map(str, detector), '--out', str(tmp_path), *options]) == 0
    captured = capsys.readouterr()
    said = 'The detector finds nothing in the validation data, so its AP is 0 in each case.'
    assert said in captured.out and said in Page(tmp_path / 'index.html').text
    assert 'mmengine' not in captured.out + captured.err


@pytest.mark.parametrize(
    'more, message',
    [
        (['--num-images', '0'], '--num-images must be at least 1, but is 0'),
        (['--per-layer', '--no-accuracy'], '--per-layer evaluates, and --no-accuracy does not'),
        (['--cfg-options', 'val_evaluator=None'], 'tiny.py: val_evaluator is not set'),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else '',
)
def test_mistakes(detector, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert main(['diagnose', *map(str, detector), *more]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith('sasa-det diagnose: ') and message in last
    assert not list(tmp_path.iterdir())


def test_a_detector_without_attention_is_named(detector, tmp_path, monkeypatch, capsys):
    config, _ = detector
    monkeypatch.chdir(tmp_path)
    plain = tmp_path / 'plain.py'
    plain.write_text(
        f"_base_ = '{config}'\nmodel = dict(backbone=dict(attn_cfg=None, attn_stages=None))\n"
    )
    model = MODELS.build(Config.fromfile(plain).model)
    meta = dict(dataset_meta=dict(classes=Config.fromfile(plain).metainfo.classes))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), 'plain.pth')
    assert main(['diagnose', 'plain.py', 'plain.pth', '--num-images', '1']) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        'sasa-det diagnose: plain.pth: no layer of its model attends'
    )
