"""Knowledge Transfer via Distillation of Activation Boundaries. Heo et al., AAAI 2019."""
from torch import nn

from .base import Distiller, positive, probe
from .parts import Pairing, Regressor, stage_pairs


class AB(Distiller):
    """The student's neurons shall be active where the teacher's are, by a margin.

        l = (S + margin)^2 [S > -margin and F_t <= 0] + (S - margin)^2 [S <= margin and F_t > 0],   S = reg(F_s)
        L = weight * 0.003 * sum_i 2^(i-n) mean_b sum l_i,   i = 1..n, the deepest stage last

    Maps are those before the last activation of a stage. reg, a convolution and norm as in fitnet, is left out where
    the shapes are equal. Published as a first stage of 30 epochs: let it run with --ce-weight 0, then main_base.py on
    what comes out.

    Defaults: RepDistiller, CIFAR-100.

    margin: how far from 0 a neuron has to be
    weight: factor of the loss
    pairing: stages by depth, deepest with deepest, or by equal size
    """

    teacher_reads = ('preact',)

    def __init__(self, student, teacher, *, margin=1.0, weight=1.0, pairing: Pairing = 'depth'):
        super().__init__()
        positive(margin=margin, weight=weight)
        self.margin, self.weight, self.pairing = margin, weight, stage_pairs(student, teacher, pairing)
        shapes_s, shapes_t = ([x.shape for x in probe(network).preact] for network in (student, teacher))
        self.regressors = nn.ModuleList(Regressor(shapes_s[i], shapes_t[j], identity=True) for i, j in self.pairing)

    def forward(self, s, t, batch):
        loss = 0.0
        for regressor, (i, j) in zip(self.regressors, self.pairing):
            loss = loss / 2 + self.boundary(*regressor(s.preact[i], t.preact[j]))
        return {'ab': self.weight * 0.003 * loss / len(s.logits)}

    def boundary(self, f_s, f_t):
        side = 2.0 * (f_t > 0) - 1 + 0 * f_t  # NaN > 0 is False, so 0 * NaN has to keep it NaN
        return (self.margin - side * f_s).clamp(min=0).square().sum()
