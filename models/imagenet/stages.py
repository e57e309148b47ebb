"""Where the stages of a plain sequence of blocks end."""


def stage_ends(strides: list[int]) -> list[int]:
    """Index of the last block at each resolution, given the stride of each block; the stem's resolution is left out."""
    _stem, _first, *later = [i for i, stride in enumerate(strides) if stride > 1]
    return [start - 1 for start in later] + [len(strides) - 1]
