"""Paraphrasing Complex Network: Network Compression via Factor Transfer. Kim, Park, Kwak, NeurIPS 2018."""
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from utils import distributed

from .base import Distiller, positive, probe
from .parts import refuse_single_pixels, smaller


class FT(Distiller):
    """Match factors: the code of an auto-encoder of the teacher's last map, and a translation of the student's.

        L = weight * mean |norm(mean_c f_s^2) - norm(mean_c f_t^2)|        norm: to length 1 over the pixels of an image

    Before the first epoch the auto-encoder (the paraphraser) learns from training images, which are not augmented, in
    batches of the run's size, by SGD with momentum 0.9 and weight decay 5e-4; then it is frozen.

    Defaults: RepDistiller, CIFAR-100.

    weight: factor of the loss
    k: channels of a factor per channel of the teacher's map
    paraphraser_epochs: how often the paraphraser sees the --pair-images
    paraphraser_lr: learning rate of the paraphraser
    """

    teacher_reads = ('maps',)
    teacher_kept = 'maps'
    asks_student = False

    def __init__(self, student, teacher, *, weight=200.0, k=0.5, paraphraser_epochs=30, paraphraser_lr=0.01):
        super().__init__()
        positive(weight=weight, k=k, paraphraser_epochs=paraphraser_epochs, paraphraser_lr=paraphraser_lr)
        refuse_single_pixels(student, teacher, [(-1, -1)])
        self.weight, self.epochs, self.lr = weight, paraphraser_epochs, paraphraser_lr
        c_s, c_t = (probe(network).maps[-1].shape[1] for network in (student, teacher))
        mid = max(round(k * c_t), 1)
        self.translator = layers([c_s, c_s, mid, mid], norm=True)
        self.encoder = layers([c_t, c_t, mid, mid]).requires_grad_(False)
        self.decoder = layers([mid, mid, c_t, c_t], nn.ConvTranspose2d).requires_grad_(False)
        self.register_buffer('trained', torch.tensor(False))

    def forward(self, s, t, batch):
        f_s, f_t = smaller(self.translator(s.maps[-1]), self.encoder(t.maps[-1].float()))
        a_s, a_t = (F.normalize(f.square().mean(1).flatten(1), dim=1) for f in (f_s, f_t))  # [N, H * W]
        return {'ft': self.weight * (a_s - a_t).abs().mean()}

    def start_epoch(self, epoch, pairs):
        """Train the paraphraser, unless a resumed run has brought it along."""
        self.report = []
        if self.trained:
            return
        paraphraser = nn.Sequential(self.encoder, self.decoder).requires_grad_()
        optimizer = torch.optim.SGD(paraphraser.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)
        for number in range(1, self.epochs + 1):
            mse = self.paraphrase(paraphraser, optimizer, (t.maps[-1] for _, t in pairs()))
            if not math.isfinite(mse):
                raise ValueError(f'the paraphraser diverged: --ft-paraphraser-lr {self.lr} is too high')
            self.report.append({'pass': number, 'mse': mse})
        paraphraser.requires_grad_(False)
        self.trained.fill_(True)

    def paraphrase(self, paraphraser: nn.Module, optimizer, maps) -> float:
        """One pass; its mean squared error. Ranks step together, and some have a batch less than others."""
        parameters, seen, error = list(paraphraser.parameters()), 0, torch.zeros((), device=self.trained.device)
        while True:
            f = next(maps, None)
            count = distributed.total(torch.tensor(0 if f is None else len(f), device=error.device)).item()
            if not count:
                break
            if f is None:
                gradients = [torch.zeros_like(p) for p in parameters]
            else:
                with torch.enable_grad():
                    loss = F.mse_loss(paraphraser(f), f, reduction='sum') / f[0].numel()
                gradients = torch.autograd.grad(loss, parameters)
                error += loss.detach()
            for p, gradient in zip(parameters, gradients):
                # Numbers are summed as they lie in memory: in one order on all ranks, those without images, too.
                p.grad = distributed.total(gradient.contiguous()) / count
            optimizer.step()
            seen += count
        if not seen:
            raise ValueError('there are no images to train the paraphraser with')
        for p in parameters:
            p.grad = None
        return distributed.total(error).item() / seen


def layers(channels: list[int], conv: type[nn.Module] = nn.Conv2d, norm: bool = False) -> nn.Sequential:
    """Three convolutions, each with a leaky ReLU."""
    return nn.Sequential(*(nn.Sequential(conv(a, b, 3, padding=1, bias=not norm),
                                         *([nn.BatchNorm2d(b)] if norm else []), nn.LeakyReLU(0.1))
                           for a, b in pairwise(channels)))
