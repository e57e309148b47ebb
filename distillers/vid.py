"""Variational Information Distillation for Knowledge Transfer. Ahn et al., CVPR 2019."""
import math

import torch
import torch.nn.functional as F
from torch import nn

from .base import Distiller, positive, probe
from .parts import Pairing, smaller, stage_pairs

LEAST = 1e-5  # variance


class VID(Distiller):
    """The student's maps shall tell much about the teacher's: of these a normal distribution is predicted.

        L = weight * sum_i mean 1/2 [ (reg(F_s) - F_t)^2 / v + log v ],   v = softplus(rho) + 1e-5

    The mean goes over all elements, v is trained, one per teacher channel; of two maps the larger is averaged down to
    the smaller, before the regressor.

    Defaults: RepDistiller and mdistiller, CIFAR-100.

    variance: v at the start
    weight: factor of the loss
    pairing: stages by depth, deepest with deepest, or by equal size
    """

    teacher_reads = ('maps',)

    def __init__(self, student, teacher, *, variance=5.0, weight=1.0, pairing: Pairing = 'depth'):
        super().__init__()
        positive(weight=weight)
        if not LEAST < variance < math.inf:
            raise ValueError(f'variance is {variance}, but has to be above {LEAST}, and finite')
        self.weight, self.pairing = weight, stage_pairs(student, teacher, pairing)
        channels_s, channels_t = ([x.shape[1] for x in probe(network).maps] for network in (student, teacher))
        self.stages = nn.ModuleList(Stage(channels_s[i], channels_t[j], variance) for i, j in self.pairing)

    def forward(self, s, t, batch):
        losses = [stage(*smaller(s.maps[i], t.maps[j])) for stage, (i, j) in zip(self.stages, self.pairing)]
        return {'vid': self.weight * sum(losses)}


class Stage(nn.Module):
    """A pair of maps: the regressor gives the means of the teacher's, rho its variances."""

    def __init__(self, c_s: int, c_t: int, variance: float):
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv2d(c_s, c_t, 1, bias=False), nn.ReLU(),
            nn.Conv2d(c_t, c_t, 1, bias=False), nn.ReLU(),
            nn.Conv2d(c_t, c_t, 1, bias=False))
        v = variance - LEAST
        self.rho = nn.Parameter(torch.full((c_t, 1, 1), v + math.log(-math.expm1(-v))))

    def forward(self, f_s, f_t):
        v = F.softplus(self.rho) + LEAST
        return 0.5 * ((self.regressor(f_s).float() - f_t).square() / v + v.log()).mean()
