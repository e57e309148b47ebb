"""Self-supervised Knowledge Distillation Using Singular Value Decomposition. Lee, Kim, Song, ECCV 2018."""
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Distiller, positive, probe
from .parts import Pairing, stage_pairs

EXTRA = 3  # singular vectors of the student's to choose from beyond those of the teacher's


class KDSVD(Distiller):
    """The leading singular vectors of consecutive stages shall relate as the teacher's do.

        R_i = exp(-(v_i[:, None] - v_{i-1}[None, :])^2 / 8)
        L   = weight * sum_i mean_b sum (R_s,i - R_t,i)^2

    v holds the k right singular vectors of an image's map, times the teacher's singular values (scaled to length 1).
    Of the student's k + 3, each of the teacher's is met by the one of largest |cosine|, with the sign that fits; the
    teacher's sign, arbitrary too, is that its largest entry is positive.

    Defaults: RepDistiller, CIFAR-100.

    k: number of singular vectors, as far as the smallest map has so many
    form: matrix of a map: channel [H * W, C], for equal channels; width [C * H, W], for maps of equal width
    weight: factor of the loss
    pairing: stages by depth, deepest with deepest, or by equal size
    """

    teacher_reads = ('maps',)

    def __init__(self, student, teacher, *, k=1, form: Literal['channel', 'width'] = 'channel', weight=1.0,
                 pairing: Pairing = 'depth'):
        super().__init__()
        positive(k=k, weight=weight)
        self.k, self.form, self.weight = k, form, weight
        self.pairing = stage_pairs(student, teacher, pairing)
        if len(self.pairing) < 2:
            raise ValueError('consecutive stages are related, but one pair is all there is: try --kdsvd-pairing depth, '
                             'or take networks of more stages')
        axis, unit, other = {'channel': (1, 'channels', 'width, for maps of equal width'),
                             'width': (3, 'columns', 'channel, for equal numbers of channels')}[form]
        lengths_s, lengths_t = ([x.shape[axis] for x in probe(network).maps] for network in (student, teacher))
        for i, j in self.pairing:
            if lengths_s[i] != lengths_t[j]:
                raise ValueError(f'vectors of {lengths_s[i]} and {lengths_t[j]} {unit} do not compare: take another '
                                 f'--kdsvd-form ({other}) or another --kdsvd-pairing')

    def forward(self, s, t, batch):
        matrices = [(self.matrix(s.maps[i]), self.matrix(t.maps[j])) for i, j in self.pairing]
        k = min(self.k, *(min(x.shape[1:]) for stage in matrices for x in stage))  # small maps have fewer vectors
        with torch.autocast(s.logits.device.type, enabled=False):
            vectors = [aligned(x_s, x_t, k) for x_s, x_t in matrices]
        losses = [(relation(v_s, before_s) - relation(v_t, before_t)).square().sum()
                  for (before_s, before_t), (v_s, v_t) in pairwise(vectors)]
        return {'kdsvd': self.weight * sum(losses) / len(s.logits)}

    def matrix(self, f: Tensor) -> Tensor:
        return f.flatten(2).mT if self.form == 'channel' else f.flatten(1, 2)


def aligned(x_s: Tensor, x_t: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Matrices of a stage -> scaled vectors [N, D, k] of both."""
    (v_t, values), (v_s, _) = right_vectors(x_t, k), right_vectors(x_s, k + EXTRA)
    v_t = v_t * sign(v_t.gather(1, v_t.abs().argmax(1, keepdim=True)))
    cosines = v_s.detach().mT @ v_t  # [N, k + EXTRA, k]
    chosen = cosines.abs().argmax(1, keepdim=True)  # [N, 1, k]
    v_s = v_s.gather(2, chosen.expand(-1, v_s.shape[1], -1)) * sign(cosines.gather(1, chosen))
    scale = F.normalize(values, dim=1)[:, None]
    return v_s * scale, v_t * scale


def relation(v: Tensor, before: Tensor) -> Tensor:
    """[N, D, k], [N, D', k] -> [N, D, D', k]."""
    return (-(v[:, :, None] - before[:, None]).square() / 8).exp()


def sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0)


@torch.compiler.disable  # the solver has a look at its results on the host, which no CUDA graph can hold
def right_vectors(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[N, M, D] -> right singular vectors [N, D, k] of the k largest singular values, and these, [N, k].

    The gradient is that of an eigenvector of x^T x to the eigenvalue l_i,

        dv_i = sum_j v_j (v_j^T d(x^T x) v_i) / (l_i - l_j),   where l_j = 0 for all v_j beyond the decomposition,

    without the j whose l_j is (almost) l_i: these vectors are arbitrary. The solver's own gradient divides by the gaps
    between all vectors, asked for or not, and is not finite where an image leaves some eight channels silent.
    """
    x = x.float()
    scale = x.detach().abs().amax((1, 2), keepdim=True).nan_to_num(1, 1).clamp(min=1e-30)
    x = x / scale  # the vectors are the same, and squares do not overflow
    with torch.no_grad():
        squares, rows = eigenvectors(x.nan_to_num(0, 0, 0))  # the solver refuses what is not finite
        v = rows[:, :k].mT
        gaps = squares[:, None, :k] - torch.cat([squares, torch.zeros_like(squares[:, :1])], 1)[..., None]
        inverse = torch.where(gaps.abs() > 1e-6 * squares[:, :1, None], 1 / gaps, 0)  # [N, n + 1, k]
        inside, beyond = inverse[:, :-1], inverse[:, -1:]
    moved = x.mT @ (x @ v)  # x^T x v
    step = moved * beyond + rows.mT @ ((inside - beyond) * (rows @ moved))
    return v + (step - step.detach()), squares[:, :k].sqrt() * scale[:, 0]


def eigenvectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [N, n] of x^T x, largest first, and eigenvectors [N, n, D], n = min(M, D): a third of svd's time."""
    wide = x.shape[1] < x.shape[2]
    values, vectors = torch.linalg.eigh(x @ x.mT if wide else x.mT @ x)
    rows = vectors.flip(2).mT
    return values.flip(1).clamp(min=0), F.normalize(rows @ x, dim=2) if wide else rows
