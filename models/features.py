"""What a network shows of itself in one forward pass."""
from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """`model(x, features=True)`. Nothing in here may be changed in place, neither by the network nor by its reader.

    `preact` and `maps` are aligned: the same stages, from coarse to deep, without the stem. `preact[i]` is the map of a
    stage before its last activation, `maps[i]` the same after it; a stage without one has the same tensor in both.
    """
    logits: Tensor  # [N, K]
    pooled: Tensor  # [N, C], what the classifier sees
    head: Tensor  # [N, C, H, W], the map that is pooled: the last of maps, or a later one
    preact: list[Tensor]
    maps: list[Tensor]
