"""A tiny detector, data set, training log and predictions."""

import json
import pickle

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config

CONFIG = """
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['sasa_det'])
data_root = '{root}/'
attention = {attention}
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        _delete_=True, type='SASAResNet', depth=26, base_channels=8, attn_cfg=attention),
    neck=dict(type='SASAFPN', in_channels=[32, 64, 128, 256], out_channels=16, attn_cfg=attention),
    bbox_head=dict(
        type='SASARetinaHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1,
        attn_cfg=attention))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(192, 128), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=(
        'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    data_root=data_root, ann_file='annotations/instances_val.json', data_prefix=dict(img='val/'),
    metainfo=dict(classes=('cat', 'dog', 'owl')), pipeline=test_pipeline))
test_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
"""


@pytest.fixture
def data_root(tmp_path):
    """Five images of 96 x 64, the first without boxes, the last with a crowd; sparse ids."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    boxes = {20: [(7, 10, 8, 20, 20)], 30: [(3, 40, 30, 30, 24), (9, 5, 5, 12, 10)],
             40: [(9, 50, 4, 40, 50)], 50: [(3, 4, 4, 30, 30), (7, 60, 10, 20, 40)]}  # fmt: skip
    for image_id in (10, 20, 30, 40, 50):
        name = f'image_{image_id}.jpg'
        pixels = rng.integers(0, 90, (64, 96, 3), dtype=np.uint8)
        for index, (category, x, y, w, h) in enumerate(boxes.get(image_id, ())):
            pixels[y : y + h, x : x + w] += np.uint8(100 + 10 * category)
            crowd = int(image_id == 50 and index == 1)
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=category,
                    area=w * h,
                    bbox=[x, y, w, h],
                    iscrowd=crowd,
                )  # fmt: skip
            )
        mmcv.imwrite(pixels, str(tmp_path / 'val' / name))
        images.append(dict(id=image_id, file_name=name, width=96, height=64))
    categories = [dict(id=i, name=name) for i, name in ((3, 'cat'), (7, 'dog'), (9, 'owl'))]
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations' / 'instances_val.json').write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )
    return tmp_path


def prediction(image_id, *boxes):
    """Make what mmdet dumps for one image out of (label, score, x, y, w, h)."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6)
    corners = torch.cat([boxes[:, 2:4], boxes[:, 2:4] + boxes[:, 4:]], dim=1)
    return dict(
        img_id=image_id,
        ori_shape=(64, 96),
        pred_instances=dict(bboxes=corners, scores=boxes[:, 1], labels=boxes[:, 0].long()),
    )


@pytest.fixture(name='prediction')
def prediction_fixture():
    """The function that makes a prediction."""
    return prediction


@pytest.fixture
def predictions():
    """Good, shifted, doubled, wrong and weak boxes."""
    return [
        prediction(10, (2, 0.6, 3, 3, 20, 20)),
        prediction(20, (1, 0.9, 11, 9, 20, 20), (1, 0.8, 14, 12, 20, 20)),
        prediction(30, (0, 0.7, 40, 30, 30, 24), (0, 0.95, 5, 5, 12, 10), (2, 0.2, 6, 5, 12, 9)),
        prediction(40, (2, 0.85, 50, 4, 40, 45)),
        prediction(50),
    ]


@pytest.fixture
def make_config(data_root):
    """Write the config of the tiny detector, with or without attention, and give its path."""

    def make(attention=True):
        path = data_root / f'tiny_{"attention" if attention else "convolution"}.py'
        cfg = 'dict(kernel_size=3, num_heads=2)' if attention else 'None'
        path.write_text(CONFIG.format(root=data_root.as_posix(), attention=cfg))
        return path

    return make


@pytest.fixture
def checkpoint(make_config, data_root):
    """Save random weights of a config's model, as mmengine lays them out."""

    def save(config):
        from mmdet.registry import MODELS
        from mmengine.registry import init_default_scope

        init_default_scope('mmdet')
        torch.manual_seed(0)
        model = MODELS.build(Config.fromfile(config).model)
        path = data_root / 'epoch_1.pth'
        meta = dict(dataset_meta=dict(classes=('cat', 'dog', 'owl')))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
        return path

    return save


@pytest.fixture
def write_run():
    """Write one run's scalars.json as mmengine's logger does."""

    def write(work_dir, timestamp, records, tail=''):
        path = work_dir / timestamp / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text(''.join(json.dumps(record) + '\n' for record in records) + tail)
        return path

    return write


@pytest.fixture
def pickled(data_root, predictions):
    """The predictions as mmdet's test.py --out leaves them."""
    path = data_root / 'predictions.pkl'
    path.write_bytes(pickle.dumps(predictions))
    return path
