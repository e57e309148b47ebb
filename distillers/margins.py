"""Margins of a teacher's channels, how silent each is when it is silent, and the loss of MGD and OFD under them."""
import math

import torch
from torch import Tensor, nn

from utils import distributed


class PartialL2(torch.autograd.Function):
    """sum (s - t)^2 [s > t or t > 0]: where the teacher is silent, the student need not imitate but be silent too.

    By hand, as autograd would keep two maps, not one, until the backward pass. It has no second derivative.
    """

    @staticmethod
    def forward(ctx, s, t):
        missing = torch.where((s <= t) & (t <= 0), s, t).sub_(s)  # NaN compares as False, so it gets into t - s
        ctx.save_for_backward(missing)
        return missing.square().sum()

    @staticmethod
    def backward(ctx, grad):
        missing, = ctx.saved_tensors
        return missing * (-2 * grad), None


def tells_margins(norm: nn.Module | None) -> bool:
    """Statistics that never moved belong to a norm folded into its convolution: its bias and weight mean nothing."""
    mean, var, weight = (getattr(norm, name, None) for name in ('running_mean', 'running_var', 'weight'))
    if mean is None or weight is None:
        return False
    return bool((mean != 0).any() or ((var - 1).abs() > 1e-4).any())


@torch.no_grad()
def margins_of(norm: nn.Module) -> Tensor:
    """E[x | x < 0] of every channel x ~ N(bias, weight^2), and -3 sigma where hardly any x is negative."""
    mu, sigma = norm.bias.double(), norm.weight.double().abs().clamp(min=1e-12)
    z = mu / (sigma * math.sqrt(2))
    mean = mu - sigma * math.sqrt(2 / math.pi) / torch.special.erfcx(z)
    return torch.where(torch.special.erfc(z) / 2 > 1e-3, mean, -3 * sigma).float()


def negative(f: Tensor) -> Tensor:
    """[N, C, H, W] -> the sum and the number of the negative values of each channel, [2, C]."""
    below = f.float().clamp(max=0)
    return torch.stack([below.sum((0, 2, 3)), (below < 0).sum((0, 2, 3))])


def measured(sums: Tensor) -> Tensor:
    """Margins of what `negative` gave of all images, on all ranks."""
    below, number = distributed.total(sums)
    return below / number.clamp(min=1)
