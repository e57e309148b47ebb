"""Monotonic Rank Distillation with Kendall correlation. Code release without a paper, 2024."""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .base import Distiller, positive, terms, z_scores
from .parts import of_all_ranks, row_pearson

PAIRS_AT_ONCE = 2**24  # what a temporary of the Kendall term holds


class MRKD(Distiller):
    """The student shall order classes and samples as the teacher does; scale and shift of its logits are free.

        P(s, t) = 1 - mean_rows corr(s, t)
        K(s, t) = 1 - mean_rows mean_{i<j} tanh(beta / 2 * (n(t)_i - n(t)_j) * (n(s)_i - n(s)_j))
        L       = pearson * (P(z_s, z_t) + P(z_s', z_t')) + kendall * (K(z_s, z_t) + K(z_s', z_t'))

    n: z-scores of a row. A row is a sample in z, a class in its transpose z'. K of equal logits is not 0, as tanh
    stays below 1.

    Defaults: its code, MRKD.py.

    pearson: factor of the linear correlation P
    kendall: factor of the rank correlation K
    beta: slope of the smooth sign of a pair
    top: share of each row that forms pairs, those that the teacher ranks highest
    local: relations within a rank's share of the batch only, as published, instead of over the global batch
    """

    teacher_reads = ('logits',)

    def __init__(self, student, teacher, *, pearson=16.0, kendall=32.0, beta=0.5, top=1.0, local=False):
        super().__init__()
        positive(beta=beta, top=top)
        terms(pearson=pearson, kendall=kendall)
        if top > 1:
            raise ValueError(f'top is {top}, but a share is at most 1')
        self.pearson, self.kendall, self.beta, self.top, self.local = pearson, kendall, beta, top, local

    def forward(self, s, t, batch):
        directions = [(s.logits.float(), t.logits.float())]
        z_s, z_t = (of_all_ranks(x.logits, batch, self.local) for x in (s, t))
        if len(z_s) > 1:  # one sample is in no relation
            directions.append((z_s.T, z_t.T))
        return {'mrkd_pearson': self.pearson * sum(1 - row_pearson(*rows).mean() for rows in directions),
                'mrkd_kendall': self.kendall * sum(1 - self.concordance(*rows).mean() for rows in directions)}

    def concordance(self, s: Tensor, t: Tensor) -> Tensor:
        s, t = z_scores(s), z_scores(t)
        if self.top < 1:
            t, kept = t.topk(max(int(self.top * t.shape[1]), 2), dim=1)  # at least one pair
            s = s.gather(1, kept)
        return Concordance.apply(s, t, self.beta)


class Concordance(torch.autograd.Function):
    """[R, K], [R, K] -> [R], the mean over all pairs of tanh(beta / 2 * (t_i - t_j) * (s_i - s_j)).

    The R * K * K differences never exist at once: the gradient is a mean over pairs, too, and is taken on the way.
    """

    @staticmethod
    def forward(ctx, s, t, beta):
        k = s.shape[1]
        value, grad = s.new_empty(len(s)), torch.empty_like(s)
        step = max(PAIRS_AT_ONCE // k**2, 1)
        for start in range(0, len(s), step):
            rows = slice(start, start + step)
            d_t = t[rows, :, None] - t[rows, None]  # [r, K, K]
            smooth = (s[rows, :, None] - s[rows, None]).mul_(d_t).mul_(beta / 2).tanh_()
            value[rows] = smooth.sum((1, 2))
            grad[rows] = smooth.square_().neg_().add_(1).mul_(d_t).sum(2)
        pairs = k * (k - 1)  # each counts twice
        ctx.save_for_backward(grad * (beta / pairs))
        return value / pairs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad[:, None] * ctx.saved_tensors[0], None, None
