"""Learning Deep Representations with Probabilistic Knowledge Transfer. Passalis, Tefas, ECCV 2018."""
import torch
from torch import Tensor

from .base import Distiller, positive
from .parts import of_all_ranks, unit

EPS = 1e-7


class PKT(Distiller):
    """For every image, the distribution of its neighbours among the batch shall be the teacher's.

        L = weight * mean_ij P_t log (P_t / P_s),   P = (1 + cos(f_i, f_j)) / 2 with rows of sum 1,   f = pooled

    Defaults: RepDistiller and mdistiller, CIFAR-100.

    weight: factor of the loss
    local: relations within a rank's share of the batch only, as published, instead of over the global batch
    """

    teacher_reads = ('pooled',)

    def __init__(self, student, teacher, *, weight=30000.0, local=False):
        super().__init__()
        positive(weight=weight)
        self.weight, self.local = weight, local

    def forward(self, s, t, batch):
        f_s, f_t = (of_all_ranks(x.pooled, batch, self.local) for x in (s, t))
        with torch.autocast(f_s.device.type, enabled=False):
            p_s, p_t = probabilities(f_s), probabilities(f_t)
        return {'pkt': self.weight * (p_t * ((p_t + EPS) / (p_s + EPS)).log()).mean()}


def probabilities(f: Tensor) -> Tensor:
    """[N, C] -> [N, N]."""
    f = unit(f)
    kernel = (1 + f @ f.T) / 2
    return kernel / kernel.sum(1, keepdim=True)
