#!/usr/bin/env python
"""Train and predict for long, and watch memory, open files and throughput.

    python tools/reliability/soak.py --iterations 2000 --predictions 5000

Images have random sizes. The first fifth is warm-up. Exit status 1 if resident memory or open files
grow by more than is allowed, or threads that predict at once disagree with one alone.
"""

import os
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

from small_run import arguments_of

import numpy as np  # isort: skip
import torch  # isort: skip

EDGE = (32, 96)


def build_small():
    """Build the tiny detector with attention in all parts and a fourth of its channels."""
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    from sasa_det.configs import find_config

    path = find_config('retinanet_sasa-tiny_digits')
    config = Config.fromfile(path)
    config.merge_from_dict(
        {
            'model.backbone.base_channels': 8,
            'model.backbone.stem_channels': 8,
            'model.neck.in_channels': [32, 64, 128, 256],
            'model.neck.out_channels': 32,
            'model.bbox_head.in_channels': 32,
            'model.bbox_head.feat_channels': 32,
        }
    )
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    model.cfg = config
    return model


def resident_and_open() -> tuple:
    """Resident memory in MB, and the number of open files."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 1e6, len(os.listdir('/proc/self/fd'))


def watch(name: str, step, count: int, most: float) -> bool:
    """Repeat a step, print its resources over time, and return whether they stayed flat."""
    lines, begin = [], time.process_time()
    part = max(1, count // 10)
    for number in range(1, count + 1):
        step()
        if number % part == 0:
            seconds = time.process_time() - begin
            lines.append((*resident_and_open(), part / seconds))
            memory, files, rate = lines[-1]
            print(
                f'{name} {number}: {memory:.1f} MB, {files} files, {rate:.1f} a CPU second',
                flush=True,
            )
            begin = time.process_time()
    warm = lines[len(lines) // 5 - 1 :]
    growth = warm[-1][0] / warm[0][0] - 1
    rates = [rate for *_, rate in warm]
    spread = max(abs(rate / statistics.median(rates) - 1) for rate in rates)
    files = warm[-1][1] - warm[0][1]
    print(
        f'{name}: {count} done; memory {growth:+.2%}, open files {files:+d}, throughput within '
        f'{spread:.1%} of its median of {statistics.median(rates):.1f} a CPU second'
    )
    return growth <= most and files <= 0


def train(count: int, choose: random.Random, most: float) -> bool:
    """Train on random images of random sizes."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    model = build_small().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step():
        size = choose.randint(*EDGE), choose.randint(*EDGE)
        samples = []
        for _ in range(2):
            truth = InstanceData()
            truth.bboxes = torch.tensor([[4.0, 4.0, size[1] - 4.0, size[0] - 4.0]])
            truth.labels = torch.tensor([choose.randrange(10)])
            shape = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
            samples.append(DetDataSample(gt_instances=truth, metainfo=shape))
        images = [torch.randint(256, (3, *size), dtype=torch.uint8) for _ in range(2)]
        data = model.data_preprocessor({'inputs': images, 'data_samples': samples}, True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)

    return watch('train', step, count, most)


def predict(count: int, choose: random.Random, most: float) -> bool:
    """Predict random images of random sizes."""
    from mmdet.apis import inference_detector

    model = build_small().eval()
    pixels = np.random.default_rng(0)

    def step():
        size = choose.randint(*EDGE), choose.randint(*EDGE), 3
        inference_detector(model, pixels.integers(0, 256, size, dtype=np.uint8))

    return watch('predict', step, count, most)


def predict_at_once(threads: int, images: int) -> bool:
    """Predict in several threads with one model and compare with one thread."""
    model = build_small().eval()
    model.bbox_head.test_cfg.score_thr = 0.0
    pixels = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(images):
        size = [int(torch.randint(*EDGE, (1,), generator=pixels)) for _ in range(2)]
        batches.append(torch.randint(256, (3, *size), dtype=torch.uint8, generator=pixels))

    def detect(image):
        from mmdet.structures import DetDataSample

        size = tuple(image.shape[1:])
        sample = DetDataSample(
            metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
        )
        with torch.no_grad():
            found = model.test_step({'inputs': [image], 'data_samples': [deepcopy(sample)]})[0]
        return torch.cat([found.pred_instances.bboxes.flatten(), found.pred_instances.scores])

    alone = [detect(image) for image in batches]
    with ThreadPoolExecutor(threads) as pool:
        together = list(pool.map(detect, batches))
    other = sum(not torch.equal(one, two) for one, two in zip(alone, together))
    print(f'{threads} threads, {images} images: {other} differ from one thread in any bit')
    return other == 0


def main() -> None:
    """Run the command line."""
    parser = arguments_of(__doc__, trials=200)
    parser.add_argument('--iterations', type=int, default=2000)
    parser.add_argument('--predictions', type=int, default=5000)
    parser.add_argument(
        '--most-growth', type=float, default=0.02, help='of memory; default: %(default)s'
    )
    parser.add_argument(
        '--threads', type=int, default=4, help='that predict `--trials` images at once'
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    choose = random.Random(options.seed)
    flat = [
        train(options.iterations, choose, options.most_growth),
        predict(options.predictions, choose, options.most_growth),
        predict_at_once(options.threads, options.trials),
    ]
    sys.exit(not all(flat))


if __name__ == '__main__':
    main()
