"""How a detector is built from config and checkpoint, with errors that name the file."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Mapping, Union

from mmdet.apis import init_detector
from mmdet.registry import DATASETS
from mmengine.config import Config
from torch import nn

from .fit import describe_misfit
from .loading import load_from_local, safe_loading


def load_detector(config: Config, checkpoint: Union[str, Path], device: str = 'cpu') -> nn.Module:
    """Build a config's detector and load a checkpoint, which must hold its weights and no others.

    ``mmdet.apis.init_detector`` leaves missing weights random, and only logs it.

    Args:
        config: The config that the checkpoint was trained with.
        checkpoint: The weights, as mmengine saves them.
        device: Where to run the model.

    Returns:
        The detector, ready for ``mmdet.apis.inference_detector``.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The checkpoint cannot be read, asks for code to be run, or holds other weights than
            the model's. The message says which, and which config of the package would fit. Or the
            config has no test data.

    Examples:
        >>> load_detector(Config.fromfile('configs/tiny.py'), 'epoch_12.pth') # doctest: +SKIP
        RetinaNet(...)
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f'{checkpoint}: no such checkpoint')
    if not config.get('test_dataloader'):
        raise ValueError(
            f'{config.filename}: test_dataloader is not set; its pipeline says how images are loaded, '
            'and its data set which classes there are'
        )
    try:
        saved = load_from_local(str(checkpoint), 'cpu')
        # load_checkpoint prints a line, which is kept off stdout.
        with safe_loading(), redirect_stdout(io.StringIO()):
            # Without a palette mmdet builds the data set for it. A data set within another one would be
            # read there, and so unpickled if its file is a pickle.
            palette = _palette(config.test_dataloader.dataset, saved)
            model = init_detector(config.copy(), str(checkpoint), palette, device)
    except Exception as error:  # torch, pickle and zip each raise errors of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f'{checkpoint}: cannot be loaded into the model of {config.filename} ({reason})'
        ) from error
    misfit = describe_misfit(model, saved, config.model, path=checkpoint)
    if misfit:
        raise ValueError(
            f'{checkpoint}: its weights are not those of the model of {config.filename}. {misfit}'
        )
    return model


def _palette(dataset: Mapping, checkpoint: Mapping):
    """Choose the colours of the classes as mmdet does, without building the data set."""
    while 'dataset' in dataset or 'datasets' in dataset:
        dataset = dataset.get('dataset') or dataset['datasets'][0]
    kind = DATASETS.get(dataset['type'])
    written = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
    for meta in (dataset.get('metainfo') or {}, getattr(kind, 'METAINFO', {}), written):
        if meta.get('palette'):
            return meta['palette']
    return 'random'
