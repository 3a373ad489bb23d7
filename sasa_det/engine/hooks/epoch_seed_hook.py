"""Random numbers that depend on the seed and the place in training alone, not on the way there."""

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
    """Seed each epoch anew, so that a run that was resumed draws what it would have drawn.

    mmengine restores no generator's state: after ``--resume`` an epoch's augmentations are those of the
    first, and without ``randomness.seed`` in the config the images come in another order. Here all
    generators, those in workers too, start each epoch from the seed, the epoch and the process's
    rank, and torch's each iteration. Workers are started anew for each epoch, persistent or not.

    A run by iterations needs a seed in the config for this: there mmengine itself repeats the data,
    from workers that it may have started before it knows the checkpoint's seed.
    """

    def before_train_epoch(self, runner) -> None:
        """Seed all generators for an epoch.

        Args:
            runner: The runner.
        """
        loader = runner.train_loop.dataloader
        for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
            if hasattr(sampler, 'seed'):
                # A resumed run takes over the checkpoint's seed, after its loader was made.
                sampler.seed = runner.seed
        super().before_train_epoch(runner)
        seed_generators(runner.seed, runner.epoch, get_rank())
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            # Without workers, data and model draw from the same generators.
            batches = runner.train_loop.dataloader_iterator
            runner.train_loop.dataloader_iterator = _SeededBatches(batches, runner.seed, get_rank())
        elif loader.num_workers:
            loader.worker_init_fn = partial(
                _seed_worker, seed=runner.seed, epoch=runner.epoch, rank=get_rank()
            )
            # Persistent workers would go on from where an uninterrupted run had brought them.
            loader._iterator = None

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Seed torch for an iteration.

        Args:
            runner: The runner.
            batch_idx: The batch's place in the epoch.
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
    """Batches without end, each drawn from generators that were seeded for its place."""

    def __init__(self, batches: Iterator, *numbers: int) -> None:
        self.batches, self.numbers, self.place = batches, numbers, 0

    def __iter__(self) -> '_SeededBatches':
        return self

    def __next__(self):
        seed_generators(*self.numbers, self.place)
        self.place += 1
        return next(self.batches)

    def skip_iter(self, num_iters: int) -> None:
        """Draw batches that a resumed run has had.

        The fork's mmengine asks for this. It would leave them out where it can; workers, whose generators
        move on from batch to batch, would then augment otherwise than in a run that was left alone.
        """
        for _ in range(num_iters):
            next(self)


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _seed_worker(worker: int, seed: int, epoch: int, rank: int) -> None:
    seed_generators(seed, epoch, rank, 1 + worker)
