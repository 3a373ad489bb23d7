#!/usr/bin/env python
"""Compare two ways to convert a strided convolution: queries at the strided pixels, or attention, then pooling.

    python tools/checks/convert_strided.py retinanet_tiny_digits CHECKPOINT FOLDER

Each strided 3x3 convolution of the detector is fitted in both ways, to the inputs that it has in the detector
on the images of FOLDER. The numbers are shares of the outputs' variance: what is left of it on the last quarter
of the images.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasa_det.checkpoints.detector import load_detector
from sasa_det.cli.process import prepare
from sasa_det.configs import find_config, read_config
from sasa_det.convert.conversion import HELD_OUT
from sasa_det.convert.detectors import (
    choose_detectors_layers,
    find_images,
    load_images,
    stages_of,
)
from sasa_det.convert.fit import fit_static_attention, solve
from sasa_det.convert.layers import write_static_attention
from sasa_det.convert.moments import Moments
from sasa_det.convert.walk import run_stages
from sasa_det.layers.replace import replacement


def unexplained(conv: nn.Conv2d, attn_cfg: dict, downsample: str, x: Tensor, fitted: int) -> float:
    """Fit an attention to a convolution, and compute the share of the variance that it leaves.

    Args:
        conv: The convolution, of stride 2.
        attn_cfg: Of the attention.
        downsample: What its stride does.
        x: Its inputs.
        fitted: How many of them, from the first on, to fit to.
    """
    layer = replacement(conv, {**attn_cfg, 'downsample': downsample}).eval()
    attention = layer[0] if isinstance(layer, nn.Sequential) else layer
    moments = Moments(conv.in_channels, conv.out_channels, stride=2)
    truth = conv(x)
    # What is pooled after attention of constant weights is attention to pooled pixels.
    seen = x if downsample == 'query' else F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1)
    moments.add(seen[:fitted], truth[:fitted])
    covariance, weight = moments.covariance(), conv.weight
    if downsample == 'pool':
        kernel = solve(covariance.inputs, covariance.cross)
        weight = kernel.view(3, 3, conv.in_channels, -1).permute(3, 2, 0, 1)
    depth = attention.out_channels // attention.num_heads
    best = fit_static_attention(
        covariance, weight, attention.num_heads, depth, attention.kernel_size
    )
    write_static_attention(layer, best)
    truth, result = truth[fitted:], layer(x[fitted:])
    left = (truth - result).square().sum()
    return (left / (truth - truth.mean((0, 2, 3), keepdim=True)).square().sum()).item()


@torch.no_grad()
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file or name of the trained detector')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument('folder', help='images')
    parser.add_argument('--num-images', type=int, default=64)
    options = parser.parse_args()
    prepare()
    config = read_config(find_config(options.config))
    model = load_detector(config, options.checkpoint)
    files = find_images(config, options.folder)
    images = load_images(model, config, files, options.num_images)
    fitted = len(images) - max(1, round(len(images) * HELD_OUT))
    strided = {
        name: choice.attn_cfg
        for name, choice in choose_detectors_layers(model).items()
        if choice.attn_cfg and model.get_submodule(name).stride == (2, 2)
    }
    inputs = {}
    for name in strided:
        model.get_submodule(name).register_forward_pre_hook(
            lambda conv, args, name=name: inputs.update({name: args[0].clone()})
        )
    run_stages(model, stages_of(model), images)
    print('| layer | queries at strided pixels | attention, then pooling |\n|---|---|---|')
    for name, x in inputs.items():
        conv = model.get_submodule(name)
        conv._forward_pre_hooks.clear()
        query, pool = (
            unexplained(conv, strided[name], downsample, x, fitted)
            for downsample in ('query', 'pool')
        )
        print(f'| {name} | {query:.3f} | {pool:.3f} |', flush=True)


if __name__ == '__main__':
    main()
