"""AP of a detector on labelled images, before and after a conversion."""

from typing import List

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..evaluation.accuracy import evaluate
from ..evaluation.quiet import quiet

# Names of AP among the metrics of mmdet, by their ends.
_ENDINGS = ('mAP', '_AP')


class LabelledImages:
    """Images of a config's validation set, on which AP is measured as mmdet's test.py does.

    Args:
        config: A detector's config.
        most: At most so many of them, evenly spaced.

    Raises:
        ValueError: The config names no labelled images, or they cannot be read; says why.

    Examples:
        >>> LabelledImages(Config(dict(train_cfg={})), 100)
        Traceback (most recent call last):
        ...
        ValueError: None: val_dataloader and val_evaluator are not set, so there are no labels to measure AP on
    """

    def __init__(self, config: Config, most: int) -> None:
        if not (config.get('val_dataloader') and config.get('val_evaluator')):
            raise ValueError(
                f'{config.filename}: val_dataloader and val_evaluator are not set, so there are no labels to '
                'measure AP on'
            )
        init_default_scope(config.get('default_scope', 'mmdet'))
        self._evaluator, self._batch = config.val_evaluator, config.val_dataloader.batch_size
        try:
            with quiet():
                self._dataset = DATASETS.build(config.val_dataloader.dataset)
        except Exception as error:  # a data set is a program, which may raise any error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f'{config.filename}: val_dataloader.dataset cannot be read ({reason})'
            ) from error
        number = len(self._dataset)
        count = min(number, most)
        self.indices: List[int] = [index * number // count for index in range(count)]

    def ap(self, model: nn.Module) -> float:
        """Measure a detector's AP, in per cent.

        Args:
            model: The detector.

        Raises:
            ValueError: There is no box to find in these images.
        """
        with quiet():
            evaluator = Evaluator(self._evaluator)
        evaluator.dataset_meta = self._dataset.metainfo
        if len(self.indices) < len(self._dataset):
            for metric in evaluator.metrics:
                if hasattr(metric, 'img_ids'):  # else all that the file names are looked for
                    metric.img_ids = [
                        self._dataset.get_data_info(i)['img_id'] for i in self.indices
                    ]
        images = Subset(self._dataset, self.indices)
        numbers = evaluate(
            model, DataLoader(images, self._batch, collate_fn=pseudo_collate), evaluator
        )
        # mmdet gives no number of a detector that finds nothing, and -1 where there is nothing to find.
        ap = next((value for key, value in numbers.items() if key.endswith(_ENDINGS)), 0.0)
        if ap < 0:
            raise ValueError('the labelled images have no box to find')
        return 100 * float(ap)
