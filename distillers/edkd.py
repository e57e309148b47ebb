"""Exponential Dynamic Knowledge Distillation. Code release without a paper, 2024."""
from typing import Literal

from .base import WarmingUp, positive
from .dkd import decoupled
from .parts import of_all_ranks


class EDKD(WarmingUp):
    """DKD whose weight of the other classes grows with how clear-cut the teacher is about the target.

        L = min(epoch / warmup, 1) * mean_b (TCKD + beta * NCKD),   beta = beta_max * exp(m - 1)
        m = max(p_t[y], 1 - p_t[y]),   p_t = softmax(z_t / T)

    Defaults: its code, but beta by sample.

    beta: factor of the other classes' part, each sample's own or, as released, the mean over the batch
    beta_max: the largest factor of the other classes' part
    confidence: m, the larger of the probabilities for and against the target, or that of the target itself
    temperature: T, of all softmaxes
    warmup: epochs over which the loss grows to its full weight
    """

    teacher_reads = ('logits',)

    def __init__(self, student, teacher, *, beta: Literal['sample', 'batch'] = 'sample', beta_max=8.0,
                 confidence: Literal['max', 'target'] = 'max', temperature=4.0, warmup=20):
        super().__init__(warmup)
        positive(beta_max=beta_max, temperature=temperature)
        self.per_sample, self.confidence = beta == 'sample', confidence
        self.beta_max, self.temperature = beta_max, temperature

    def forward(self, s, t, batch):
        tckd, nckd, p_t = decoupled(s.logits, t.logits, batch.target, self.temperature)
        m = p_t.amax(1) if self.confidence == 'max' else p_t[:, 0]
        beta = self.beta_max * (m - 1).exp()
        if not self.per_sample:
            beta = of_all_ranks(beta, batch, local=False).mean()
        return {'edkd_tckd': self.warm * tckd.mean(), 'edkd_nckd': self.warm * (beta * nckd).mean()}
