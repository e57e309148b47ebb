"""FitNets: Hints for Thin Deep Nets. Romero et al., ICLR 2015."""
import torch.nn.functional as F

from .base import Distiller, positive, probe
from .parts import Pairing, Regressor, reaching, stage_pairs


class FitNet(Distiller):
    """A map of the student's shall tell the teacher's, the hint.

        L = weight * mean (relu(reg(F_s)) - F_t)^2,   reg: convolution and norm

    The mean goes over all elements. The convolution brings a map that is twice or half as large to the teacher's size;
    from any other size it is 1x1, after the larger of both is averaged down to the smaller. Where the hint has values
    below 0, there is no relu. For the paper's two steps, let this run with --ce-weight 0, and then another method on
    the student that comes out (--student-resume).

    Defaults: RepDistiller and mdistiller, CIFAR-100.

    stage: the student's stage that gets a hint, 1 is the first after the stem
    stage_t: the teacher's stage that is the hint; 0: the one that the pairing tells
    weight: factor of the loss
    pairing: stages by depth, deepest with deepest, or by equal size
    """

    teacher_reads = ('maps',)

    def __init__(self, student, teacher, *, stage=2, stage_t=0, weight=100.0, pairing: Pairing = 'depth'):
        super().__init__()
        positive(weight=weight)
        maps_s, maps_t = probe(student).maps, probe(teacher).maps
        pairs = dict(stage_pairs(student, teacher, pairing))
        if stage_t:
            pairs = dict.fromkeys(range(len(maps_s)), stage_t - 1)
        if not 0 <= stage_t <= len(maps_t):
            raise ValueError(f'the teacher has {len(maps_t)} stages, and no stage {stage_t} (--fitnet-stage-t)')
        if stage - 1 not in pairs:
            raise ValueError(f'stage {stage} of the student has no partner for a hint; these have one: '
                             f'{", ".join(str(i + 1) for i in pairs)}')
        self.weight, self.stage_s, self.stage_t = weight, stage - 1, pairs[stage - 1]
        self.pairing = [(self.stage_s, self.stage_t)]
        self.regressor = Regressor(maps_s[self.stage_s].shape, maps_t[self.stage_t].shape)
        self.activation = reaching(teacher, lambda t: t.maps[self.stage_t])

    def forward(self, s, t, batch):
        guess, hint = self.regressor(s.maps[self.stage_s], t.maps[self.stage_t])
        return {'fitnet': self.weight * F.mse_loss(self.activation(guess), hint)}
