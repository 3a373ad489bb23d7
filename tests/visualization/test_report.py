import base64
import json
from html.parser import HTMLParser

import matplotlib.image
import pytest
import torch
from mmengine.config import Config

from sasa_det.evaluation.coco_numbers import coco_numbers, evaluate, load_truth
from sasa_det.visualization.report import PICTURES, main, write_report


class Page(HTMLParser):
    """Collects what a page refers to."""

    def __init__(self, path):
        super().__init__()
        self.images, self.links, self.text, self.folder = {}, [], '', path.parent
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == 'img':
            assert attrs['src'].startswith('data:image/png;base64,')
            # The picture that a link is around.
            self.images[self.links[-1]] = attrs['alt']
            embedded = base64.b64decode(attrs['src'].partition(',')[2])
            assert embedded == (self.folder / self.links[-1]).read_bytes()
        if tag == 'a':
            self.links.append(attrs['href'])

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def work_dir(data_root, write_run):
    folder = data_root / 'work'
    train = [dict(step=i, iter=i, epoch=1, loss=1 / i, time=2.0) for i in (10, 20, 30)]
    write_run(folder, '20260101_000000', train + [{'coco/bbox_mAP': 0.3, 'step': 1}])
    (folder / '20260101_000000' / '20260101_000000.log').write_text('log')
    return folder


def test_everything(make_config, checkpoint, pickled, predictions, work_dir, capsys):
    config = make_config()
    weights = checkpoint(config)
    args = [str(config), str(weights), '--predictions', str(pickled), '--work-dir', str(work_dir)]
    assert main(args) == 0
    numbers = json.loads((work_dir / 'coco.json').read_text())
    evaluation = evaluate(predictions, load_truth(Config.fromfile(config)))
    assert {**numbers, 'per_class': None} == {**coco_numbers(evaluation), 'per_class': None}
    assert list(numbers['per_class']) == ['cat', 'dog', 'owl']

    path = work_dir / 'index.html'
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [f'AP50 {numbers["AP50"]:.4f}', str(path)]
    page = Page(path)
    assert list(page.images) == list(PICTURES)
    for name, alt in page.images.items():
        assert len(alt) > 20
        pixels = matplotlib.image.imread(work_dir / name)
        assert pixels.std() > 0.05
    for link in page.links:
        assert (work_dir / link).is_file(), link
    assert '20260101_000000/20260101_000000.log' in page.links
    for name in ('AP', 'AP50', 'AP75', 'AR100'):
        assert f'{numbers[name]:.3f}' in page.text
    assert '0:01:00' in page.text  # 30 iterations of 2 s
    assert f'sasa-det test {config} {weights} --work-dir {work_dir} --out {pickled}' in page.text
    assert f'sasa-det explore {weights}' in page.text
    assert 'http' not in path.read_text()  # works offline


def test_missing_predictions_leave_the_rest(make_config, checkpoint, work_dir, capsys):
    config = make_config()
    missing = work_dir / 'missing.pkl'
    (work_dir / 'coco.json').write_text('from an earlier report')
    args = [str(config), str(checkpoint(config)), '--predictions', str(missing)]
    assert main([*args, '--work-dir', str(work_dir)]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert [error for error in errors if error.startswith('error: ')] == [
        f'error: {missing}: no such predictions; '
        "accepted is a pickle written by mmdet's tools/test.py --out"
    ]
    page = Page(work_dir / 'index.html')
    assert list(page.images) == ['curves.png', 'attention.png']
    assert 'missing.pkl: no such predictions' in page.text
    assert not (work_dir / 'coco.json').exists()


def test_a_missing_log_and_a_missing_checkpoint(make_config, data_root, pickled):
    page, errors = write_report(make_config(), data_root / 'none.pth', pickled, data_root / 'new')
    assert errors == [f'{data_root / "none.pth"}: no such checkpoint']
    page = Page(page)
    assert list(page.images) == ['precision_recall.png', 'detections.png']
    assert 'no training log in it' in page.text


def test_a_checkpoint_that_is_none_is_named(make_config, data_root, pickled):
    (data_root / 'bad.pth').write_text('not a checkpoint')
    _, errors = write_report(make_config(), data_root / 'bad.pth', pickled, data_root / 'new')
    assert len(errors) == 1 and 'bad.pth: cannot be loaded' in errors[0]


def test_an_empty_log_is_an_error(make_config, checkpoint, pickled, data_root, write_run):
    config = make_config()
    empty = write_run(data_root / 'new', '1', [])
    page, errors = write_report(config, checkpoint(config), pickled, data_root / 'new')
    assert errors == [f'curves.png: {empty}: no record of training in it; is it empty?']
    assert list(Page(page).images) == ['precision_recall.png', 'detections.png', 'attention.png']


def test_missing_annotations(make_config, checkpoint, pickled, work_dir, data_root):
    annotations = data_root / 'annotations' / 'instances_val.json'
    config = make_config()
    weights = checkpoint(config)
    annotations.unlink()
    page, errors = write_report(config, weights, pickled, work_dir)
    assert len(errors) == 1 and errors[0].startswith(f'{annotations}: no such annotation file')
    assert list(Page(page).images) == ['curves.png']


def test_convolution_has_no_attention_to_show(make_config, checkpoint, pickled, work_dir):
    config = make_config(attention=False)
    page, errors = write_report(config, checkpoint(config), pickled, work_dir)
    assert errors == []
    page = Page(page)
    assert 'attention.png' not in page.images
    for part in ('backbone', 'neck', 'bbox_head'):
        assert f'{part} is all convolution, so attention.png leaves it out' in page.text


def test_options_override_the_config(make_config, checkpoint, pickled, work_dir, capsys):
    config = make_config()
    args = [str(config), str(checkpoint(config)), '--predictions', str(pickled)]
    args += ['--work-dir', str(work_dir), '--commands', 'bash <mine>']
    args += ['--cfg-options', 'test_dataloader.dataset.ann_file=annotations/other.json']
    assert main(args) == 1
    assert 'annotations/other.json: no such annotation file' in capsys.readouterr().err
    assert 'bash <mine>' in Page(work_dir / 'index.html').text
    main(args[:6] + args[8:])
    text = Page(work_dir / 'index.html').text
    assert text.count('--cfg-options test_dataloader.dataset.ann_file=annotations/other.json') == 3


def test_a_missing_config_is_named(tmp_path, capsys):
    assert main(['none.py', 'a.pth', '--predictions', 'a.pkl', '--work-dir', str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith('error: none.py: not a config')


def test_the_iterations_are_those_of_the_checkpoint(make_config, checkpoint, pickled, work_dir):
    """The log has every tenth."""
    config = make_config()
    weights = checkpoint(config)
    saved = torch.load(weights, weights_only=True)
    saved.setdefault('meta', {})['iter'] = 34567
    torch.save(saved, weights)
    path, errors = write_report(config, weights, pickled, work_dir)
    assert not errors and '34,567' in Page(path).text


@pytest.mark.parametrize('name', [r'$\foo$', '$', '$$', r'\frac'])
def test_names_are_no_formulas(make_config, checkpoint, pickled, work_dir, data_root, name):
    path = data_root / 'annotations' / 'instances_val.json'
    content = json.loads(path.read_text())
    content['categories'][0]['name'] = name
    path.write_text(json.dumps(content))
    config = Config.fromfile(make_config())
    config.test_dataloader.dataset.metainfo.classes = (name, 'dog', 'owl')
    weights = checkpoint(make_config())
    page, errors = write_report(config, weights, pickled, work_dir)
    assert not errors and list(Page(page).images) == list(PICTURES)


def test_a_picture_that_fails_does_not_cost_the_page(
    make_config, checkpoint, pickled, work_dir, monkeypatch
):
    def fail(*args):
        raise RuntimeError('no such colour\nand more')

    monkeypatch.setattr('sasa_det.visualization.report.draw_detections', fail)
    page, errors = write_report(make_config(), checkpoint(make_config()), pickled, work_dir)
    assert errors == ['detections.png: no such colour']
    assert list(Page(page).images) == [name for name in PICTURES if name != 'detections.png']
