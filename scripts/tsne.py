"""Visualizing Data using t-SNE. van der Maaten, Hinton, JMLR 2008: exact, for a few thousand points."""
import torch
from torch import Tensor


def tsne(x: Tensor, perplexity: float = 30.0, steps: int = 750, exaggerated: int = 250, seed: int = 0) -> Tensor:
    """Points [N, D] -> [N, 2], so that neighbours stay neighbours: KL(P || Q) by gradient descent.

        P: Gaussian in x, as wide at each point as gives its neighbourhood the perplexity
        Q: Student's t in y
    """
    n = len(x)
    p = affinities(x.double(), max(min(perplexity, (n - 1) / 3), 1)).float()
    y = 1e-4 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    velocity, gains = torch.zeros_like(y), torch.ones_like(y)
    early = 12.0  # P so many times enlarged lets clusters form while they can still pass through each other
    rate = max(n / early / 4, 50)
    for step in range(steps):
        forming = step < exaggerated
        kernel = 1 / (1 + squared_distances(y)).fill_diagonal_(torch.inf)
        force = ((early if forming else 1) * p - kernel / kernel.sum()) * kernel
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        gains = torch.where(gradient * velocity < 0, gains + 0.2, gains * 0.8).clamp(min=0.01)
        velocity = (0.5 if forming else 0.8) * velocity - rate * gains * gradient
        y = y + velocity
        y = y - y.mean(0)
    return y


def affinities(x: Tensor, perplexity: float) -> Tensor:
    """The symmetric P [N, N]; each point's precision by bisection."""
    d = squared_distances(x)
    d = (d / d.mean().clamp(min=1e-12)).fill_diagonal_(torch.inf)  # of order 1: so is the precision
    d = d - d.amin(1, keepdim=True)  # the same P, without underflow
    low, high = (torch.full((len(x), 1), bound, dtype=x.dtype) for bound in (-20.0, 40.0))  # of log2 of the precision
    for _ in range(50):
        middle = (low + high) / 2
        p = (-d * 2 ** middle).softmax(1)
        narrow = torch.special.entr(p).sum(1, keepdim=True).exp() < perplexity
        low, high = torch.where(narrow, low, middle), torch.where(narrow, middle, high)
    return (p + p.T) / (2 * len(x))


def squared_distances(x: Tensor) -> Tensor:
    norms = x.square().sum(1)
    return (norms[:, None] + norms - 2 * x @ x.T).clamp(min=0)
