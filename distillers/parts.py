"""What several methods are made of: pairs of stages, equal sizes, divergences, relations over all ranks."""
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Features
from utils import distributed
from utils.randomness import generator

from .base import evaluating, probe, probe_image

Pairing = Literal['depth', 'size']


def stage_pairs(student: nn.Module, teacher: nn.Module, by: str = 'depth') -> list[tuple[int, int]]:
    """Numbers of the stages to pair, shallow to deep.

    depth: the deepest with the deepest and so on, whatever their sizes; the shallow rest of the longer list is left out
    size: the deepest left of those whose maps are equal in size
    """
    sizes_s, sizes_t = ([x.shape[2:] for x in probe(network).maps] for network in (student, teacher))
    if by == 'depth':
        n = min(len(sizes_s), len(sizes_t))
        return [(len(sizes_s) - n + k, len(sizes_t) - n + k) for k in range(n)]
    pairs, j = [], len(sizes_t)
    for i in reversed(range(len(sizes_s))):
        equal = [k for k in range(j) if sizes_t[k] == sizes_s[i]]
        if equal:
            j = equal[-1]
            pairs.append((i, j))
    if not pairs:
        shown = ' and '.join(str([tuple(size) for size in sizes]) for sizes in (sizes_s, sizes_t))
        raise ValueError(f'no stages of student and teacher have maps of one size ({shown}): pair them by depth')
    return pairs[::-1]


def smaller(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps at the size of the smaller one, in float32; the larger is averaged down to it."""
    size = [min(a, b) for a, b in zip(f_s.shape[2:], f_t.shape[2:])]
    return tuple(f.float() if list(f.shape[2:]) == size else averaged(f.float(), size) for f in (f_s, f_t))


def averaged(f: Tensor, size: list[int]) -> Tensor:
    """adaptive_avg_pool2d, of which a GPU refuses the way back under --deterministic.

    Where the old sides are multiples of the new, a plain pool is the same; elsewhere, then, means are taken along one
    side, and then along the other.
    """
    sides = f.shape[2:]
    if all(old % new == 0 for old, new in zip(sides, size)):
        return F.avg_pool2d(f, [old // new for old, new in zip(sides, size)])
    if not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(f, size)
    for dim, (old, new) in enumerate(zip(sides, size), 2):
        spans = [(i * old // new, -(-(i + 1) * old // new)) for i in range(new)]
        f = torch.stack([f.narrow(dim, begin, end - begin).mean(dim) for begin, end in spans], dim)
    return f


def refuse_single_pixels(student: nn.Module, teacher: nn.Module, pairing: list[tuple[int, int]]):
    """For methods that bring maps to length 1 over the pixels of an image: those of one pixel all become the same."""
    maps_s, maps_t = (probe(network).maps for network in (student, teacher))
    if all(smaller(maps_s[i], maps_t[j])[0].shape[2:].numel() == 1 for i, j in pairing):
        raise ValueError('the maps that are compared have a single pixel, and the method divides it by its own length, '
                         'which leaves nothing to learn: take larger images (--image-size), networks that shrink them '
                         'less, or a method that compares the values of channels (fitnet, sp)')


def conv_bn(c_in: int, c_out: int, kernel: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(c_out))


@torch.no_grad()
def reaching(teacher: nn.Module, shown: Callable[[Features], Tensor]) -> nn.Module:
    """What a connector to a map of the teacher's ends in: a ReLU, but not where the map has values below 0.

    Asked by noise: of the probe's black image, a network without biases makes nothing but 0.
    """
    image = probe_image(teacher)
    with evaluating(teacher):
        f = shown(teacher.forward(torch.randn(image.shape, generator=generator('noise')).to(image), features=True))
    return nn.Identity() if (f < 0).any() else nn.ReLU()


class Regressor(nn.Module):
    """Student's map, teacher's map -> a guess at the teacher's, and the teacher's, at one size, in float32.

    By convolution and norm: 3x3 that halves, transposed 4x4 that doubles, or else 1x1 on maps brought to the smaller of
    their sizes. (As published, a kernel of 1 + s - t pixels brings s to t: a network for one image size, and huge.)
    identity: whether maps of one shape are left as they are
    """

    def __init__(self, shape_s: torch.Size, shape_t: torch.Size, identity: bool = False):
        super().__init__()
        (c_s, *size_s), (c_t, *size_t) = shape_s[1:], shape_t[1:]
        self.resizes, self.layers = True, nn.Sequential()
        if size_s == [2 * x for x in size_t]:
            self.layers.append(nn.Conv2d(c_s, c_t, 3, stride=2, padding=1))
        elif size_t == [2 * x for x in size_s]:
            self.layers.append(nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1))
        else:
            self.resizes = False
            if not (identity and shape_s == shape_t):
                self.layers.append(nn.Conv2d(c_s, c_t, 1))
        if self.layers:
            self.layers.append(nn.BatchNorm2d(c_t))

    def forward(self, f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
        if not self.resizes:
            f_s, f_t = smaller(f_s, f_t)
        return smaller(self.layers(f_s.float()), f_t)  # an odd size does not come out exact


def of_all_ranks(rows: Tensor, batch, local: bool) -> Tensor:
    """In float32, the rows that a relation is taken over: of the global batch, or (local) of this rank's share."""
    rows = rows.float()
    return rows if local else distributed.gather_rows(rows, batch.weight > 0)


def kl(z_t: Tensor, z_s: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * mean_b KL(p_t || p_s), p = softmax(z / T)."""
    log_p_t, log_p_s = (F.log_softmax(z.float() / temperature, dim=1) for z in (z_t, z_s))  # [N, K]
    return temperature**2 * F.kl_div(log_p_s, log_p_t, reduction='batchmean', log_target=True)


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last dimension; one of no length has no direction either: 0, and no gradient."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(length <= 1e-6, 0.0, x / length.clamp(min=1e-6))  # NaN <= 1e-6 is False: NaN stays NaN


def row_pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of corresponding rows, [R, K] x [R, K] -> [R]; as published, it fades where both hardly vary.

    A row of a, the student's, of no length has no direction: 0, and no gradient, which the fading would make 1e8.
    """
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    length = torch.linalg.vector_norm(a, dim=1)
    return torch.where(length <= 1e-6, 0.0, (a * b).sum(1) / (length * torch.linalg.vector_norm(b, dim=1) + 1e-8))


def relations(y_s: Tensor, y_t: Tensor, batch, local: bool) -> tuple[Tensor, Tensor]:
    """DIST's distances, 1 - mean correlation: of the classes of an image, and of the images of a class. [N, K] each"""
    inter = 1 - row_pearson(y_s, y_t).mean()
    y_s, y_t = (of_all_ranks(y, batch, local) for y in (y_s, y_t))
    intra = 1 - row_pearson(y_s.T, y_t.T).mean() if len(y_s) > 1 else y_s.sum() * 0.0  # one is in no relation
    return inter, intra
