"""Correlation Congruence for Knowledge Distillation. Peng et al., ICCV 2019."""
import torch
from torch import nn

from .base import Distiller, positive, probe
from .parts import of_all_ranks


class CC(Distiller):
    """Where an image's embeddings differ, the next image's shall not.

        L = weight * mean_{b < N} sum_d D_b D_{b+1},   D = |e_s - e_t|,   e = linear embedding of pooled, trained

    The products of neighbours are what the published benchmarks run; the paper compares kernels of all pairs.

    Defaults: RepDistiller, CIFAR-100.

    feat_dim: length of the embeddings
    weight: factor of the loss
    local: relations within a rank's share of the batch only, as published, instead of over the global batch
    """

    teacher_reads = ('pooled',)

    def __init__(self, student, teacher, *, feat_dim=128, weight=0.02, local=False):
        super().__init__()
        positive(feat_dim=feat_dim, weight=weight)
        self.weight, self.local = weight, local
        self.embed_s, self.embed_t = (nn.Linear(probe(network).pooled.shape[1], feat_dim)
                                      for network in (student, teacher))

    def forward(self, s, t, batch):
        with torch.autocast(s.pooled.device.type, enabled=False):
            difference = (self.embed_s(s.pooled.float()) - self.embed_t(t.pooled.float())).abs()
        difference = of_all_ranks(difference, batch, self.local)  # [N, feat_dim]
        neighbours = max(len(difference) - 1, 1)
        return {'cc': self.weight * (difference[:-1] * difference[1:]).sum() / neighbours}
