"""Relational Knowledge Distillation. Park et al., CVPR 2019."""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .base import Distiller, terms
from .parts import of_all_ranks, unit

ANCHORS_AT_ONCE = 64  # their differences to all samples, [64, N, C], and angles, [64, N, N], exist at a time


class RKD(Distiller):
    """Distances of pairs and angles of triples of pooled features shall be the teacher's.

        L = distance * mean_ij h(d_s, d_t) + angle * mean_ijk h(a_s, a_t),   h: Huber loss
        d = |f_i - f_j| / mean over i != j,   a = cos of the angle at f_i between f_j and f_k

    Defaults: RepDistiller and mdistiller, CIFAR-100.

    distance: factor of the distances
    angle: factor of the angles; 0 spares their N^3 products
    local: relations within a rank's share of the batch only, as published, instead of over the global batch
    """

    teacher_reads = ('pooled',)

    def __init__(self, student, teacher, *, distance=25.0, angle=50.0, local=False):
        super().__init__()
        terms(distance=distance, angle=angle)
        self.distance, self.angle, self.local = distance, angle, local

    def forward(self, s, t, batch):
        f_s, f_t = (of_all_ranks(x.pooled, batch, self.local) for x in (s, t))
        with torch.autocast(f_s.device.type, enabled=False):
            losses = {'rkd_distance': self.distance * F.smooth_l1_loss(distances(f_s), distances(f_t))}
            if self.angle:
                parts = zip(f_s.split(ANCHORS_AT_ONCE), f_t.split(ANCHORS_AT_ONCE))
                summed = sum(checkpoint(angle_loss, f_s, f_t, *anchors, use_reentrant=False, preserve_rng_state=False)
                             for anchors in parts)
                losses['rkd_angle'] = self.angle * summed / len(f_s)**3
        return losses


def distances(f: Tensor) -> Tensor:
    """[N, C] -> [N, N], mean 1. Taken from the differences: equal samples are at exactly 0, and get no gradient."""
    d = torch.cdist(f, f, compute_mode='donot_use_mm_for_euclid_dist')
    mean = d.sum() / max(len(f) * (len(f) - 1), 1)
    return d / mean.clamp(min=1e-6)


def angle_loss(f_s: Tensor, f_t: Tensor, anchors_s: Tensor, anchors_t: Tensor) -> Tensor:
    """The sum over all triples at some anchors."""
    return F.smooth_l1_loss(angles(f_s, anchors_s), angles(f_t, anchors_t), reduction='sum')


def angles(f: Tensor, anchors: Tensor) -> Tensor:
    """[N, C], [A, C] -> [A, N, N], cosines."""
    e = unit(f - anchors[:, None])
    return e @ e.mT
