"""Matching Guided Distillation. Yue, Deng, Zhou, ECCV 2020 (not Masked Generative Distillation, also called MGD).

Stage by stage, every student channel is given g = tc // sc teacher channels of its own, so that paired channels look
alike (the flow), and learns the reduction of them to one map.
"""
import math
import time
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from utils import distributed

from .base import Distiller, positive, probe
from .margins import PartialL2, margins_of, measured, negative, tells_margins

try:
    from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment
    from ortools.graph.python.min_cost_flow import SimpleMinCostFlow
except ModuleNotFoundError:  # which nothing else needs
    SimpleLinearSumAssignment = SimpleMinCostFlow = None

BATCHED_FROM = 400  # pixels of a map from which on one product per image is faster than one for the batch
RESOLUTION = 10**8  # the solver wants integers: this many steps from the smallest cost to the largest


class MGD(Distiller):
    """Match the channels, then their maps before the last activation of a stage.

        S = norm(F_s),  T = max(reduce(F_t[flow]), m)                       m: margins of the teacher's channels
        L = sum_i factor_i / loss_factor * mean_b sum (S - T)^2 [S > T or T > 0]

    Stages are paired from the deepest on, as long as the maps have equal sizes; the shallow rest is ignored.

    Defaults: the paper's code, ImageNet, but remainders are assigned.

    reducer: g channels to one: amp: largest absolute value; sp: largest; rd: random; sm: none, match one to one
    update_freq: epochs between two updates of the flow
    loss_factor: divisor of the loss; 0: the published 10,000 for images of 224 x 224, in proportion for others
    stage_factors: of the paired stages, deepest last (default: 1 for the deepest, half as much for each before it)
    remainder: teacher channels that do not divide: assign the best g of all, or cut the last ones off as published
    norm: of the student's maps: by the batch, or (detection, whose batches are small) in 32 groups of channels
    """

    teacher_reads = ('preact',)
    teacher_kept = 'margins'

    def __init__(self, student, teacher, *, reducer: Literal['amp', 'sp', 'rd', 'sm'] = 'amp', update_freq=1,
                 loss_factor=0.0, stage_factors: tuple[float, ...] = (),
                 remainder: Literal['assign', 'cut'] = 'assign', norm: Literal['bn', 'gn'] = 'bn'):
        super().__init__()
        positive(update_freq=update_freq)
        if SimpleMinCostFlow is None:
            raise ValueError('it matches channels by OR-Tools, which is not installed: pip install ortools')
        if not 0 <= loss_factor < math.inf:
            raise ValueError(f'loss_factor is {loss_factor}, but has to be at least 0, and finite')
        if stage_factors and not (all(0 <= factor < math.inf for factor in stage_factors) and any(stage_factors)):
            raise ValueError(f'stage_factors {" ".join(map(str, stage_factors))}: each has to be 0 or more, one above')
        self.reduce, self.update_freq = REDUCERS[reducer], update_freq
        self.loss_factor = loss_factor or 1e4 * (getattr(student, 'image_size', 224) / 224) ** 2  # it sums over pixels

        shapes_s, shapes_t = ([x.shape[1:] for x in probe(network).preact] for network in (student, teacher))
        self.pairing = pair(shapes_s, shapes_t)
        self.stages = nn.ModuleList()
        for i, j in self.pairing:
            sc, tc = shapes_s[i][0], shapes_t[j][0]
            g = 1 if reducer == 'sm' else tc // sc
            candidates = g * sc if remainder == 'cut' and reducer != 'sm' else tc
            self.stages.append(Stage(sc, tc, g, candidates, teacher.feature_norms[j], norm))
        n = len(self.stages)
        self.stage_factors = stage_factors or [0.5 ** (n - 1 - i) for i in range(n)]
        if len(self.stage_factors) != n:
            raise ValueError(f'{len(self.stage_factors)} stage_factors for {n} pairs of stages')

        self.register_buffer('updated', torch.tensor(0))  # the epoch that the flow was last solved for

    def forward(self, s, t, batch):
        losses = [factor * stage(s.preact[i], t.preact[j], self.reduce)
                  for stage, (i, j), factor in zip(self.stages, self.pairing, self.stage_factors)]
        return {'mgd': sum(losses) / (len(s.logits) * self.loss_factor)}

    @torch.no_grad()
    def start_epoch(self, epoch, pairs):
        """Solve the flow anew where it is due and a resumed run has not brought it along."""
        self.report, last = [], self.updated.item()
        if last == epoch or (last and (epoch - 1) % self.update_freq):
            return
        tracks = [Track(stage) for stage in self.stages]
        count = 0
        for s, t in pairs():
            count += len(s.logits)
            for track, (i, j) in zip(tracks, self.pairing):
                track.add(s.preact[i], t.preact[j])
        count = distributed.total(self.updated.new_tensor(count)).item()
        if not count:
            raise ValueError('there are no images to match the channels by')
        self.report = [{'stage': i} | stage.update(track, count, first=not last)
                       for stage, track, (i, _) in zip(self.stages, tracks, self.pairing)]
        self.updated.fill_(epoch)


def pair(shapes_s, shapes_t) -> list[tuple[int, int]]:
    """Numbers of the stages to pair, shallow to deep, from [C, H, W] of all of them."""
    pairs = []
    for back in range(1, min(len(shapes_s), len(shapes_t)) + 1):
        (sc, *size_s), (tc, *size_t) = shapes_s[-back], shapes_t[-back]
        if size_s != size_t:
            break
        if sc > tc:
            raise ValueError(f'the student has {sc} channels where the teacher has {tc}; every student channel needs '
                             'a teacher channel of its own: take a wider teacher or a narrower student')
        pairs.append((len(shapes_s) - back, len(shapes_t) - back))
    if not pairs:
        shown = ' and '.join(str([tuple(shape) for shape in shapes]) for shapes in (shapes_s, shapes_t))
        raise ValueError('the deepest maps of student and teacher differ in size: take networks that shrink the image '
                         f'equally (channels, height and width of the stages: {shown})')
    return pairs[::-1]


class Stage(nn.Module):
    """A pair of maps. flow[k, c] is the k-th of the g teacher channels of student channel c, in ascending order."""

    def __init__(self, sc: int, tc: int, g: int, candidates: int, teacher_norm: nn.Module | None, norm: str):
        super().__init__()
        self.candidates = candidates  # only the first of the teacher's channels, where the remainder is cut
        if norm == 'gn' and sc % 32:
            raise ValueError(f'norm gn has 32 groups of channels, a stage of the student {sc} channels: take bn')
        self.norm = nn.BatchNorm2d(sc) if norm == 'bn' else nn.GroupNorm(32, sc)
        self.tells_margins = tells_margins(teacher_norm)
        self.register_buffer('margins', margins_of(teacher_norm) if self.tells_margins else torch.zeros(tc))
        self.register_buffer('flow', torch.arange(g * sc).view(g, sc))

    def forward(self, f_s: Tensor, f_t: Tensor, reduce) -> Tensor:
        """[N, sc, H, W], [N, tc, H, W] -> the summed loss."""
        s = self.norm(f_s.float())
        groups = (select(f_t, members) for members in self.flow)  # g times [N, sc, H, W], one at a time
        t, m = reduce(groups, self.margins[self.flow])
        return PartialL2.apply(s, torch.maximum(t.float(), m.view(-1, 1, 1)))

    def update(self, track: 'Track', count: int, first: bool) -> dict:
        """Take the flow, and margins that no norm tells, from what was tracked; say what came of it."""
        cost = 2 - 2 * distributed.total(track.cosines) / count
        if not cost.isfinite().all():
            raise ValueError('there is nothing to match: features of the student or the teacher are not finite')
        if not self.tells_margins:
            self.margins.copy_(measured(track.negative))

        g, sc = self.flow.shape
        start = time.perf_counter()
        flow = distributed.from_main(lambda: match(cost[:, :self.candidates].cpu(), g)).to(cost.device)
        seconds = time.perf_counter() - start

        owner, owner_before = torch.full((2, cost.shape[1]), -1, device=cost.device)
        owner[flow] = channels = torch.arange(sc, device=cost.device).expand(g, sc)
        owner_before[self.flow] = channels
        changed = None if first else (owner != owner_before)[flow].double().mean().item()
        self.flow.copy_(flow)
        return {'shape': [sc, cost.shape[1]], 'cost': cost[channels, flow].mean().item(), 'changed': changed,
                'seconds': seconds}


class Track:
    """Sums over the images of one update: cosines of all channels, and the teacher's negative values."""

    def __init__(self, stage: Stage):
        sc, tc = stage.flow.shape[1], len(stage.margins)
        self.cosines = stage.margins.new_zeros(sc, tc, dtype=torch.float64)  # so the order of the sum hardly matters
        self.negative = None if stage.tells_margins else stage.margins.new_zeros(2, tc, dtype=torch.float64)

    def add(self, f_s: Tensor, f_t: Tensor):
        with torch.autocast(f_s.device.type, enabled=False):
            self.cosines += cosines(f_s.float(), f_t.float())
        if self.negative is not None:
            self.negative += negative(f_t)


@torch.no_grad()
def cosines(f_s: Tensor, f_t: Tensor) -> Tensor:
    """[N, sc, H, W], [N, tc, H, W] -> [sc, tc], cosines between maps summed over images.

    One product for the batch reads less than one per image, but has to have large maps copied into its layout first.
    """
    s, t = f_s.flatten(2), f_t.flatten(2)
    scale_s, scale_t = (1 / x.norm(dim=2, keepdim=True).clamp(min=1e-12) for x in (s, t))  # [N, C, 1]
    if s.shape[2] >= BATCHED_FROM:
        products = (s @ t.mT).mul_(scale_t.mT)  # [N, sc, tc]
        return (scale_s.permute(1, 2, 0) @ products.transpose(0, 1))[:, 0]
    s, t = (torch.mul(x.transpose(0, 1), scale.transpose(0, 1), out=x.new_empty(x.shape[1], *x.shape[::2])).flatten(1)
            for x, scale in ((s, scale_s), (t, scale_t)))  # [C, N * H * W], scaled and laid out in one pass
    return s @ t.T


def match(cost: Tensor, g: int) -> Tensor:
    """The cheapest flow: g teacher channels for every student channel, none twice. [sc, tc] -> [g, sc]

    Where one or two for each use all teacher channels up, an assignment finds them in less time than a flow does.
    """
    sc, tc = cost.shape
    above = (cost - cost.min()).double().numpy()
    units = np.rint(above * (RESOLUTION / max(above.max(), 1e-12))).astype(np.int64)
    chosen = (assignment if g <= 2 and g * sc == tc else min_cost_flow)(units, g)
    return torch.from_numpy(np.sort(chosen, axis=0))


def assignment(units: np.ndarray, g: int) -> np.ndarray:
    """g copies of every student channel and the teacher channels, one to one."""
    sc, tc = units.shape
    teachers = np.arange(tc, dtype=np.int32)
    solver = SimpleLinearSumAssignment()
    solver.add_arcs_with_cost(teachers.repeat(tc), np.tile(teachers, tc), np.tile(units, (g, 1)).ravel())
    solved(solver, sc, tc)
    return np.array([solver.right_mate(copy) for copy in range(tc)]).reshape(g, sc)


def min_cost_flow(units: np.ndarray, g: int) -> np.ndarray:
    """From every student channel, g units strong, through teacher channels that let one unit pass, to a sink."""
    sc, tc = units.shape
    students, teachers = np.arange(sc, dtype=np.int32), np.arange(sc, sc + tc, dtype=np.int32)
    sink = np.full(tc, sc + tc, dtype=np.int32)
    solver = SimpleMinCostFlow()
    arcs = solver.add_arcs_with_capacity_and_unit_cost(
        students.repeat(tc), np.tile(teachers, sc), np.ones(sc * tc, np.int64), units.ravel())
    solver.add_arcs_with_capacity_and_unit_cost(teachers, sink, np.ones(tc, np.int64), np.zeros(tc, np.int64))
    solver.set_nodes_supplies(np.append(students, sink[:1]), np.append(np.full(sc, g), -g * sc))
    solved(solver, sc, tc)
    return solver.flows(arcs).reshape(sc, tc).nonzero()[1].reshape(sc, g).T


def solved(solver, sc: int, tc: int):
    status = solver.solve()
    if status != solver.OPTIMAL:
        raise RuntimeError(f'the solver found no matching of {sc} to {tc} channels: {status.name}')


# Reducers: g maps [N, sc, H, W], one after the other, and their margins [g, sc] -> one map and its margins [sc]

def absolute_max_pooling(groups, margins):
    t = next(groups)
    for u in groups:
        t = t.lerp(u, u.abs().gt_(t.abs()))  # of weights 0 and 1; a CPU takes 3 to 6 times as long for torch.where
    return t, margins.mean(0)


def simple_pooling(groups, margins):
    t = next(groups)
    for u in groups:
        t = torch.maximum(t, u)
    return t, margins.amax(0)


def random_drop(groups, margins):
    """A member per image, channel and pixel; for the margin, one per channel."""
    t = next(groups)
    choice = torch.randint(len(margins), t.shape, dtype=torch.int16, device=t.device)
    for k, u in enumerate(groups, 1):
        t = torch.where(choice == k, u, t)
    return t, margins.gather(0, torch.randint(len(margins), margins[:1].shape, device=t.device))[0]


def sparse_matching(groups, margins):
    return next(groups), margins[0]


REDUCERS = {'amp': absolute_max_pooling, 'sp': simple_pooling, 'rd': random_drop, 'sm': sparse_matching}


def select(f: Tensor, channels: Tensor) -> Tensor:
    """f[:, channels] in the layout of f; index_select is slow across channels_last, and its result is contiguous."""
    if f.is_contiguous():
        return f.index_select(1, channels)
    f = f.permute(0, 2, 3, 1)
    return f.gather(3, channels.expand(*f.shape[:3], -1)).permute(0, 3, 1, 2)
