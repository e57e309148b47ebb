"""Distilling Knowledge via Knowledge Review. Chen et al., CVPR 2021."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import WarmingUp, positive, probe
from .parts import averaged, conv_bn, stage_pairs


class ReviewKD(WarmingUp):
    """Each level of the student, fused with all deeper ones, shall be the teacher's.

        r_i = ABF_i(f_s_i, r_(i+1)),   L = weight * min(epoch / warmup, 1) * sum_i HCL(conv_i(r_i), f_t_i)
        HCL = (MSE + sum_j 2^-j * MSE of both pooled to l x l) / (1 + sum_j 2^-j),   l = 4, 2, 1 where the map is larger

    Levels are the stages, paired from the deepest on, and beyond them the pooled vector as a map of one pixel. The
    teacher's are taken before the last activation of a stage. Published weights are 0.6 to 8, by pair.

    Defaults: the paper's code, resnet32x4 to resnet8x4.

    weight: factor of the loss
    warmup: epochs over which the loss grows to its full weight
    max_mid: most channels a level is fused in; as many as the student's pooled vector has if those are fewer
    student_preact: take the student's maps before the last activation, too (ImageNet), instead of after it (CIFAR)
    """

    teacher_reads = ('pooled', 'preact')

    def __init__(self, student, teacher, *, weight=5.0, warmup=20, max_mid=512, student_preact=False):
        super().__init__(warmup)
        positive(weight=weight, max_mid=max_mid)
        self.weight, self.student_preact = weight, student_preact

        self.pairing = stage_pairs(student, teacher)
        c_s, c_t = ([f.shape[1] for f in levels] for levels in self.levels(probe(student), probe(teacher)))
        mid = min(max_mid, c_s[-1])
        self.fusions = nn.ModuleList(ABF(a, mid, b, deepest=i == len(c_s) - 1)
                                     for i, (a, b) in enumerate(zip(c_s, c_t)))

    def levels(self, s, t) -> tuple[list[Tensor], list[Tensor]]:
        """Shallow to deep; a detector has no pooled vector."""
        levels_s = [(s.preact if self.student_preact else s.maps)[i] for i, _ in self.pairing]
        levels_t = [t.preact[j] for _, j in self.pairing]
        if s.pooled is not None:
            levels_s, levels_t = ([*f, x.pooled[:, :, None, None]] for f, x in ((levels_s, s), (levels_t, t)))
        return levels_s, levels_t

    def forward(self, s, t, batch):
        levels_s, levels_t = self.levels(s, t)
        if levels_s[-1][:, 0].numel() == 1:  # the norm of one pixel of one image has no variance: let it count twice
            levels_s, levels_t = ([f.expand(2, -1, -1, -1) for f in levels] for levels in (levels_s, levels_t))
        loss, review = 0.0, None
        for fuse, f_s, f_t in reversed(list(zip(self.fusions, levels_s, levels_t))):
            review, out = fuse(f_s, review, f_t.shape[2:])
            loss = loss + hcl(out.float(), f_t.float())
        return {'reviewkd': self.weight * self.warm * loss}


class ABF(nn.Module):
    """Attention based fusion of a level with what is known of the deeper ones, at the size of the teacher's."""

    def __init__(self, c_in: int, mid: int, c_out: int, deepest: bool):
        super().__init__()
        self.enter, self.leave = conv_bn(c_in, mid), conv_bn(mid, c_out, 3)
        self.attention = None if deepest else nn.Conv2d(2 * mid, 2, 1)
        for conv, _ in (self.enter, self.leave):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, f: Tensor, deeper: Tensor | None, size) -> tuple[Tensor, Tensor]:
        f = self.enter(f)
        if self.attention is not None:
            deeper = F.interpolate(deeper, f.shape[2:])
            a, b = self.attention(torch.cat((f, deeper), 1)).sigmoid().split(1, dim=1)  # [N, 1, H, W]
            f = f * a + deeper * b
        review = f if f.shape[2:] == size else F.interpolate(f, size)
        return review, self.leave(review)


def hcl(a: Tensor, b: Tensor) -> Tensor:
    """Hierarchical context loss: mean squared differences of the maps and of coarser and coarser means."""
    loss, total, share = F.mse_loss(a, b), 1.0, 1.0
    for size in (4, 2, 1):
        if size < min(a.shape[2:]):
            share /= 2
            total += share
            loss = loss + share * F.mse_loss(*(averaged(f, [size, size]) for f in (a, b)))
    return loss / total
