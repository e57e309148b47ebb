"""Distilling the Knowledge in a Neural Network. Hinton, Vinyals, Dean, NIPS workshop 2014."""
from .base import Distiller, positive
from .parts import kl


class KD(Distiller):
    """The student's softened predictions shall be the teacher's.

        L = weight * T^2 * mean_b KL(p_t || p_s),   p = softmax(z / T)

    Defaults: RepDistiller and mdistiller, CIFAR-100.

    temperature: T, of both softmaxes
    weight: factor of the loss
    """

    teacher_reads = ('logits',)
    default_ce_weight = 0.1

    def __init__(self, student, teacher, *, temperature=4.0, weight=0.9):
        super().__init__()
        positive(temperature=temperature, weight=weight)
        self.temperature, self.weight = temperature, weight

    def forward(self, s, t, batch):
        return {'kd': self.weight * kl(t.logits, s.logits, self.temperature)}
