"""Norms of the student that train although those of its backbone are frozen."""
import logging

import torch
from detectron2.layers import get_norm
from detectron2.modeling import ResNet
from torch import nn

from .views import bottom_up_of

KINDS = ('BN', 'SyncBN', 'GN')


def replace_last_norms(detector: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Exchange the norms of the last block of each stage that trains; returns the new ones by their names.

    Their names stay, so weights still load. BN and SyncBN become, in a plain config, frozen norms that compute the
    same. GN cannot: a plain detector would load it without a word and compute something else, so it marks the
    checkpoint with a key that is reported as unknown.
    """
    bottom_up = bottom_up_of(detector)
    if kind not in KINDS or not isinstance(bottom_up, ResNet):
        raise ValueError(f'MODEL.DISTILL.LAST_NORM is {kind!r}; it can be {", ".join(KINDS)} on a ResNet, or empty')
    convs = {conv for stage in bottom_up.stages for conv in stage[-1].children()
             if conv.weight.requires_grad and conv.norm is not None}  # deformable ones have offsets without
    replaced = {f'{name}.norm': module for name, module in detector.named_modules() if module in convs}
    for conv in replaced.values():
        conv.norm = get_norm(kind, conv.out_channels)
    if kind == 'GN':
        detector.register_buffer('needs_LAST_NORM_GN', torch.tensor(True))
        logging.getLogger(__name__).warning('LAST_NORM is GN: evaluate this student with its own config; a plain '
                                            'detector loads it, too, but computes something else')
    return {name: conv.norm for name, conv in replaced.items()}
