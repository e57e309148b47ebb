"""Decoupled Knowledge Distillation. Zhao et al., CVPR 2022."""
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import WarmingUp, positive, terms


class DKD(WarmingUp):
    """Weigh apart how sure the teacher is of the target, and how it ranks the other classes.

        TCKD = T^2 * KL(b_t || b_s),   b = (p[y], 1 - p[y]),         p = softmax(z / T)
        NCKD = T^2 * KL(q_t || q_s),   q = p without p[y], rescaled to a sum of 1
        L    = min(epoch / warmup, 1) * mean_b (alpha * TCKD + beta * NCKD)

    Where labels are mixed, the target is the class with the largest share. Of two classes there is but one other, and
    NCKD is 0.

    Defaults: mdistiller, resnet32x4 to resnet8x4.

    alpha: factor of TCKD, the target's part
    beta: factor of NCKD, the other classes' part
    temperature: T, of all softmaxes
    warmup: epochs over which the loss grows to its full weight
    """

    teacher_reads = ('logits',)

    def __init__(self, student, teacher, *, alpha=1.0, beta=8.0, temperature=4.0, warmup=20):
        super().__init__(warmup)
        positive(temperature=temperature)
        terms(alpha=alpha, beta=beta)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, s, t, batch):
        tckd, nckd, _ = decoupled(s.logits, t.logits, batch.target, self.temperature)
        return {'dkd_tckd': self.warm * self.alpha * tckd.mean(), 'dkd_nckd': self.warm * self.beta * nckd.mean()}


def decoupled(z_s: Tensor, z_t: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """TCKD [N] and NCKD [N] of each sample, and the teacher's probabilities of the target and of all others [N, 2]."""
    y = target.argmax(1) if target.dim() == 2 else target
    (b_s, q_s), (b_t, q_t) = (log_shares(z, y, temperature) for z in (z_s, z_t))
    tckd, nckd = (temperature**2 * F.kl_div(s, t, reduction='none', log_target=True).sum(1)
                  for s, t in ((b_s, b_t), (q_s, q_t)))
    return tckd, nckd, b_t.exp()


def log_shares(z: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the target and of all others [N, 2], and of each other among the others [N, K - 1]."""
    u, y = z.float() / temperature, y[:, None]
    others = torch.arange(u.shape[1] - 1, device=y.device)
    others = u.gather(1, others + (others >= y))  # the target is left out, not masked: no number is low enough for that
    binary = torch.cat((u.gather(1, y), others.logsumexp(1, keepdim=True)), 1)
    return F.log_softmax(binary, dim=1), F.log_softmax(others, dim=1)
