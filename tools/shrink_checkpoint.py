#!/usr/bin/env python3
"""Make a trained checkpoint small enough to ship: its weights alone, in float16, and how they were trained.

    sasa-det demo-data
    sasa-det train retinanet_sasa-tiny_digits --work-dir work_dirs/demo
    python tools/shrink_checkpoint.py work_dirs/demo/epoch_8.pth sasa_det/demo/digits.pth

The weights in float16 are evaluated by `sasa-det test`, on the data of the checkpoint's own config. Their AP
goes into the file, beside the config, its name, the seed, the epochs and the batch size of one process.
Nothing in it tells of the machine or the time: the same weights give the same bytes.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config

from sasa_det.checkpoints.loading import load_from_local
from sasa_det.checkpoints.written_config import written_config
from sasa_det.files import written_whole

# Of a run, not of a config.
_RUNS_OWN = ('work_dir', 'launcher', 'load_from', 'resume')


def shrink(checkpoint: dict) -> dict:
    """Keep a checkpoint's weights, in float16, and what made them.

    Args:
        checkpoint: What mmengine saved in training.

    Returns:
        The new checkpoint's content. Its ``meta`` has ``cfg``, ``config_name``, ``seed``, ``epochs``,
        ``batch_size`` and ``dataset_meta``.

    Raises:
        ValueError: It has no config, or a weight is too large for float16; names the weight.
    """
    values = written_config(checkpoint)
    if values is None:
        raise ValueError('it holds no config, so it was not written by training')
    config = Config({name: value for name, value in values.items() if name not in _RUNS_OWN})
    weights = {}
    for name, value in checkpoint['state_dict'].items():
        weights[name] = value.half().clone() if value.is_floating_point() else value.clone()
        if not weights[name].isfinite().all():
            raise ValueError(f'{name} has a value that float16 cannot hold')
    meta = checkpoint['meta']
    return dict(
        state_dict=weights,
        meta=dict(
            cfg=config.pretty_text,
            # mmengine adds the time of the start.
            config_name=re.sub(r'_\d{8}_\d{6}$', '', meta['experiment_name']),
            seed=meta['seed'],
            epochs=meta['epoch'],
            batch_size=config.train_dataloader.batch_size,
            dataset_meta=meta['dataset_meta'],
        ),
    )


def evaluate(content: dict) -> float:
    """Evaluate a checkpoint's content by `sasa-det test`, with its own config.

    Returns:
        AP, from 0 to 1.
    """
    with tempfile.TemporaryDirectory() as folder:
        config, checkpoint = Path(folder, 'config.py'), Path(folder, 'checkpoint.pth')
        config.write_text(content['meta']['cfg'])
        torch.save(content, checkpoint)
        test = ('test', config, checkpoint, '--work-dir', Path(folder, 'run'))
        subprocess.run([sys.executable, '-m', 'sasa_det', *map(str, test)], check=True)
        (numbers,) = Path(folder, 'run').glob('*/*.json')
        return json.loads(numbers.read_text())['coco/bbox_mAP']


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkpoint', help='as training saved it')
    parser.add_argument('out', type=Path, help='the file to write')
    options = parser.parse_args()
    content = shrink(load_from_local(options.checkpoint, 'cpu'))
    content['meta']['AP'] = evaluate(content)
    with written_whole(options.out) as partial, partial.open('wb') as file:
        # To a file object: torch would store the name of the partial file.
        torch.save(content, file)
    facts = {name: value for name, value in content['meta'].items() if name != 'cfg'}
    print(f'{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, {facts}')


if __name__ == '__main__':
    main()
