#!/usr/bin/env python
"""Train in float16 and bfloat16, and with four times the learning rate: no loss may be NaN.

    python tools/reliability/precision.py --iterations 300

Mixed precision is torch's autocast and GradScaler on the CPU. The larger rate is tried on the digits by
the schedule of the tiny configs, with its warm-up and clipping.
"""

import json
import math
import sys
from pathlib import Path

from small_run import arguments_of, folder_of, make_data, run, write_config

import torch  # isort: skip


def train_in(dtype: torch.dtype, iterations: int) -> bool:
    """Train the small detector on a batch of two images, and return whether its loss stays finite."""
    from soak import build_small

    from mmdet.structures import DetDataSample  # isort: skip
    from mmengine.structures import InstanceData  # isort: skip

    model = build_small().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler('cpu', enabled=dtype != torch.float32)
    numbers = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=numbers) for _ in 'ab']
    samples = []
    for label in range(2):
        truth = InstanceData(
            bboxes=torch.tensor([[8.0, 8.0, 40.0, 50.0]]), labels=torch.tensor([label])
        )
        shape = dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0))
        samples.append(DetDataSample(gt_instances=truth, metainfo=shape))
    losses, skipped = [], 0
    for _ in range(iterations):
        data = model.data_preprocessor({'inputs': images, 'data_samples': samples}, True)
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            loss, _ = model.parse_losses(model(**data, mode='loss'))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 35.0)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        losses.append(float(loss))
    good = all(map(math.isfinite, losses))
    finite = all(bool(torch.isfinite(weight).all()) for weight in model.state_dict().values())
    print(
        f'{str(dtype)[6:]}: {iterations} iterations, loss {losses[0]:.3f} to {losses[-1]:.3f}, '
        f'{sum(not math.isfinite(loss) for loss in losses)} not finite, {skipped} steps skipped by '
        f'the scaler, weights finite: {finite}',
        flush=True,
    )
    return good and finite and losses[-1] < losses[0]


def train_faster(root: Path, factor: float, epochs: int) -> bool:
    """Train on some digits with a larger learning rate."""
    folder = root / f'lr_x{factor:g}'
    write_config(
        folder,
        make_data(root),
        f"optim_wrapper = dict(optimizer=dict(lr=_base_.optim_wrapper['optimizer']['lr'] * {factor}))",
        epochs=epochs,
    )
    run(folder)
    log = next(folder.glob('*/vis_data/scalars.json')).read_text().splitlines()
    losses = [entry['loss'] for entry in map(json.loads, log) if 'loss' in entry]
    tail = sum(losses[-6:]) / 6
    print(
        f'lr x {factor:g}: {len(losses)} iterations, loss {losses[0]:.2f}, at most {max(losses):.2f}, '
        f'{tail:.2f} in the last epoch',
        flush=True,
    )
    return all(map(math.isfinite, losses)) and tail < losses[0]


def main() -> None:
    """Run the command line."""
    parser = arguments_of(__doc__, trials=1)
    parser.add_argument('--iterations', type=int, default=300)
    parser.add_argument('--epochs', type=int, default=20, help='of six iterations, at lr x 4')
    options = parser.parse_args()
    torch.set_num_threads(1)
    with folder_of(options) as root:
        good = [train_faster(root, 4, options.epochs)]
        good += [
            train_in(dtype, options.iterations)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ]
    sys.exit(not all(good))


if __name__ == '__main__':
    main()
