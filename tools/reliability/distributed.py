#!/usr/bin/env python
"""Train and evaluate in two processes as in one, and kill one of them.

    python tools/reliability/distributed.py

- Two processes of two images and one of four end with the same weights after 20 iterations. Batch norm
  is frozen, and each image has the same boxes: mmdet's RetinaNet divides its loss by the objects of a
  process, not of all. Both train in float64. A sum over four images and one over two sums differ in the
  last bit, and a detector has jumps, at which such a difference becomes a large one: the sign of an
  error in the L1 loss, the zero of a ReLU, the largest of a pool. In float32 some of the millions of
  numbers in 20 iterations lie within a few last bits of a jump, in float64 none does. So 1e-10 can be
  asked of the weights, where float32 may miss 1e-5 by chance. Gradients may differ by 1e-8 of their norm:
  mmdet divides its loss by the number of objects plus 1.2e-7.
- An evaluation in two processes gives the numbers of one.
- If one of two processes is killed, the other must stop within the given time. The resumed run must
  end with the weights of an uninterrupted one.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from small_run import (
    arguments_of,
    folder_of,
    make_data,
    run,
    same,
    start_in_processes,
    weights,
    write_config,
)

import torch  # isort: skip

EQUAL_NORMS, EQUAL_WEIGHTS = 1e-8, 1e-10
IN_FLOAT64 = """
custom_imports = dict(imports=['sasa_det', 'tools.reliability.in_float64'])
randomness = dict(seed={seed})
model = dict(
    backbone=dict(norm_eval=True),
    neck=dict(norm_cfg=dict(type='GN', num_groups=8)),
)
custom_hooks = []
# Of gradients near nothing AdamW makes whole steps, so that the order of a sum decides their sign.
optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.001, momentum=0.9))
model_wrapper_cfg = dict(broadcast_buffers=False)
train_dataloader.update(batch_size={batch}, num_workers=0, persistent_workers=False,
    sampler=dict(type='InfiniteSampler', shuffle=False), batch_sampler=None)
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=20)
val_cfg = val_dataloader = val_evaluator = None  # mmcv's suppression takes float32 only
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=10)]
default_hooks.update(checkpoint=dict(by_epoch=False, interval=10), logger=dict(interval=1))
log_processor = dict(window_size=1, by_epoch=False)
train_pipeline[2]['prob'] = 0.0
"""


def in_processes(folder: Path, *arguments: str, tool: str = 'train') -> str:
    """Run in two processes to the end and return the output."""
    status = start_in_processes(folder, *arguments, tool=tool).wait()
    said = (folder / 'said.txt').read_text(errors='replace')
    if status:
        raise RuntimeError(f'{folder} ended with status {status}:\n{said[-3000:]}')
    return said


def compare_training(root: Path, data: Path, seed: int) -> bool:
    """Compare two processes of two images with one of four."""
    annotations = data / 'annotations/instances_train.json'
    content = json.loads(annotations.read_text())
    boxes = [([6, 8, 20, 24], 1), ([34, 30, 24, 20], 2)]
    content['annotations'] = [
        dict(
            id=2 * place + which,
            image_id=image['id'],
            category_id=category,
            bbox=box,
            area=box[2] * box[3],
            iscrowd=0,
        )
        for place, image in enumerate(content['images'])
        for which, (box, category) in enumerate(boxes)
    ]
    alike = root / 'alike.json'
    alike.write_text(json.dumps(content))
    steps = {}
    for processes in (1, 2):
        folder = root / f'processes_{processes}'
        more = IN_FLOAT64.format(batch=4 // processes, seed=seed)
        write_config(
            folder, data, f"train_dataloader['dataset']['ann_file'] = {str(alike)!r}\n{more}"
        )
        (run if processes == 1 else in_processes)(folder)
        log = next(folder.glob('*/vis_data/scalars.json')).read_text().splitlines()
        # The logged loss is the first process's, the gradient that of all processes.
        steps[processes] = [entry['grad_norm'] for entry in map(json.loads, log) if 'loss' in entry]
    one, two = (weights(root / f'processes_{count}/iter_20.pth') for count in (1, 2))
    halfway = weights(root / 'processes_1/iter_10.pth')
    learnt = [name for name, value in one.items() if value.is_floating_point()]
    precise = all(one[name].dtype == two[name].dtype == torch.float64 for name in learnt)
    moved = max((one[name] - two[name]).abs().max().item() for name in learnt)
    trained = max((one[name] - halfway[name]).abs().max().item() for name in learnt)
    norm = max(abs(a / b - 1) for a, b in zip(steps[1], steps[2]))
    print(
        f'20 iterations, 2 x 2 and 1 x 4, all in float64: {precise}; norms of gradients differ by '
        f'{norm:.1e} of themselves, weights by {moved:.1e}; the last ten iterations moved them by '
        f'{trained:.1e}',
        flush=True,
    )
    good = precise and len(steps[1]) == len(steps[2]) == 20 and trained > 1e-3
    return good and norm < EQUAL_NORMS and moved < EQUAL_WEIGHTS


def compare_evaluation(root: Path, data: Path) -> bool:
    """Compare the 12 COCO metrics from two processes and from one."""
    checkpoint = str(root / 'alone/epoch_2.pth')
    numbers = []
    for processes in (1, 2):
        folder = root / f'test_{processes}'
        write_config(folder, data, 'model = dict(test_cfg=dict(score_thr=0.0))')
        said = (run if processes == 1 else in_processes)(folder, checkpoint, tool='test')
        numbers.append(re.findall(r'(?:Precision|Recall).*= (-?[\d.]+)', said))
    print(
        f'evaluation: {len(numbers[0])} numbers, the same: {numbers[0] == numbers[1]}', flush=True
    )
    return len(numbers[0]) >= 12 and numbers[0] == numbers[1]


def kill_one(root: Path, data: Path, most: float) -> bool:
    """Kill one process of two in the middle of training."""
    write_config(root / 'alone', data, epochs=2)
    in_processes(root / 'alone')
    folder = root / 'killed'
    write_config(folder, data, epochs=2)
    process = start_in_processes(folder)
    while process.poll() is None and not (folder / 'epoch_1.pth').exists():
        time.sleep(0.05)
    ranks = [pid for pid in children(process.pid) if 'sasa_det' in command_of(pid)]
    os.kill(ranks[-1], signal.SIGKILL)
    begin = time.monotonic()
    status = process.wait(timeout=10 * most)
    seconds = time.monotonic() - begin
    said = (folder / 'said.txt').read_text(errors='replace')
    message = [line for line in said.splitlines() if 'exitcode' in line or 'Signal 9' in line]
    left = [pid for pid in ranks if Path(f'/proc/{pid}').exists()]
    in_processes(folder, '--resume')
    good = same(weights(root / 'alone/epoch_2.pth'), weights(folder / 'epoch_2.pth'))
    print(
        f'one of two processes killed: all stopped after {seconds:.1f} s with status {status}, '
        f'{len(left)} left; said {message[:1]}; went on to the same weights: {good}',
        flush=True,
    )
    return seconds < most and status != 0 and not left and bool(message) and good


def children(pid: int) -> list:
    """The child processes of a process."""
    listed = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    return [int(child) for child in listed]


def command_of(pid: int) -> str:
    """A process's command line."""
    return Path(f'/proc/{pid}/cmdline').read_text().replace('\0', ' ')


def main() -> None:
    """Run the command line."""
    parser = arguments_of(__doc__, trials=1)
    parser.add_argument('--most', type=float, default=60, help='seconds until all have stopped')
    options = parser.parse_args()
    torch.set_num_threads(1)
    with folder_of(options) as root:
        data = make_data(root)
        good = [
            compare_training(root, data, options.seed),
            kill_one(root, data, options.most),
            compare_evaluation(root, data),
        ]
    sys.exit(not all(good))


if __name__ == '__main__':
    main()
