"""Which samples, in which order, on which rank."""
import torch
from torch.utils.data import Sampler

from .randomness import generator


class TrainOrder(Sampler):
    """Batches of (epoch, index) keys: the order of an epoch is a function of (seed, epoch) alone.

    An update works on the next `batch * accum` samples of the order, micro-batch by micro-batch, and ranks take every
    world-th sample of each: so every world size sees the same samples in every update, and a resume can start at any
    sample. Nothing is padded or dropped; shares that differ in size carry weights that make the sum over micro-batches
    and the mean over ranks of `weight * mean loss` the mean over all samples of the update.
    """

    def __init__(self, length: int, batch: int, accum: int, seed: int, rank: int, world: int):
        self.length, self.batch, self.accum, self.seed, self.rank, self.world = length, batch, accum, seed, rank, world
        self.at(0, 0)

    def at(self, epoch: int, start: int):
        self.epoch, self.start = epoch, start

    def plan(self):
        """For every update: the sample it ends before and the (begin, end) of its micro-batches."""
        for first in range(self.start, self.length, self.batch * self.accum):
            end = min(first + self.batch * self.accum, self.length)
            yield end, [(begin, min(begin + self.batch, end)) for begin in range(first, end, self.batch)]

    def weights(self, micro: list) -> list[float]:
        whole = micro[-1][1] - micro[0][0]
        return [len(range(begin + self.rank, end, self.world)) * self.world / whole for begin, end in micro]

    def __iter__(self):
        order = torch.randperm(self.length, generator=generator(self.seed, 'order', self.epoch)).tolist()
        for _, micro in self.plan():
            for begin, end in micro:
                # A rank without a share computes along on one sample of weight 0, as its peers wait for its gradient:
                # on another one each, for --sync-bn counts them all.
                share = order[begin + self.rank:end:self.world] or [order[begin + self.rank % (end - begin)]]
                yield [(self.epoch, index) for index in share]

    def updates(self) -> int:
        return -(-(self.length - self.start) // (self.batch * self.accum))

    def __len__(self):
        return sum(len(micro) for _, micro in self.plan())


class EvalOrder(Sampler):
    """Every sample exactly once over all ranks, in strides; a rank may get none."""

    def __init__(self, samples, batch: int, rank: int, world: int):
        self.samples, self.batch, self.rank, self.world = samples, batch, rank, world

    def __iter__(self):
        mine = self.samples[self.rank::self.world]
        for begin in range(0, len(mine), self.batch):
            yield [(0, index) for index in mine[begin:begin + self.batch]]


def spread(n: int, k: int) -> list[int]:
    """k of n numbers, evenly, or all of fewer."""
    k = min(k, n)
    return [i * n // k for i in range(k)]
