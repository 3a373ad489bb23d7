"""A config for one's own data: it is what it says, builds, and is not written for bad data."""

import json
import os

import pytest
from mmdet.registry import DATASETS, METRICS, MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from sasa_det.configs import config_literal
from sasa_det.data import coco_config
from sasa_det.data.coco_config import main, write_coco_config

CONVOLUTIONS = 'sasa_det::quickstart/retinanet_tiny_coco-format.py'


@pytest.fixture(autouse=True)
def scope():
    """Types of a config are mmdet's."""
    init_default_scope('mmdet')


def build(path):
    """Build everything that a run takes from a config."""
    config = Config.fromfile(path)
    train = DATASETS.build(config.train_dataloader.dataset)
    val = DATASETS.build(config.val_dataloader.dataset)
    metric = METRICS.build(config.val_evaluator)
    return config, MODELS.build(config.model), train, val, metric


def test_all_that_it_names_is_built(coco_files, tmp_path):
    out = tmp_path / 'configs' / 'mine.py'
    assert write_coco_config(coco_files.root, out) == out
    config, model, train, val, metric = build(out)
    # The order of the file; their ids are 30, 12 and 21.
    assert train.metainfo['classes'] == val.metainfo['classes'] == ('cat', 'dog', 'owl')
    assert train.cat2label == val.cat2label == {30: 0, 12: 1, 21: 2}
    assert model.bbox_head.num_classes == 3
    assert type(model.backbone).__name__ == 'SASAResNet'
    assert len(train) == len(val) == 3
    assert train.ann_file == str(coco_files.annotations('train'))
    assert val.ann_file == str(coco_files.annotations('val'))
    assert sorted(metric._coco_api.imgs) == [3, 5, 7]
    assert config.test_dataloader == config.val_dataloader
    assert config.test_evaluator == config.val_evaluator
    sample = train[0]
    assert sample['inputs'].shape[1] == 240 and sample['inputs'].shape[2] == 320
    assert sample['data_samples'].gt_instances.labels.tolist() == [0]
    assert sample['data_samples'].ignored_instances.labels.tolist() == [1]


def test_it_can_be_dumped_and_read_again(coco_files, tmp_path):
    """mmengine writes a run's config into its folder, and test.py may be given that one."""
    config = Config.fromfile(write_coco_config(coco_files.root, tmp_path / 'mine.py'))
    config.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == config.to_dict()


@pytest.mark.parametrize(
    'name',
    [
        "the cat's data",
        'say "cat"',
        'a\\b #{c} \u00fc',
        'two\nlines',
        '{{ $HOME }} {{fileDirname}}',
    ],
)
def test_names_that_need_quotes(coco_files, tmp_path, name):
    coco_files.root = coco_files.root.rename(tmp_path / name)
    coco_files.content['categories'][1]['name'] = 'the dog\'s "tail" \\ \u00fc'
    for split in ('train', 'val'):
        coco_files.write(split)
    config, _, train, _, metric = build(write_coco_config(tmp_path / name, tmp_path / 'mine.py'))
    assert config.data_root == f'{tmp_path / name}/'
    assert train.metainfo['classes'] == ('cat', 'the dog\'s "tail" \\ \u00fc', 'owl')
    assert len(train) == len(metric._coco_api.imgs) == 3


def test_the_base_can_be_another_one(coco_files, tmp_path, monkeypatch):
    out = write_coco_config(coco_files.root, tmp_path / 'mine.py', base=CONVOLUTIONS)
    assert 'attn_cfg' not in Config.fromfile(out).model.backbone
    attending = Config.fromfile(write_coco_config(coco_files.root, tmp_path / 'attending.py'))
    assert attending.model.backbone.attn_cfg.kernel_size == 5
    # A file is meant from where one is, not from where the config is written to.
    monkeypatch.chdir(tmp_path)
    write_coco_config(coco_files.root, 'deep/other.py', base='mine.py')
    assert Config.fromfile('deep/other.py').model == Config.fromfile(out).model


def test_the_folder_is_meant_from_where_one_is(coco_files, tmp_path, monkeypatch):
    monkeypatch.chdir(coco_files.root)
    write_coco_config('.', tmp_path / 'mine.py')
    monkeypatch.chdir(tmp_path)
    _, _, train, val, _ = build('mine.py')
    assert len(train) == len(val) == 3


def test_another_layout(coco_files, tmp_path):
    root = coco_files.root
    for split in ('train', 'val'):
        (root / split).rename(root / f'{split}2017')
        coco_files.annotations(split).rename(root / f'{split}.json')
    with pytest.raises(FileNotFoundError, match='instances_train.json does not exist'):
        write_coco_config(root, tmp_path / 'mine.py')
    arguments = ['--train-ann', 'train.json', '--val-ann', 'val.json']
    arguments += ['--train-img', 'train2017', '--val-img', 'val2017']
    assert main([str(root), '--out', str(tmp_path / 'mine.py'), *arguments]) == 0
    _, _, train, val, _ = build(tmp_path / 'mine.py')
    assert train.get_data_info(0)['img_path'] == str(root / 'train2017' / '7.jpg')
    assert val.get_data_info(0)['img_path'] == str(root / 'val2017' / '7.jpg')


def test_a_schedule_stretched_to_other_epochs(coco_files, tmp_path):
    base = Config.fromfile(write_coco_config(coco_files.root, tmp_path / 'base.py'))
    epochs = 3 * base.train_cfg.max_epochs
    mine = Config.fromfile(
        write_coco_config(coco_files.root, tmp_path / 'mine.py', max_epochs=epochs)
    )
    assert mine.train_cfg.max_epochs == epochs
    assert mine.train_cfg.val_interval == base.train_cfg.val_interval
    (warmup, cosine), (base_warmup, base_cosine) = mine.param_scheduler, base.param_scheduler
    assert (warmup.by_epoch, warmup.end) == (False, base_warmup.end)
    assert cosine.end == epochs == 3 * base_cosine.end
    assert cosine.convert_to_iter_based is True
    assert cosine.keys() == base_cosine.keys() - {'_scope_'}


def test_another_scale_in_every_pipeline(coco_files, tmp_path):
    out = tmp_path / 'mine.py'
    assert main([str(coco_files.root), '--out', str(out), '--image-scale', '160', '96']) == 0
    config, _, train, val, _ = build(out)
    for dataset in (train, val):
        assert tuple(dataset[0]['inputs'].shape[1:]) == (96, 128)
    assert config.test_dataloader == config.val_dataloader
    assert [step.type for step in config.train_dataloader.dataset.pipeline] == [
        step.type
        for step in Config.fromfile(
            write_coco_config(coco_files.root, tmp_path / 'base.py')
        ).train_dataloader.dataset.pipeline
    ]
    write_coco_config(coco_files.root, out, image_scale=64)
    assert tuple(build(out)[2][0]['inputs'].shape[1:]) == (48, 64)


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (dict(max_epochs=0), 'max_epochs must be at least 1, got 0'),
        (dict(image_scale=31), 'image_scale must be one or two numbers .* at least 32, got 31'),
        (dict(image_scale=(64, 64, 64)), 'image_scale must be one or two numbers'),
    ],
)
def test_numbers_out_of_range(coco_files, tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        write_coco_config(coco_files.root, tmp_path / 'mine.py', **option)
    assert not (tmp_path / 'mine.py').exists()


def lose_annotations(files):
    files.annotations('val').unlink()


def cut_annotations(files):
    files.annotations('val').write_text(json.dumps(files.content)[:-1])


def lose_image(files):
    (files.root / 'val' / '3.jpg').unlink()


def rename_category(files):
    files.content['categories'][2]['name'] = 'eagle owl'
    files.write('val')


def turn_categories_round(files):
    files.content['categories'].reverse()
    files.write('val')


def name_no_category(files):
    del files.content['categories'][0]['name']
    files.write('val')


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lose_annotations, 'does not exist'),
        (cut_annotations, 'is not JSON'),
        (lose_image, '1 of the 3 images of {} are not in {root}/val'),
        (rename_category, "has no category 'owl'"),
        (turn_categories_round, 'in the order of the categories of annotation file {}'),
        (name_no_category, "categories[0] lacks 'name'"),
    ],
)
def test_nothing_is_written_for_bad_data(coco_files, tmp_path, spoil, message, capsys):
    """Each in the validation split, which is looked at last."""
    spoil(coco_files)
    out = tmp_path / 'mine.py'
    assert main([str(coco_files.root), '--out', str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith('sasa-det coco-config: ') and printed.out == ''
    annotations = coco_files.annotations('val')
    assert str(annotations) in printed.err
    assert message.format(annotations, root=coco_files.root) in printed.err
    assert not out.exists()


def test_the_command(coco_files, tmp_path, capsys):
    out = tmp_path / 'mine.py'
    assert main([str(coco_files.root), '--out', str(out)]) == 0
    assert capsys.readouterr().out == f'wrote {out}\n'
    assert Config.fromfile(out).model.bbox_head.num_classes == 3


def test_the_command_where_nothing_can_be_written(coco_files, capsys):
    assert main([str(coco_files.root), '--out', f'{os.devnull}/mine.py']) == 1
    assert f'{os.devnull}' in capsys.readouterr().err


def test_bccd(shared, tmp_path):
    out = write_coco_config(shared('bccd'), tmp_path / 'mine.py')
    config = Config.fromfile(out)
    assert config.metainfo.classes == ('Platelets', 'RBC', 'WBC')
    train = DATASETS.build(config.train_dataloader.dataset)
    assert len(train) == 292
    # Its own config names the same classes in the same order.
    own = Config.fromstring("_base_ = 'sasa_det::bccd/retinanet_tiny_bccd.py'", '.py')
    assert own.train_dataloader.dataset.metainfo == config.metainfo
    assert own.model.bbox_head.num_classes == 3


def test_the_default_base_is_there():
    assert (
        Config.fromstring(f'_base_ = {coco_config.COCO_FORMAT!r}', '.py').model.type == 'RetinaNet'
    )


HOSTILE = {"a': __import__('os').system('touch {}') or 'b": 1}


@pytest.mark.parametrize('spoil', ['name', 'extra'])
def test_annotations_run_no_code(coco_files, tmp_path, spoil):
    """A name that is a dict came into the config with keys that nobody had escaped."""
    ran = tmp_path / 'ran'
    hostile = {key.format(ran): value for key, value in HOSTILE.items()}
    coco_files.content['categories'][1][spoil] = hostile
    coco_files.write()
    coco_files.write('val')
    if spoil == 'name':
        with pytest.raises(ValueError, match=r'categories\[1\] .* is no text'):
            write_coco_config(coco_files.root, tmp_path / 'mine.py', max_epochs=3)
        assert not (tmp_path / 'mine.py').exists()
    else:
        Config.fromfile(write_coco_config(coco_files.root, tmp_path / 'mine.py', max_epochs=3))
    assert not ran.exists()


@pytest.mark.parametrize(
    'name',
    ['{{ $ENV:HOME:x }}', '{{fileDirname}}', '{{_base_.model}}', "'] + [1", '\\x7b\\', '{0}', '{'],
)
def test_a_name_stays_the_text_that_it_is(coco_files, tmp_path, name):
    coco_files.content['categories'][1]['name'] = name
    coco_files.write()
    coco_files.write('val')
    path = write_coco_config(coco_files.root, tmp_path / 'mine.py', max_epochs=3, image_scale=64)
    assert Config.fromfile(path).metainfo.classes[1] == name


def test_a_literal_is_read_back_as_it_was():
    value = {'a': [1, -2.5, None, True, ('b',), ()], "c'": {'{{d}}': '\n"\\'}}
    assert eval(config_literal(value)) == value
    with pytest.raises(ValueError, match='cannot hold'):
        config_literal([object()])
