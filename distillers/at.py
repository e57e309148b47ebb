"""Paying More Attention to Attention. Zagoruyko, Komodakis, ICLR 2017."""
import math

import torch.nn.functional as F

from .base import Distiller, positive
from .parts import Pairing, refuse_single_pixels, smaller, stage_pairs


class AT(Distiller):
    """The student's maps shall be strong where the teacher's are.

        L = weight * sum_i mean_{b,hw} (Q(F_s,i) - Q(F_t,i))^2,   Q(F) = a / ||a||_2,   a = mean_c |F_c|^p

    a is taken over the pixels of an image; of two maps the larger is averaged down to the smaller.

    Defaults: RepDistiller and mdistiller, CIFAR-100.

    p: power of the activations, at least 1
    weight: factor of the loss
    pairing: stages by depth, deepest with deepest, or by equal size
    """

    teacher_reads = ('maps',)

    def __init__(self, student, teacher, *, p=2.0, weight=1000.0, pairing: Pairing = 'depth'):
        super().__init__()
        positive(weight=weight)
        if not 1 <= p < math.inf:  # the slope of |F|^p at 0 is infinite, and a ReLU gives zeros
            raise ValueError(f'p is {p}, but has to be at least 1')
        self.p, self.weight, self.pairing = p, weight, stage_pairs(student, teacher, pairing)
        refuse_single_pixels(student, teacher, self.pairing)

    def forward(self, s, t, batch):
        losses = [F.mse_loss(*(self.attention(f) for f in smaller(s.maps[i], t.maps[j]))) for i, j in self.pairing]
        return {'at': self.weight * sum(losses)}

    def attention(self, f):
        return F.normalize(f.abs().pow(self.p).mean(1).flatten(1))  # [N, H * W]
