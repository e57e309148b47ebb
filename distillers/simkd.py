"""Knowledge Distillation with the Reused Teacher Classifier. Chen et al., CVPR 2022."""
import copy
from typing import Literal

import torch.nn.functional as F
from torch import nn

from models import Features

from .base import Distiller, positive, probe
from .parts import averaged, conv_bn, reaching, smaller


class SimKD(Distiller):
    """Learn nothing but the teacher's last map, through a projector P, and predict with the teacher's classifier h_t.

        L = weight * MSE(P(F_s), F_t),   prediction = h_t(mean_hw P(F_s))

    The larger map is pooled to the smaller one, the student's ahead of P. Student, P and h_t are shipped together. Two
    maps of a student differ in MobileNetV2 and ShuffleNetV2, whose last convolution the paper's code leaves out of use.

    Defaults: the paper's code, but for student_map.

    weight: factor of the loss
    factor: P works in this many times fewer channels than the teacher's map has
    student_map: head, the map its classifier pools, or stage, its last stage's, as the paper's code has it
    """

    default_ce_weight = 0.0
    teacher_reads = ('head',)
    teacher_kept = 'classifier'

    def __init__(self, student, teacher, *, weight=1.0, factor=2, student_map: Literal['head', 'stage'] = 'head'):
        super().__init__()
        positive(weight=weight, factor=factor)
        self.weight, self.student_map = weight, student_map
        (_, c_s, *self.size_s), (_, c_t, *self.size_t) = self.f_s(probe(student)).shape, probe(teacher).head.shape
        mid = max(c_t // factor, 1)
        self.projector = nn.Sequential(*conv_bn(c_s, mid), nn.ReLU(), *conv_bn(mid, mid, 3), nn.ReLU(),
                                       *conv_bn(mid, c_t), reaching(teacher, lambda t: t.head))
        self.classifier = copy.deepcopy(teacher.classifier).requires_grad_(False)
        # Out of use: as a trainable one it would be weakened by weight decay and waited for by DDP.
        student.classifier.requires_grad_(False)

    def f_s(self, s):
        return s.head if self.student_map == 'head' else s.maps[-1]

    def adapt(self, s):
        # The teacher is not there when the student is evaluated: its size is the one it had in proportion.
        f_s = self.f_s(s)
        size = [min(h, max(1, round(h * h_t / h_s))) for h, h_s, h_t in zip(f_s.shape[2:], self.size_s, self.size_t)]
        f_s = self.projector(f_s if size == list(f_s.shape[2:]) else averaged(f_s, size))
        pooled = f_s.mean((2, 3))
        return Features(self.classifier(pooled), pooled, f_s, s.preact, s.maps)  # torch 2.8 cannot compile _replace

    def forward(self, s, t, batch):
        return {'simkd': self.weight * F.mse_loss(*smaller(s.head, t.head))}
