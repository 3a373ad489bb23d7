"""What does a detector's attention attend to while it trains? Numbers for the visualizer."""

from typing import Dict, Optional

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS


@HOOKS.register_module()
class AttentionDiagnosisHook(Hook):
    """After each evaluation in training, write the numbers of ``sasa-det diagnose``.

    The run's visualizer gets, for each number of
    :class:`~sasa_det.evaluation.diagnosis.HeadDiagnosis`, its mean over all heads as ``diagnosis/NUMBER``,
    and each head's own as ``diagnosis_NUMBER/LAYER/head_1`` and so on. ``diagnosis/static`` is the share of
    heads that never move. The visualizer writes to TensorBoard or the config's other ``vis_backends``.

    The hook is off unless a config switches it on, by one line:
    ``default_hooks = dict(diagnosis=dict(type='AttentionDiagnosisHook'))``.

    Args:
        num_images: Number of validation images to look at.
        accuracy: Whether to evaluate the detector without q.k, without q.r and with the same weights at
            every pixel, too. That takes three more evaluations. The visualizer gets the main metric of
            each as ``diagnosis_accuracy/without_q.k`` and so on.

    Raises:
        ValueError: num_images is below 1.

    Examples:
        >>> AttentionDiagnosisHook(num_images=0)
        Traceback (most recent call last):
            ...
        ValueError: num_images must be an integer of at least 1, but is 0
    """

    priority = 'LOW'

    def __init__(self, num_images: int = 8, accuracy: bool = False) -> None:
        if not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f'num_images must be an integer of at least 1, but is {num_images!r}')
        self.num_images = num_images
        self.accuracy = accuracy

    def after_val_epoch(self, runner, metrics: Optional[Dict[str, float]] = None) -> None:
        """Compute the numbers and write them.

        Each process computes them, as all have to evaluate; only the first one writes.

        Args:
            runner: The runner.
            metrics: Those of the evaluation.
        """
        from ...evaluation.accuracy import evaluate
        from ...evaluation.diagnosis import HeadDiagnosis, diagnose, mean_of_heads, spread
        from ...evaluation.diagnosis_accuracy import AWAY, list_cases, measure

        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        loader = runner.val_dataloader
        layers = diagnose(model, spread(loader.dataset, self.num_images))
        if not layers:
            runner.logger.warning('AttentionDiagnosisHook: no layer of this model attends')
            return
        means = mean_of_heads(layers)
        scalars = {f'diagnosis/{name}': value for name, value in means.items()}
        for name, found in layers.items():
            for number, head in enumerate(found.heads, 1):
                for key in HeadDiagnosis._fields:
                    scalars[f'diagnosis_{key}/{name}/head_{number}'] = float(getattr(head, key))
        if self.accuracy:
            queries = {name: found.query for name, found in layers.items()}
            measured = measure(
                model,
                list_cases(model)[1:],
                queries,
                lambda case: evaluate(model, loader, runner.val_evaluator),
            )
            # Without the metric's name, by which readers of the log know an evaluation.
            for case, numbers in measured.items():
                name = AWAY[case.away].replace(' ', '_')
                scalars[f'diagnosis_accuracy/{name}'] = float(next(iter(numbers.values()), 0.0))
        runner.visualizer.add_scalars(scalars, step=runner.iter)
        listed = ', '.join(f'{name} {value:.3f}' for name, value in means.items())
        runner.logger.info(f'Attention, means over heads: {listed}')
