"""A Gift from Knowledge Distillation. Yim et al., CVPR 2017."""
from itertools import pairwise

import torch
import torch.nn.functional as F

from .base import Distiller, positive, probe
from .parts import Pairing, smaller, stage_pairs


class FSP(Distiller):
    """The flow from one stage to the next shall be the teacher's.

        L = weight * sum_i mean_{b,ac} (G_s,i - G_t,i)^2,   G_i[a, c] = mean_hw F_i[a] F_{i+1}[c]

    Of two consecutive maps the larger is averaged down to the smaller. The pair of stem and first stage is left out:
    networks do not show their stems. Published as a first stage of 30 epochs: let it run with --ce-weight 0, then
    main_base.py on what comes out.

    Defaults: RepDistiller, CIFAR-100.

    weight: factor of the loss
    pairing: stages by depth, deepest with deepest, or by equal size
    """

    teacher_reads = ('maps',)

    def __init__(self, student, teacher, *, weight=1.0, pairing: Pairing = 'depth'):
        super().__init__()
        positive(weight=weight)
        self.weight, self.pairing = weight, stage_pairs(student, teacher, pairing)
        channels_s, channels_t = ([x.shape[1] for x in probe(network).maps] for network in (student, teacher))
        unequal = [(channels_s[i], channels_t[j]) for i, j in self.pairing if channels_s[i] != channels_t[j]]
        if unequal:
            raise ValueError('paired stages have {} and {} channels; FSP matrices need equal numbers: take networks of '
                             'one family and width, or a method that adapts channels (fitnet, ab)'.format(*unequal[0]))
        if len(self.pairing) < 2:
            raise ValueError('a flow goes from stage to stage, but one pair is all there is: try --fsp-pairing depth, '
                             'or take networks of more stages')

    def forward(self, s, t, batch):
        flows_s, flows_t = flows([s.maps[i] for i, _ in self.pairing]), flows([t.maps[j] for _, j in self.pairing])
        return {'fsp': self.weight * sum(map(F.mse_loss, flows_s, flows_t))}


def flows(maps):
    """FSP matrices [N, C_i, C_{i+1}] of consecutive maps."""
    with torch.autocast(maps[0].device.type, enabled=False):
        pairs = [[f.flatten(2) for f in smaller(*pair)] for pair in pairwise(maps)]
        return [a @ b.mT / a.shape[2] for a, b in pairs]
