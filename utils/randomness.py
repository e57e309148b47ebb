"""Randomness as a pure function.

Every draw of a run follows from its seed and from what the draw is for: the order of an epoch from (seed, epoch), the
augmentation of a sample from (seed, epoch, index), the dropout of a step from (seed, epoch, position, rank). Nothing
depends on workers, on prefetching or on where a run was resumed, so a checkpoint needs one number instead of the state
of every generator on every rank.
"""
import hashlib
import random
from contextlib import contextmanager

import numpy as np
import torch


def derive(*key) -> int:
    """A 63-bit seed from a key of numbers and strings."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def generator(*key) -> torch.Generator:
    return torch.Generator().manual_seed(derive(*key))


@contextmanager
def seeded(*key):
    """Seed what CPU transforms draw from, and leave the process's generators as they were."""
    states = torch.default_generator.get_state(), random.getstate()
    seed = derive(*key)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed walks the accelerators: 60 times slower
    random.seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])


def seed_everything(*key):
    """Seed all generators of this process, for what is drawn while a step runs: mixing, dropout."""
    seed = derive(*key)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # which only somebody else's network or method draws from
    if torch.cuda.is_initialized():  # and not just available, which takes ten times as long to find out
        torch.cuda.manual_seed_all(seed)
