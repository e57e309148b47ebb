"""Similarity-Preserving Knowledge Distillation. Tung, Mori, ICCV 2019."""
import torch
from torch import Tensor

from .base import Distiller, positive
from .parts import of_all_ranks, stage_pairs, unit


class SP(Distiller):
    """Images that activate the teacher alike shall activate the student alike.

        L = weight / N^2 * ||G_s - G_t||^2,   G = f f' with rows of length 1,   f = the deepest maps as [N, C * H * W]

    Defaults: RepDistiller and mdistiller, CIFAR-100.

    weight: factor of the loss
    local: relations within a rank's share of the batch only, as published, instead of over the global batch
    """

    teacher_reads = ('maps',)

    def __init__(self, student, teacher, *, weight=3000.0, local=False):
        super().__init__()
        positive(weight=weight)
        self.weight, self.local = weight, local
        stage_pairs(student, teacher)  # refuses networks without maps

    def forward(self, s, t, batch):
        f_s, f_t = (of_all_ranks(x.maps[-1].flatten(1), batch, self.local) for x in (s, t))
        with torch.autocast(f_s.device.type, enabled=False):
            return {'sp': self.weight * (similarities(f_s) - similarities(f_t)).square().mean()}


def similarities(f: Tensor) -> Tensor:
    """[N, D] -> [N, N]."""
    return unit(f @ f.T)
