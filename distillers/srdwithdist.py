"""SRD whose logits match by DIST's relations. chitraz/KnowledgeDistillationForModelCompression (code, no paper)."""
import torch.nn.functional as F

from .base import Distiller, terms
from .parts import relations, smaller
from .srd import Regression


class SRDwithDIST(Distiller):
    """SRD of whole maps, with DIST's relations of raw logits: no softmax, no temperature.

        L = alpha * MSE(A(F_s), F_t) + inter * (1 - mean_i corr(z'[i, :], z_t[i, :]))      classes of one image
                                     + intra * (1 - mean_j corr(z'[:, j], z_t[:, j]))      images of one class

    z' = h_t(mean_hw A(F_s)) with a connector A and the teacher's frozen classifier h_t.

    Defaults: its code, WRN-40-4 to WRN-16-4.

    alpha: factor of the maps' distance
    inter: factor of the inter-class relation
    intra: factor of the intra-class relation
    local: relations within a rank's share of the batch only, as published, instead of over the global batch
    """

    teacher_reads = ('pooled', 'head')
    teacher_kept = 'classifier'

    def __init__(self, student, teacher, *, alpha=1.0, inter=10.0, intra=10.0, local=False):
        super().__init__()
        terms(alpha=alpha, inter=inter, intra=intra)
        self.alpha, self.inter, self.intra, self.local = alpha, inter, intra, local
        self.regression = Regression(student, teacher)

    def forward(self, s, t, batch):
        f_s, _, z_s, z_t = self.regression(s, t)
        inter, intra = relations(z_s, z_t, batch, self.local)
        return {'srdwithdist_feature': self.alpha * F.mse_loss(*smaller(f_s, t.head)),
                'srdwithdist_inter': self.inter * inter, 'srdwithdist_intra': self.intra * intra}
