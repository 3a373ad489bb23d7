"""How accurate is a detector on a config's validation data?"""

from typing import Callable, Dict, Tuple

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from .quiet import quiet


def build_validation(config: Config) -> Tuple[DataLoader, Evaluator]:
    """Build a config's validation data and evaluator.

    Args:
        config: A config of mmdet.

    Raises:
        ValueError: The config has none.
        FileNotFoundError: The data are not there.
    """
    for key in ('val_dataloader', 'val_evaluator'):
        if not config.get(key):
            raise ValueError(
                f'{config.filename}: {key} is not set, so there are no labels to evaluate a detector on'
            )
    init_default_scope(config.get('default_scope', 'mmdet'))
    with quiet():
        loader = Runner.build_dataloader(config.val_dataloader)
        evaluator = Evaluator(config.val_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    return loader, evaluator


def evaluate(
    model: nn.Module,
    loader: DataLoader,
    evaluator: Evaluator,
    tell: Callable[[], None] = lambda: None,
) -> Dict[str, float]:
    """Evaluate a detector.

    Args:
        model: The detector.
        loader: Gives batches of the data.
        evaluator: Knows the data's classes.
        tell: Is called after each batch.

    Returns:
        The evaluator's numbers, by name; the main one is the first. CocoMetric gives none where a detector
        finds nothing.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), quiet():
            for batch in loader:
                evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
                tell()
            return evaluator.evaluate(len(loader.dataset))
    finally:
        model.train(was_training)
