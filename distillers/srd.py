"""Knowledge Distillation via Softmax Regression Representation Learning. Yang et al., ICLR 2021 (SRRL; later SRD)."""
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Distiller, positive, probe, terms
from .parts import conv_bn, kl, reaching, relations, smaller


class SRD(Distiller):
    """Let the teacher's frozen classifier read the student's last map, translated by a connector A.

        L = feature_weight * MSE(mean_hw A(F_s), mean_hw F_t) + logit_weight * D(h_t(mean_hw A(F_s)), z_t)

    Defaults: the paper's code.

    feat: what the connector has to hit: mean: of each channel, as published; full: the whole map
    logit: D: mse; dist: DIST's two relations of raw logits; kl: KD; pmse: mse of softmaxes
    feature_weight: factor of the feature term
    logit_weight: factor of the logit term
    temperature: T, of the softmaxes of kl
    local: relations within a rank's share of the batch only, as published, instead of over the global batch
    """

    teacher_reads = ('pooled',)
    teacher_kept = 'classifier'

    def __init__(self, student, teacher, *, feat: Literal['mean', 'full'] = 'mean',
                 logit: Literal['mse', 'dist', 'kl', 'pmse'] = 'mse', feature_weight=1.0, logit_weight=1.0,
                 temperature=4.0, local=False):
        super().__init__()
        positive(temperature=temperature)
        terms(feature_weight=feature_weight, logit_weight=logit_weight)
        self.feat, self.logit, self.temperature, self.local = feat, logit, temperature, local
        self.feature_weight, self.logit_weight = feature_weight, logit_weight
        if feat == 'full':
            self.teacher_reads = ('pooled', 'head')
        self.regression = Regression(student, teacher)

    def forward(self, s, t, batch):
        f_s, pooled, z_s, z_t = self.regression(s, t)
        feature = F.mse_loss(pooled, t.pooled.float()) if self.feat == 'mean' else F.mse_loss(*smaller(f_s, t.head))
        if self.logit == 'dist':
            logit = sum(relations(z_s, z_t, batch, self.local))
        elif self.logit == 'kl':
            logit = kl(z_t, z_s, self.temperature)
        elif self.logit == 'pmse':
            logit = F.mse_loss(z_s.softmax(1), z_t.softmax(1))
        else:
            logit = F.mse_loss(z_s, z_t)
        return {'srd_feature': self.feature_weight * feature, 'srd_logit': self.logit_weight * logit}


class Regression(nn.Module):
    """A connector to the teacher's last map, and the teacher's classifier, which passes gradient on and gets none."""

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__()
        c_s, c_t = (probe(network).head.shape[1] for network in (student, teacher))
        self.connector = nn.Sequential(*conv_bn(c_s, c_t), reaching(teacher, lambda t: t.head))
        nn.init.kaiming_normal_(self.connector[0].weight, mode='fan_out', nonlinearity='relu')
        for name, value in ('weight', teacher.classifier.weight), ('bias', teacher.classifier.bias):
            self.register_buffer(name, None if value is None else value.detach().clone(), persistent=False)

    def forward(self, s, t) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The student's map in the teacher's terms, pooled, its logits, and the teacher's."""
        f_s = self.connector(s.head)
        pooled = f_s.float().mean((2, 3))
        with torch.autocast(pooled.device.type, enabled=False):  # which would round what is soon to be subtracted
            # Not t.logits: they may have been standardized.
            z_s, z_t = (F.linear(x, self.weight, self.bias) for x in (pooled, t.pooled.float()))
        return f_s, pooled, z_s, z_t
