"""A training step of a detector on CUDA, without CUDA: fake tensors that say they are there.

    python cuda_dry_run.py FOLDER      where to build the library that it needs

Shapes, types and layouts are computed as on a GPU, under its autocast; numbers are not. Autograd's engine does
not run on fake CUDA tensors in a torch for the CPU, so of the backward it runs the layers' own part. Prints a
JSON object. It is a program of its own, since a process cannot forget such a guard.
"""

import copy
import ctypes
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from mmdet.models.losses import focal_loss
from mmdet.registry import MODELS
from mmengine.model import convert_sync_batchnorm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sasa_det.configs import find_config, read_config
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.models.gpu import NEED_FLOAT32, prepare_for_gpu
from sasa_det.ops.window import Window
from sasa_det.plugin import register

# What torch for CUDA registers itself; without it not even a fake tensor is copied on 'cuda'.
GUARD = """
#include <c10/core/impl/FakeGuardImpl.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>);
"""
WAITING = ('_local_scalar_dense', 'nonzero', 'is_nonzero', 'equal', 'masked_select', '_unique2')
CHANNELS_LAST = torch.channels_last
LEAVES = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)
LAYERS = (
    dict(bias=True),
    dict(border='mask', dilation=2, position_per_head=True),
    dict(position='none'),
    dict(logits='qr', init='random'),
)


def build_guard(folder: Path) -> Path:
    """Compile the library."""
    torch_folder, library = Path(torch.__file__).parent, folder / 'guard.so'
    (folder / 'guard.cpp').write_text(GUARD)
    subprocess.run(
        [
            'c++', '-std=c++20', '-shared', '-fPIC', f'-I{torch_folder}/include', folder / 'guard.cpp',
            '-o', library, f'-L{torch_folder}/lib', '-lc10', f'-Wl,-rpath,{torch_folder}/lib',
        ],
        check=True,
    )  # fmt: skip
    return library


class HostWaits(TorchDispatchMode):
    """Notes each operation for which Python would wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        result_device = (kwargs or {}).get('device')
        copies = name == '_to_copy' and result_device is not None
        if name in WAITING or (copies and torch.device(result_device).type != args[0].device.type):
            self.names.append(name)
        if name == 'index' and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.names.append(name)
        if name == 'copy_' and args[0].device.type != args[1].device.type:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class LayoutsOfCudnn(TorchDispatchMode):
    """Lays convolutions' results out as cuDNN does: channels_last if a map or the weight is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == 'convolution' and any(map(is_channels_last, args[:2])):
            return results.contiguous(memory_format=CHANNELS_LAST)
        if func.overloadpacket.__name__ == 'convolution_backward':
            assert any(map(is_channels_last, args[:3]))
            x, *others = results
            return x.contiguous(memory_format=CHANNELS_LAST), *others
        return results


def is_channels_last(x):
    return x.dim() == 4 and x.is_contiguous(memory_format=CHANNELS_LAST)


def on_cuda(module):
    """Give a module fake parameters and buffers on 'cuda', of the same types and strides."""

    def fake(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device='cuda')

    for each in module.modules():
        for name, x in each._parameters.items():
            if x is not None:
                each._parameters[name] = nn.Parameter(fake(x), x.requires_grad)
        for name, x in each._buffers.items():
            if x is not None:
                each._buffers[name] = fake(x)
    return module


def image(channels, height, width):
    return torch.empty(2, channels, height, width, device='cuda').to(memory_format=CHANNELS_LAST)


@contextmanager
def bfloat16():
    """Turn on autocast('cuda'), which refuses itself where there is no GPU."""
    torch.set_autocast_dtype('cuda', torch.bfloat16)
    torch.set_autocast_enabled('cuda', True)
    try:
        yield
    finally:
        torch.set_autocast_enabled('cuda', False)
        torch.clear_autocast_cache()


def find_waits():
    """What the mode finds in code that waits: it must not be blind."""
    found = {}
    x = torch.empty(4, device='cuda')
    waits = dict(
        item=lambda: x.sum().item(), mask=lambda: x[x > 0], cpu=lambda: x.cpu(),
        tensor=lambda: torch.zeros(4).to('cuda'), copy=lambda: torch.zeros(4).copy_(x),
    )  # fmt: skip
    for name, call in waits.items():
        with HostWaits() as mode:
            try:
                call()
            except Exception:  # a fake tensor has no values to look at
                pass
        found[name] = mode.names
    return found


def run_layer(layer):
    """Run a layer forward and backward under autocast."""
    on_cuda(layer)
    with HostWaits() as mode, LayoutsOfCudnn():
        x = image(32, 20, 30).requires_grad_()
        with bfloat16():
            y = layer(x)
        with torch.no_grad():  # as in the engine
            backward = getattr(y.grad_fn, 'apply', y.grad_fn)  # of a Function in Python, or in C++
            grads = backward(torch.empty_like(y))
    grads = [x for x in grads if isinstance(x, torch.Tensor)]
    return dict(
        output=str(y.dtype),
        channels_last=[is_channels_last(each) for each in (y, grads[0])],
        grads=sorted({str(each.dtype) for each in grads}),
        devices=sorted({each.device.type for each in (y, *grads)}),
        waits=mode.names,
    )


def run_triton():
    """Let the Triton backend lay out its launches; they are noted and not queued."""
    from sasa_det.ops.backends import triton, triton_launches

    window, launches = Window(7, 4, 1, 'zeros', 1.0), []

    def run(launch):
        given = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
        assert all(x.is_cuda for x in given)
        launches.append([launch.kernel, launch.programs, launch.arguments['UNIT']])

    maps = [image(128, 20, 30).bfloat16() for _ in range(3)]
    tables = list(torch.empty(2, 1, 16, 7, device='cuda', dtype=torch.bfloat16).unbind())
    with HostWaits() as mode, patch.object(triton_launches.Launch, 'run', run):
        output, logsumexp = triton.forward(*maps, *tables, window)
        into = [torch.empty_like(x) for x in maps]
        grads = triton.backward(output, *maps, *tables, logsumexp, into, window)
    return dict(launches=launches, tables=[str(x.dtype) for x in grads], waits=mode.names)


def build_detector():
    config = read_config(find_config('retinanet_sasa-r50_sasa-fpn_sasa-head_1x_coco'))
    config.model.backbone.update(init_cfg=None, depth=26, base_channels=16)
    config.model.neck.in_channels = [64, 128, 256, 512]
    return MODELS.build(config.model).train()


def run_detector(model):
    """Run a detector under autocast, and its losses on targets that are given."""
    maps, shared = {}, {}

    def note(module, args, output):
        if isinstance(output, torch.Tensor) and output.dim() == 4:
            kind = maps.setdefault(type(module).__name__, set())
            kind.add((str(output.dtype), output.device.type, is_channels_last(output)))

    for module in model.modules():
        # Not those within a layer, which would then call them for the hooks' sake.
        if isinstance(module, (LocalSelfAttention2d, *LEAVES)):
            module.register_forward_hook(note)
    with bfloat16():
        with HostWaits() as mode, LayoutsOfCudnn():
            scores, boxes = model._forward(image(3, 64, 96))
        shared.update(waits=mode.names, maps={name: sorted(kinds) for name, kinds in maps.items()})
        shared['losses'] = losses(model.bbox_head, scores, boxes)
        for module in model.modules():
            if isinstance(module, NEED_FLOAT32):
                module._forward_pre_hooks.clear()
        try:
            losses(model.bbox_head, scores, boxes)
        except NotImplementedError as error:
            shared['without'] = str(error)
    return shared


def losses(head, scores, boxes):
    """Compute the losses of each level by mmdet's code for CUDA; return the types that mmcv's op was given."""
    taken, types = [], []

    def op(scores, labels, *_):
        taken.append(str(scores.dtype))
        if scores.dtype not in (torch.float32, torch.float16):  # as the kernel is compiled
            raise NotImplementedError(f'"sigmoid_focal_loss_forward_cuda_kernel": {scores.dtype}')
        return scores * 1

    with (
        patch.object(torch.cuda, 'is_available', lambda: True),
        patch.object(focal_loss, '_sigmoid_focal_loss', op),
        # mmdet's L1 loss asks whether any weight is above 0, and a fake one has no value.
        patch.object(torch, 'any', lambda x: True),
    ):
        for score, box in zip(scores, boxes):
            anchors = (2, box.numel() // 8)
            targets = [torch.empty(*anchors, 4, device='cuda') for _ in range(3)]
            labels = torch.empty(anchors, dtype=torch.long, device='cuda')
            weights = torch.empty(anchors, device='cuda')
            found = head.loss_by_feat_single(
                score, box, targets[0], labels, weights, targets[1], targets[2], avg_factor=8.0
            )
            types.append([str(x.dtype) for x in found])
    return dict(taken=taken, types=types)


def synchronise(model):
    """Convert batch norm as `sync_bn='torch'` does; say whether weights and layouts are as they were."""
    before = {name: (x.clone(), x.stride()) for name, x in model.state_dict().items()}
    convert_sync_batchnorm(model, 'torch')
    after = model.state_dict()
    kept = before.keys() == after.keys() and all(
        torch.equal(x, after[name]) and strides == after[name].stride()
        for name, (x, strides) in before.items()
    )
    kinds = sorted({type(x).__name__ for x in model.modules() if 'BatchNorm' in type(x).__name__})
    return dict(kept=kept, kinds=kinds)


def main() -> None:
    ctypes.CDLL(str(build_guard(Path(sys.argv[1]))))
    register()
    layers = {str(options): LocalSelfAttention2d(32, num_heads=4, **options) for options in LAYERS}
    detector = build_detector()
    for each in (*layers.values(), detector):
        prepare_for_gpu(each)
    found = dict(synchronised=synchronise(copy.deepcopy(detector)))
    with FakeTensorMode():
        found['finds'] = find_waits()
        found['layers'] = {name: run_layer(layer) for name, layer in layers.items()}
        found['triton'] = run_triton()
        found['detector'] = run_detector(on_cuda(detector))
    print(json.dumps(found))


if __name__ == '__main__':
    main()
