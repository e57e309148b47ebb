"""A Comprehensive Overhaul of Feature Distillation. Heo et al., ICCV 2019."""
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from .base import Distiller, positive, probe
from .margins import PartialL2, margins_of, measured, negative, tells_margins
from .parts import Pairing, conv_bn, stage_pairs


class OFD(Distiller):
    """The student's maps shall be the teacher's where these matter, before the last activation of a stage.

        T = max(F_t, m),   S = connector(F_s)                               m: margins of the teacher's channels
        L = weight * sum_i 2^(i-n) mean_b sum (S - T)^2 [S > T or T > 0],   i = 1..n, the deepest stage last

    F_t is averaged to the size of F_s. A margin is the mean of a channel's negative values: the teacher's norm tells
    it, and where there is none, or it was folded into a convolution, it is measured before the first epoch.

    Defaults: mdistiller, CIFAR-100, but the teacher's norms in eval mode.

    weight: factor of the loss
    teacher_bn: BatchNorms of the teacher, for all methods: by their statistics, or as published by those of the batch
    pairing: stages by depth, deepest with deepest, or by equal size
    """

    teacher_reads = ('preact',)
    teacher_kept = 'margins'
    asks_student = False

    def __init__(self, student, teacher, *, weight=1e-3, teacher_bn: Literal['eval', 'batch'] = 'eval',
                 pairing: Pairing = 'depth'):
        super().__init__()
        positive(weight=weight)
        self.weight, self.batch_statistics = weight, teacher_bn == 'batch'
        self.pairing = stage_pairs(student, teacher, pairing)
        channels_s, channels_t = ([x.shape[1] for x in probe(network).preact] for network in (student, teacher))
        self.stages = nn.ModuleList(Stage(channels_s[i], channels_t[j], teacher.feature_norms[j])
                                    for i, j in self.pairing)
        self.register_buffer('known', torch.tensor(all(stage.tells_margins for stage in self.stages)))

    def forward(self, s, t, batch):
        loss = 0.0
        for stage, (i, j) in zip(self.stages, self.pairing):
            loss = loss / 2 + stage(s.preact[i], t.preact[j])
        return {'ofd': self.weight * loss / len(s.logits)}

    @torch.no_grad()
    def start_epoch(self, epoch, pairs):
        """Measure the margins that no norm tells, unless a resumed run has brought them along."""
        if self.known:
            return
        silent = [(stage, j, stage.margins.new_zeros(2, len(stage.margins), dtype=torch.float64))
                  for stage, (_, j) in zip(self.stages, self.pairing) if not stage.tells_margins]
        for _, t in pairs():
            for _, j, sums in silent:
                sums += negative(t.preact[j])
        for stage, _, sums in silent:
            stage.margins.copy_(measured(sums))
        self.known.fill_(True)


class Stage(nn.Module):
    """A pair of maps."""

    def __init__(self, c_s: int, c_t: int, teacher_norm: nn.Module | None):
        super().__init__()
        self.connector = conv_bn(c_s, c_t)
        nn.init.kaiming_normal_(self.connector[0].weight, mode='fan_out', nonlinearity='relu')
        self.tells_margins = tells_margins(teacher_norm)
        self.register_buffer('margins', margins_of(teacher_norm) if self.tells_margins else torch.zeros(c_t))

    def forward(self, f_s, f_t):
        """[N, C_s, H, W], [N, C_t, H', W'] -> the summed loss."""
        s, t = self.connector(f_s.float()).float(), f_t.float()
        if s.shape != t.shape:
            t = F.adaptive_avg_pool2d(t, s.shape[2:])
        t = torch.maximum(t, self.margins.view(-1, 1, 1))
        return PartialL2.apply(s, t)
