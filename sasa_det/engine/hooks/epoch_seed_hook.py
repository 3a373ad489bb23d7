"""How do random numbers survive a resume? They depend only on the seed and the place in training."""

import random
from functools import partial
from typing import Iterator

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import DistSamplerSeedHook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop


@HOOKS.register_module()
class EpochSeedHook(DistSamplerSeedHook):
    """Seed each epoch anew, so that a resumed run draws the same random numbers as an uninterrupted one.

    mmengine does not restore the generators' states. After ``--resume`` an epoch's augmentations are
    those of the first epoch. Without ``randomness.seed`` in the config the images come in another order
    too. Here all generators, including those in workers, are seeded per epoch from the seed, the epoch
    and the rank. torch's generator is also seeded per iteration. Workers are restarted for each epoch,
    even persistent ones.

    An iteration-based run needs a seed in the config for this. There mmengine itself repeats the
    data, and may start workers before it knows the checkpoint's seed.
    """

    def before_train_epoch(self, runner) -> None:
        """Seed all generators for an epoch.

        Args:
            runner: The runner.
        """
        loader = runner.train_loop.dataloader
        for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
            if hasattr(sampler, 'seed'):
                # A resumed run takes the checkpoint's seed only after its loader was built.
                sampler.seed = runner.seed
        super().before_train_epoch(runner)
        seed_generators(runner.seed, runner.epoch, get_rank())
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            # Without workers, data and model use the same generators.
            batches = runner.train_loop.dataloader_iterator
            runner.train_loop.dataloader_iterator = _SeededBatches(batches, runner.seed, get_rank())
        elif loader.num_workers:
            loader.worker_init_fn = partial(
                _seed_worker, seed=runner.seed, epoch=runner.epoch, rank=get_rank()
            )
            # The states of persistent workers would depend on the epochs before.
            loader._iterator = None

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Seed torch for an iteration.

        Args:
            runner: The runner.
            batch_idx: The batch's index in the epoch.
            data_batch: The batch.
        """
        torch.manual_seed(_mix(runner.seed, runner.iter, get_rank()))


def seed_generators(*numbers: int) -> None:
    """Seed Python's, numpy's and torch's generators from some numbers.

    Args:
        numbers: Each combination gives another seed.

    Examples:
        >>> seed_generators(0, 3)
        >>> first = random.random()
        >>> seed_generators(0, 3)
        >>> random.random() == first
        True
    """
    seed = _mix(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class _SeededBatches:
    """An endless iterator of batches, which seeds the generators before each by its index."""

    def __init__(self, batches: Iterator, *numbers: int) -> None:
        self.batches, self.numbers, self.place = batches, numbers, 0

    def __iter__(self) -> '_SeededBatches':
        return self

    def __next__(self):
        seed_generators(*self.numbers, self.place)
        self.place += 1
        return next(self.batches)

    def skip_iter(self, num_iters: int) -> None:
        """Draw and discard the batches before the resumed iteration.

        The fork's mmengine calls this. By itself it would skip the batches where it can. The generators
        in workers advance with each batch, so augmentations would then differ from an uninterrupted run.
        """
        for _ in range(num_iters):
            next(self)


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _seed_worker(worker: int, seed: int, epoch: int, rank: int) -> None:
    seed_generators(seed, epoch, rank, 1 + worker)
