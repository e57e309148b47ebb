"""Knowledge Distillation with the Reused Teacher Classifier. Chen et al., CVPR 2022."""
import copy

import torch.nn.functional as F
from torch import nn

from models import Features

from .base import Distiller, positive, probe
from .parts import averaged, conv_bn, reaching, smaller


class SimKD(Distiller):
    """Learn nothing but the teacher's last map, through a projector P, and predict with the teacher's classifier h_t.

        L = weight * MSE(P(F_s), F_t),   prediction = h_t(mean_hw P(F_s))

    The larger map is pooled to the smaller one, the student's ahead of P. Student, P and h_t are shipped together.

    Defaults: the paper's code.

    weight: factor of the loss
    factor: P works in this many times fewer channels than the teacher's map has
    """

    default_ce_weight = 0.0
    teacher_reads = ('head',)
    teacher_kept = 'classifier'

    def __init__(self, student, teacher, *, weight=1.0, factor=2):
        super().__init__()
        positive(weight=weight, factor=factor)
        self.weight = weight
        (_, c_s, *self.size_s), (_, c_t, *self.size_t) = (probe(network).head.shape for network in (student, teacher))
        mid = max(c_t // factor, 1)
        self.projector = nn.Sequential(*conv_bn(c_s, mid), nn.ReLU(), *conv_bn(mid, mid, 3), nn.ReLU(),
                                       *conv_bn(mid, c_t), reaching(teacher, lambda t: t.head))
        self.classifier = copy.deepcopy(teacher.classifier).requires_grad_(False)
        # Out of use: as a trainable one it would be weakened by weight decay and waited for by DDP.
        student.classifier.requires_grad_(False)

    def adapt(self, s):
        # The teacher is not there when the student is evaluated: its size is the one it had in proportion.
        size = [min(h, max(1, round(h * h_t / h_s))) for h, h_s, h_t in zip(s.head.shape[2:], self.size_s, self.size_t)]
        f_s = s.head if size == list(s.head.shape[2:]) else averaged(s.head, size)
        f_s = self.projector(f_s)
        pooled = f_s.mean((2, 3))
        return Features(self.classifier(pooled), pooled, f_s, s.preact, s.maps)  # torch 2.8 cannot compile _replace

    def forward(self, s, t, batch):
        return {'simkd': self.weight * F.mse_loss(*smaller(s.head, t.head))}
