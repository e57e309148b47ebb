"""Knowledge Distillation from A Stronger Teacher. Huang et al., NeurIPS 2022."""
from .base import Distiller, positive, terms
from .parts import relations


class DIST(Distiller):
    """Match relations instead of values.

        inter = 1 - mean_i corr(y_s[i, :], y_t[i, :])          classes of one image
        intra = 1 - mean_j corr(y_s[:, j], y_t[:, j])          images of one class
        L     = T^2 * (beta * inter + gamma * intra),   y = softmax(z / T)

    Defaults: the paper's code, CIFAR-100.

    beta: factor of the inter-class relation
    gamma: factor of the intra-class relation
    temperature: T, of both softmaxes
    scale_t2: the factor T^2, which the released code has and the paper has not
    local: relations within a rank's share of the batch only, as published, instead of over the global batch
    """

    teacher_reads = ('logits',)

    def __init__(self, student, teacher, *, beta=2.0, gamma=2.0, temperature=4.0, scale_t2=True, local=False):
        super().__init__()
        positive(temperature=temperature)
        terms(beta=beta, gamma=gamma)
        scale = temperature**2 if scale_t2 else 1.0
        self.beta, self.gamma, self.temperature, self.local = scale * beta, scale * gamma, temperature, local

    def forward(self, s, t, batch):
        y_s, y_t = ((x.logits.float() / self.temperature).softmax(1) for x in (s, t))  # [N, K]
        inter, intra = relations(y_s, y_t, batch, self.local)
        return {'dist_inter': self.beta * inter, 'dist_intra': self.gamma * intra}
