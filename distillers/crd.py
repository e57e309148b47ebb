"""Contrastive Representation Distillation. Tian, Krishnan, Isola, ICLR 2020."""
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import distributed

from .base import Distiller, positive, probe
from .parts import unit

EPS = 1e-7


class CRD(Distiller):
    """Tell a sample's own embedding in the other network's memory from embeddings of other classes.

        L    = weight * (l(e_s, M_t) + l(e_t, M_s)),   e = linear embedding of pooled, trained, at length 1
        l    = -mean_b [log (P+ / (P+ + c)) + sum_{K negatives} log (c / (P- + c))],   c = K / N
        P    = exp(<e, m> / tau) / Z,   Z = N * mean exp(<e, m> / tau) of the first batch
        m_i <- momentum * m_i + (1 - momentum) * e_i, at length 1, after use

    The memories hold an embedding of each of the N training samples: 51 MB for CIFAR, 1.3 GB for ImageNet. Products
    are taken with all of them, and those of the drawn are picked. That needs 130 MB for 64 samples of CIFAR, where to
    pick first would need 1 GB, and 3 GB for 256 of ImageNet. The embedding of mixed images
    (--mixup, --cutmix) counts as that of the one with the larger share.

    Defaults: RepDistiller and mdistiller, CIFAR-100.

    negatives: K, drawn with replacement from the samples of other classes
    tau: temperature of the similarities
    momentum: share of the old in the new memory
    feat_dim: length of the embeddings
    mode: what the positive is; exact: the sample itself; relax: any of its class
    weight: factor of the loss
    """

    teacher_reads = ('pooled',)

    def __init__(self, student, teacher, *, negatives=16384, tau=0.07, momentum=0.5, feat_dim=128,
                 mode: Literal['exact', 'relax'] = 'exact', weight=0.8):
        super().__init__()
        positive(negatives=negatives, tau=tau, feat_dim=feat_dim, weight=weight)
        if not 0 <= momentum < 1:
            raise ValueError(f'momentum is {momentum}, but has to be at least 0 and below 1')
        self.negatives, self.tau, self.momentum, self.mode, self.weight = negatives, tau, momentum, mode, weight
        self.embed_s, self.embed_t = (nn.Linear(probe(network).pooled.shape[1], feat_dim)
                                      for network in (student, teacher))
        self.register_buffer('z', torch.zeros(2))  # of the student's and the teacher's embeddings; 0: not fixed yet
        self.register_buffer('memory_s', None)  # [N, feat_dim], as soon as N is known
        self.register_buffer('memory_t', None)

    def know(self, targets):
        size = targets.bincount()
        if (size > 0).sum() < 2:
            raise ValueError('CRD takes its negatives from other classes, but all training samples are of one')
        n, d = len(targets), self.embed_s.out_features
        self.memory_s, self.memory_t = (  # drawn on the CPU: the same whatever the device
            ((2 * torch.rand(n, d) - 1) * math.sqrt(3 / d)).to(targets.device) for _ in range(2))
        order = targets.argsort(stable=True)  # one class after the other, each so long, from there on; all of it twice
        for name, value in {'targets': targets, 'order': torch.cat([order, order]), 'size': size.int(),
                            'first': (size.cumsum(0) - size).int()}.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, s, t, batch):
        if self.memory_s is None:
            raise RuntimeError('CRD needs the classes of all training samples before its first step: call know()')
        index = self.largest(batch)
        drawn = self.draw(index)
        with torch.autocast(s.pooled.device.type, enabled=False):
            e_s, e_t = unit(self.embed_s(s.pooled.float())), unit(self.embed_t(t.pooled.float()))
            # Divided, memories are copies: they will have changed by the backward pass. (A clone does not do: Inductor
            # of torch 2.8 to 2.14 leaves it out.)
            x = torch.stack([(e @ (memory / self.tau).T).gather(1, drawn)
                             for e, memory in ((e_s, self.memory_t), (e_t, self.memory_s))])
        self.fix_z(x.detach(), counts=batch.weight > 0)
        log_p = x - self.z.log().view(2, 1, 1)  # [2, B, 1 + K]
        c = self.negatives / len(self.targets)
        # In these forms a sum of K tiny terms, not a difference of large numbers.
        loss = (F.softplus(math.log(c + EPS) - log_p[..., 0])
                + torch.log1p((log_p[..., 1:].exp() + EPS) / c).sum(2)).mean(1).sum()
        self.remember(e_s, e_t, index, batch.weight > 0)
        return {'crd': self.weight * loss}

    def largest(self, batch) -> Tensor:
        """[B], the number of each sample; of mixed ones, each with the one before it, that of the larger share."""
        if batch.target.ndim == 1:
            return batch.index
        own = (batch.target.argmax(1) == self.targets[batch.index]).all()  # a batch is mixed in one proportion
        return torch.where(own, batch.index, batch.index.roll(1))

    def draw(self, index: Tensor) -> Tensor:
        """[B] -> [B, 1 + K], for each sample the numbers of its positive and its negatives."""
        own = self.targets[index, None]
        first, size = self.first[own], self.size[own]
        place = uniform((len(index), 1 + self.negatives), len(self.targets) - size).add_(first + size)  # after its own
        drawn = self.order.index_select(0, place.flatten()).view_as(place)
        drawn[:, :1] = index[:, None] if self.mode == 'exact' else self.order[first + uniform(own.shape, size)]
        return drawn

    @torch.no_grad()
    def fix_z(self, x: Tensor, counts: bool):
        """Take Z from the first batch, of all ranks."""
        sums = torch.stack([*x.exp().sum((1, 2)), x.new_full((), x[0].numel())]) * counts
        *sums, number = distributed.total(sums)
        self.z.copy_(torch.where(self.z > 0, self.z, len(self.targets) * torch.stack(sums) / number))

    @torch.no_grad()
    def remember(self, e_s: Tensor, e_t: Tensor, index: Tensor, counts: bool):
        index, e_s, e_t = (distributed.gather_rows(x, counts) for x in (index, e_s, e_t))
        for memory, e in ((self.memory_s, e_s), (self.memory_t, e_t)):
            memory[index] = unit(self.momentum * memory[index] + (1 - self.momentum) * e)


def uniform(shape, below: Tensor) -> Tensor:
    """Random int32, each below a bound of its own; even to within bound / 2^31."""
    drawn = torch.empty(shape, dtype=torch.int32, device=below.device).random_()
    return drawn.copy_(drawn.double().mul_(below.double() / 2**31))  # exact; a remainder takes three times as long
