"""Like What You Like: Neuron Selectivity Transfer. Huang, Wang, arXiv 1707.01219, 2017."""
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Distiller, positive
from .parts import Pairing, refuse_single_pixels, smaller, stage_pairs


class NST(Distiller):
    """The student's channels shall be distributed as the teacher's, by maximum mean discrepancy.

        L = weight * sum_i mean_b [ mean k(f_t, f_t) + mean k(f_s, f_s) - 2 mean k(f_s, f_t) ],   k(a, b) = (a . b)^2

    f is a channel's map of an image, of length 1, and the means go over all pairs of channels; of two maps the larger
    is averaged down to the smaller.

    Defaults: RepDistiller and mdistiller, CIFAR-100.

    weight: factor of the loss
    pairing: stages by depth, deepest with deepest, or by equal size
    """

    teacher_reads = ('maps',)

    def __init__(self, student, teacher, *, weight=50.0, pairing: Pairing = 'depth'):
        super().__init__()
        positive(weight=weight)
        self.weight, self.pairing = weight, stage_pairs(student, teacher, pairing)
        refuse_single_pixels(student, teacher, self.pairing)

    def forward(self, s, t, batch):
        with torch.autocast(s.logits.device.type, enabled=False):  # a difference of nearly equal products
            losses = [discrepancy(*(F.normalize(f.flatten(2), dim=2) for f in smaller(s.maps[i], t.maps[j])))
                      for i, j in self.pairing]
        return {'nst': self.weight * sum(losses)}


def discrepancy(f_s: Tensor, f_t: Tensor) -> Tensor:
    """[N, C_s, P], [N, C_t, P] -> number, through products of channels or of pixels, whichever are fewer."""
    (_, c_s, pixels), c_t = f_s.shape, f_t.shape[1]
    if pixels * (c_s + c_t) < c_s**2 + c_t**2 + c_s * c_t:
        return (f_s.mT @ f_s / c_s - f_t.mT @ f_t / c_t).square().sum((1, 2)).mean()
    return kernel(f_t, f_t) + kernel(f_s, f_s) - 2 * kernel(f_s, f_t)


def kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT).square().mean()
