"""The hook for GPUs, on the CPU as the device that it prepares for: layouts change, and nothing else does."""

import faulthandler
import os
import warnings
from datetime import timedelta

import pytest
import torch
from mmcv.ops import ModulatedDeformConv2dPack
from mmdet.models.losses import FocalLoss
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.hooks import Hook
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from sasa_det.configs import find_config, read_config
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.models import SASARetinaHead
from sasa_det.models.gpu import compute_in_float32, prepare_for_gpu, without_bfloat16
from sasa_det.plugin import register

CHANNELS_LAST = torch.channels_last


@pytest.fixture(autouse=True, scope='module')
def registered():
    register()


class Small(BaseModel):
    """Convolution, attention and a convolution of one pixel, which has its layout twice."""

    def __init__(self):
        super().__init__(data_preprocessor=ImgDataPreprocessor(mean=[0.0] * 3, std=[255.0] * 3))
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            LocalSelfAttention2d(8, kernel_size=3, num_heads=2, bias=True),
            nn.Conv2d(8, 4, 1),
        )
        self.layouts = set()

    def forward(self, inputs, data_samples=None, mode='tensor'):
        output = self.layers(inputs)
        for x in (inputs, output):
            self.layouts.add(x.is_contiguous(memory_format=CHANNELS_LAST))
        return dict(loss=output.square().mean()) if mode == 'loss' else output


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 6, 7), generator=generator, dtype=torch.uint8)
        return dict(inputs=image, data_samples=None)


class Strides(Hook):
    """Note the strides of the optimizer's state, which a fused step takes for those of the weights."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for parameter, state in runner.optim_wrapper.optimizer.state.items():
            for x in state.values():
                assert x.dim() != 4 or x.stride() == parameter.stride()


def train(folder, device_type, iterations, resume=None):
    """Train, in whole or from a checkpoint; return the runner and its last checkpoint."""
    torch.manual_seed(0)
    runner = Runner(
        Small(),
        str(folder),
        train_dataloader=dict(
            dataset=Images(), batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01, fused=True)),
        default_hooks=dict(
            checkpoint=dict(type='WholeCheckpointHook', by_epoch=False, interval=2),
            gpu=dict(type='GpuHook', device_type=device_type),
        ),
        custom_hooks=[Strides()],
        load_from=resume,
        resume=resume is not None,
        randomness=dict(seed=0),
        default_scope='mmdet',
        experiment_name=str(folder),
        log_level='ERROR',
    )  # fmt: skip
    runner.train()
    path = folder / f'iter_{iterations}.pth'
    return runner, str(path), torch.load(path, weights_only=True)


def tensors(content):
    """All tensors of a checkpoint, by their place."""
    if isinstance(content, torch.Tensor):
        return {'': content}
    items = content.items() if isinstance(content, dict) else ()
    return {f'{key}.{at}': x for key, each in items for at, x in tensors(each).items()}


def test_a_run_resumes_in_the_other_layout(tmp_path):
    """All in one layout; the first half in each, the second in the other: the same weights and checkpoints."""
    runner, _, plain = train(tmp_path / 'plain', 'cuda', 4)
    assert runner.model.layers[0].weight.is_contiguous() and runner.model.layouts == {False}
    expected = {**tensors(plain['state_dict']), **tensors(plain['optimizer'])}
    for first, second in (('cpu', 'cuda'), ('cuda', 'cpu')):
        folder = tmp_path / first
        halfway, path, _ = train(folder / 'a', first, 2)
        ended, _, content = train(folder / 'b', second, 4, resume=path)
        for each, layout in ((halfway, first), (ended, second)):
            assert each.model.layouts == {layout == 'cpu'}
            weight = each.model.layers[0].weight
            assert weight.is_contiguous(memory_format=CHANNELS_LAST) == (layout == 'cpu')
        found = {**tensors(content['state_dict']), **tensors(content['optimizer'])}
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert found[name].stride() == x.stride(), name
            torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-6, msg=name)


def test_our_configs_have_it():
    for name in (
        'retinanet_sasa-r50_sasa-fpn_sasa-head_1x_coco',
        'retinanet_sasa-tiny_digits',
        'sasa-r50_32xb128-130e_in1k',
    ):
        config = read_config(find_config(name))
        assert config.default_hooks.gpu == dict(type='GpuHook'), name


def train_on_rank(rank, folder):
    """Train two iterations on each rank's own images, in channels_last; save what was seen in the folder."""
    faulthandler.dump_traceback_later(240)  # before the test gives up
    torch.set_num_threads(1)
    # The host's name may belong to a network that cannot be reached.
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
    distributed.init_process_group(
        'gloo', f'file://{folder}/store', timedelta(seconds=180), world_size=2, rank=rank
    )
    torch.manual_seed(0)
    model = Small().layers
    parallel = DistributedDataParallel(model)
    prepare_for_gpu(model)  # as the hook does, after the wrapper
    alone = Small().layers
    alone.load_state_dict(model.state_dict())
    prepare_for_gpu(alone)
    x = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(rank))
    said = []
    torch.set_warn_always(True)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for each in (parallel, alone):
                each.zero_grad()
                each(x).square().mean().backward()
        said.append(sum('Grad strides' in str(each.message) for each in caught))
    grads = [[p.grad.clone() for p in each.parameters()] for each in (model, alone)]
    for x in grads[1]:
        distributed.all_reduce(x)
    error = max((2 * a - b).abs().max().item() for a, b in zip(*grads))
    # What GPUs run in the place of batch norm, torch refuses here.
    with pytest.raises(ValueError, match='expected input tensor to be on GPU'):
        nn.SyncBatchNorm(4)(torch.zeros(2, 4, 3, 3))
    strides = all(p.grad.stride() == p.stride() for p in model.parameters() if p.dim() == 4)
    torch.save((said, error, strides), folder / f'{rank}.pth')
    # Without destructors: that of the process group may wait for a thread, which waits for Python's lock.
    os._exit(0)


def test_two_ranks_average_the_gradients(tmp_path):
    """And only the first iteration's gradients lie otherwise than DDP's buckets."""
    # Not by a fork: other tests leave threads of autograd in this process.
    ranks = multiprocessing.spawn(train_on_rank, (tmp_path,), nprocs=2, join=False)
    assert ranks.join(timeout=300) or ranks.join(timeout=300), 'the ranks hang'
    found = [torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1)]
    for (first, second), error, strides in found:
        assert first > 0 and second == 0
        assert error < 1e-6 and strides


class TestFloat32:
    def test_a_focal_loss_computes_in_float32(self):
        """As it must, since mmcv's kernel for GPUs takes no bfloat16."""
        torch.manual_seed(0)
        scores = torch.randn(64, 5).bfloat16().requires_grad_()
        labels = torch.randint(0, 6, (64,))
        model = nn.ModuleDict(dict(loss=FocalLoss()))
        rounded = model['loss'](scores, labels)
        prepare_for_gpu(model)
        prepare_for_gpu(model)
        assert len(model['loss']._forward_pre_hooks) == 1
        loss = model['loss'](scores, labels)
        assert (rounded.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
        assert loss == FocalLoss()(scores.float(), labels)
        loss.backward()
        assert scores.grad.dtype == torch.bfloat16 and scores.grad.abs().sum() > 0
        half = torch.zeros(2, 5, dtype=torch.float16)
        assert model['loss'](half, labels[:2]).dtype == torch.float16

    def test_the_head_does_it_without_the_hook(self):
        init_default_scope('mmdet')
        head = SASARetinaHead(3, 8, feat_channels=8, stacked_convs=1)
        labels = torch.randint(0, 4, (6,))
        assert head.loss_cls(torch.randn(6, 3).bfloat16(), labels).dtype == torch.float32

    def test_regions_keep_their_coordinates(self):
        """Mmdet rounds them to the type of the maps: 1001 would be 1000."""
        torch.manual_seed(0)
        layer = dict(type='RoIAlign', output_size=2, sampling_ratio=1)
        extractor = SingleRoIExtractor(layer, 4, [8])
        maps = [torch.randn(1, 4, 130, 130).bfloat16()]
        rois = torch.tensor([[0.0, 1001.0, 517.0, 1033.0, 549.0]])
        expected = extractor([x.float() for x in maps], rois)
        compute_in_float32(extractor)
        assert torch.equal(extractor(maps, rois), expected)
        assert without_bfloat16(nn.Sequential(extractor)) == []

    def test_others_are_named(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), ModulatedDeformConv2dPack(8, 8, 3))
        assert without_bfloat16(model) == ['1 (ModulatedDeformConv2dPack)']
