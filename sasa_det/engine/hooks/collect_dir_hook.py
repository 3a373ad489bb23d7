"""Where distributed evaluation puts the results that its processes exchange."""

import os

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class CollectDirHook(Hook):
    """Exchange results in the run's folder. mmengine makes a folder ``.dist_test`` in the working folder.

    The working folder may be read-only, and mmengine leaves its folder there. The run's own folder is shared
    by the processes anyway. A metric with a ``collect_dir`` of its own, or one that exchanges results by GPU,
    is left alone.
    """

    def before_val(self, runner) -> None:
        """Set the folder of the validation's metrics.

        Args:
            runner: The runner.
        """
        _set_collect_dir(runner, runner.val_evaluator)

    def before_test(self, runner) -> None:
        """Set the folder of the test's metrics.

        Args:
            runner: The runner.
        """
        _set_collect_dir(runner, runner.test_evaluator)


def _set_collect_dir(runner, evaluator) -> None:
    for metric in evaluator.metrics:
        if getattr(metric, 'collect_device', None) == 'cpu' and metric.collect_dir is None:
            metric.collect_dir = os.path.join(runner.log_dir, 'collected')
