"""Matching Guided Distillation against slow formulations of its parts."""
import copy
import math
import subprocess
import sys
from itertools import permutations

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, assert_same, environment
from torch import nn

from distillers import mgd
from distillers.mgd import MGD, REDUCERS, PartialL2, cosines, margins_of, match
from models import Features

EPS = 1e-5  # of BatchNorm


class Net(nn.Module):
    """A network of stages that halve the map, each a convolution, a norm and a ReLU."""

    def __init__(self, *channels, norm=nn.BatchNorm2d):
        super().__init__()
        self.feature_channels = list(channels)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip([3, *channels], channels))
        self.norms = nn.ModuleList(norm(c) for c in channels)
        self.feature_norms = list(self.norms)

    def forward(self, x, features=True):
        preact, maps = [], []
        for conv, norm in zip(self.convs, self.norms):
            preact.append(norm(conv(x)))
            x = preact[-1].relu()
            maps.append(x)
        pooled = x.mean((2, 3))
        return Features(pooled, pooled, x, preact, maps)


def trained(*channels, seed=0, **how):
    """A Net with statistics and affine parameters that are not those of a fresh norm, in eval mode."""
    torch.manual_seed(seed)
    net = Net(*channels, **how)
    for norm in net.norms:
        if isinstance(norm, nn.BatchNorm2d):
            for values, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -1, 1), (norm.running_mean, -0.2, 0.2),
                                      (norm.running_var, 0.1, 0.4)):
                nn.init.uniform_(values, low, high)
    return net.eval()


def images(n=4, size=32, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pairs_of(student, teacher, *batches):
    """What a distiller gets to see of the networks."""
    def pairs():
        with torch.no_grad():
            for x in batches:
                yield student(x), teacher(x)
    return pairs


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Margins

def norm_with(weight, bias):
    norm = nn.BatchNorm2d(len(weight))
    norm.weight.data, norm.bias.data = torch.tensor(weight), torch.tensor(bias)
    return norm


def test_margins_are_means_of_the_negative_part():
    weight, bias = [1.0, 0.5, 1.0, -2.0, 0.3], [0.0, -3.0, 2.0, 0.7, 0.5]
    for margin, sigma, mu in zip(margins_of(norm_with(weight, bias)).tolist(), weight, bias):
        sigma, mass, moment = abs(sigma), 0.0, 0.0
        for step in range(20000):  # midpoints between -10 sigma and zero
            x = min(mu, 0) - 10 * sigma + (step + 0.5) / 20000 * (10 * sigma - min(mu, 0))
            density = math.exp(-0.5 * ((x - mu) / sigma) ** 2)
            mass, moment = mass + density, moment + x * density
        assert margin == pytest.approx(moment / mass, abs=1e-4)


def test_margins_of_rarely_negative_and_of_dead_channels():
    margins = margins_of(norm_with([0.5, 0.0, 0.0, 0.0, -1.0], [5.0, 1.0, -1.0, 0.0, 4.0]))
    torch.testing.assert_close(margins, torch.tensor([-1.5, 0.0, -1.0, 0.0, -3.0]), atol=1e-6, rtol=0)


def without_weights(channels):
    norm = nn.BatchNorm2d(channels, affine=False)
    norm.running_mean.fill_(0.1)
    return norm


@pytest.mark.parametrize('norm', [lambda c: nn.GroupNorm(1, c), nn.BatchNorm2d, without_weights],
                         ids=['no statistics', 'folded', 'no weights'])
def test_margins_that_no_norm_tells_are_measured(norm):
    student, teacher = trained(2, 3), Net(4, 6, norm=norm).eval()
    method = MGD(student, teacher)
    x = images(6)
    method.start_epoch(1, pairs_of(student, teacher, x[:4], x[4:]))
    for stage, f_t in zip(method.stages, teacher(x).preact):
        for c, margin in enumerate(stage.margins.tolist()):
            values = [v for v in f_t[:, c].flatten().tolist() if v < 0]
            assert margin == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_margins_are_those_of_the_teachers_weights_and_survive_an_update():
    student, teacher = trained(2, 3), trained(4, 6)
    method = MGD(student, teacher)
    method.start_epoch(1, pairs_of(student, teacher, images()))
    for stage, norm in zip(method.stages, teacher.norms):
        assert torch.equal(stage.margins, margins_of(norm))


# Reducers

def reduced(name, f_t, margins):
    return REDUCERS[name](iter(f_t), margins)


def test_reducers_against_loops():
    g, n, sc, h, w = 3, 2, 4, 3, 2
    f_t, margins = random(g, n, sc, h, w), random(g, sc, seed=1)
    picks = {'amp': lambda values: max(values, key=abs), 'sp': max}
    for name, margin in (('amp', lambda m: sum(m) / g), ('sp', max)):
        t, m = reduced(name, f_t, margins)
        for place in torch.cartesian_prod(*map(torch.arange, (n, sc, h, w))).tolist():
            assert t[tuple(place)] == picks[name]([group[tuple(place)].item() for group in f_t])
        assert m.tolist() == pytest.approx([margin(margins[:, c].tolist()) for c in range(sc)])


def test_absolute_max_keeps_the_sign_and_the_first_of_equals():
    f_t = torch.tensor([[-3.0, 2.0], [2.0, -2.0]]).view(2, 1, 1, 1, 2)
    assert reduced('amp', f_t, torch.zeros(2, 1))[0].flatten().tolist() == [-3.0, 2.0]


def test_random_drop_draws_every_member_equally_often_for_every_pixel():
    torch.manual_seed(0)
    t, margins = reduced('rd', torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 4, 5, 20, 20),
                         torch.arange(3.0)[:, None].expand(3, 900))
    for drawn in (t.flatten(), margins):
        shares = torch.bincount(drawn.long(), minlength=3) / len(drawn)
        torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.06, rtol=0)
    again, _ = reduced('rd', torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 4, 5, 20, 20), torch.zeros(3, 900))
    assert 0.2 < (again == t).double().mean() < 0.5


# Loss

def test_partial_l2_against_loops():
    s, t = random(200), random(200, seed=1)
    s.requires_grad_()
    loss = PartialL2.apply(s, t)
    loss.backward()
    counted = [a > b or b > 0 for a, b in zip(s.tolist(), t.tolist())]
    assert loss.item() == pytest.approx(sum((a - b) ** 2 for a, b, c in zip(s.tolist(), t.tolist(), counted) if c))
    expected = [2 * (a - b) * c for a, b, c in zip(s.tolist(), t.tolist(), counted)]
    assert s.grad.tolist() == pytest.approx(expected)


def slow_loss(method, s, t, factors, margin):
    """In float64, by stages, groups and the three cases of the paper; amp and sp."""
    total = 0.0
    for stage, f_s, f_t, factor in zip(method.stages, s.preact, t.preact, factors):
        f_s, f_t, flow = f_s.detach().double(), f_t.double(), stage.flow
        norm = (f_s - f_s.mean((0, 2, 3), keepdim=True)) / (f_s.var((0, 2, 3), False, keepdim=True) + EPS).sqrt()
        for c in range(f_s.shape[1]):
            members = torch.stack([f_t[:, j] for j in flow[:, c].tolist()])  # [g, N, H, W]
            margins = stage.margins[flow[:, c]].double()
            picked = members.abs().argmax(0) if margin == 'mean' else members.argmax(0)
            wanted = members.gather(0, picked[None])[0].clamp(min=(margins.mean() if margin == 'mean'
                                                                   else margins.max()).item())
            for a, b in zip(norm[:, c].flatten().tolist(), wanted.flatten().tolist()):
                total += factor * (a - b) ** 2 * (a > b or b > 0)
    return total / (len(s.logits) * 100)


@pytest.mark.parametrize('reducer, margin', [('amp', 'mean'), ('sp', 'max')])
@pytest.mark.parametrize('stage_factors, factors', [((), (0.25, 0.5, 1)), ((3, 0.1, 2), (3, 0.1, 2))])
def test_whole_loss_against_loops(reducer, margin, stage_factors, factors):
    student, teacher = trained(2, 3, 4), trained(5, 9, 8, seed=1)
    method = MGD(student, teacher, reducer=reducer, loss_factor=100, stage_factors=stage_factors)
    method.start_epoch(1, pairs_of(student, teacher, images()))
    x = images(3, seed=5)  # another batch size than before
    s, t = student(x), teacher(x)
    assert method(s, t, None)['mgd'].item() == pytest.approx(slow_loss(method, s, t, factors, margin), rel=1e-5)


@pytest.mark.parametrize('size, divisor', [(None, 1e4), (224, 1e4), (112, 2500), (448, 4e4)])
def test_divisor_grows_with_the_pixels_that_are_summed(size, divisor):
    student, teacher, x = trained(2, 3), trained(5, 9, seed=1), images()
    expected = MGD(student, teacher, loss_factor=divisor)(student(x), teacher(x), None)['mgd'].item()
    if size:
        student.image_size = teacher.image_size = size
    for method in MGD(student, teacher), MGD(student, teacher, loss_factor=divisor):
        assert method(student(x), teacher(x), None)['mgd'].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('reducer', REDUCERS)
def test_gradient_reaches_the_student_and_the_norms(reducer):
    student, teacher = trained(2, 3).train(), trained(5, 9, seed=1)
    method = MGD(student, teacher, reducer=reducer)
    method.start_epoch(1, pairs_of(student, teacher, images()))
    method(student(images()), teacher(images()), None)['mgd'].backward()
    for name, parameter in [*student.named_parameters(), *method.named_parameters()]:
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert all(p.grad is None for p in teacher.parameters())
    assert method.state_dict()['stages.0.norm.num_batches_tracked'] == 1


def test_autocast_leaves_the_loss_in_float32():
    student, teacher = trained(2, 3).train(), trained(5, 9, seed=1)
    method = MGD(student, teacher).eval()
    method.start_epoch(1, pairs_of(student, teacher, images()))
    s, t = student(images()), teacher(images())
    exact = method(s, t, None)['mgd']
    half = [f._replace(preact=[x.bfloat16() for x in f.preact]) for f in (s, t)]
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(method(s, t, None)['mgd'], exact)
        rounded = method(*half, None)['mgd']
        track = [mgd.Track(stage) for stage in method.stages]
        track[0].add(half[0].preact[0], half[1].preact[0])
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2)
    expected = cosines(half[0].preact[0].float(), half[1].preact[0].float())
    torch.testing.assert_close(track[0].cosines, expected.double())


@pytest.mark.parametrize('n, size, scale', [(1, 32, 1), (2, 4, 1), (4, 32, 1e6), (4, 32, 0)],
                         ids=['one image', 'one pixel', 'huge', 'zero'])
def test_degenerate_features_give_finite_losses(n, size, scale):
    student, teacher = trained(2, 3).train(), trained(5, 9, seed=1)
    method = MGD(student, teacher)
    x = images(n, size)
    s, t = student(x), teacher(x)
    s, t = (f._replace(preact=[scale * x for x in f.preact]) for f in (s, t))
    method.start_epoch(1, lambda: [(s, t)])
    loss = method(s, t, None)['mgd']
    loss.backward()
    assert loss.isfinite() and all(math.isfinite(row['cost']) for row in method.report)
    assert all(p.grad.isfinite().all() for p in student.parameters())


# Cost

@pytest.mark.parametrize('size', [(3, 2), (20, 20)], ids=['one product', 'one per image'])
def test_cosines_against_loops(size):
    f_s, f_t = random(3, 2, *size), random(3, 4, *size, seed=1)
    f_s[0, 0] = 0  # a silent channel is like nothing
    found = cosines(f_s, f_t)
    for a in range(2):
        for b in range(4):
            expected = sum((torch.dot(x, y) / (x.norm() * y.norm()).clamp(min=1e-12)).item() for x, y in
                           zip(f_s[:, a].flatten(1), f_t[:, b].flatten(1)))
            assert found[a, b].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(cosines(f_s.float(), f_t.float()).double(), found, atol=1e-5, rtol=0)


def test_reported_cost_is_the_mean_squared_distance_of_matched_channels():
    student, teacher = trained(2, 3), trained(4, 6, seed=1)
    method = MGD(student, teacher)
    x = images(5)
    method.start_epoch(1, pairs_of(student, teacher, x[:2], x[2:]))
    for i, (row, stage) in enumerate(zip(method.report, method.stages)):
        f_s, f_t = (nn.functional.normalize(net(x).preact[i].double().flatten(2), dim=2) for net in (student, teacher))
        expected = (f_s[:, None] - f_t[:, stage.flow]).square().sum(-1).mean().item()
        assert row['cost'] == pytest.approx(expected, rel=1e-5)
        assert (row['stage'], row['shape'], row['changed']) == (i, [*f_s.shape[1:2], *f_t.shape[1:2]], None)
        assert row['seconds'] >= 0


# Assignment

def cheapest(cost, g):
    """By trying all."""
    sc, tc = cost.shape
    return min(sum(cost[i % sc, j] for i, j in enumerate(chosen)) for chosen in permutations(range(tc), g * sc))


def price(cost, flow):
    return sum(cost[c, j] for row in flow.tolist() for c, j in enumerate(row))


@pytest.mark.parametrize('sc, tc, g', [(4, 4, 1), (2, 4, 2), (2, 6, 3), (3, 7, 2), (2, 7, 3), (3, 6, 1), (1, 5, 5)])
@pytest.mark.parametrize('spread', [1.0, 1e-6])
def test_match_is_optimal(sc, tc, g, spread):
    for seed in range(5):
        cost = 1.5 + spread * random(sc, tc, seed=seed)
        flow = match(cost, g)
        assert flow.shape == (g, sc) and flow.dtype == torch.int64
        assert len(set(flow.flatten().tolist())) == g * sc, 'a teacher channel was given twice'
        assert (flow.diff(dim=0) > 0).all()
        found, best = ((p - 1.5 * g * sc) / spread for p in (price(cost, flow), cheapest(cost.numpy(), g)))
        assert found == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize('cost', [torch.zeros(2, 5), torch.full((3, 6), 2.0), torch.eye(4), -torch.eye(3)],
                         ids=['zero', 'constant', 'eye', 'negative eye'])
def test_match_of_ties(cost):
    flow = match(cost, cost.shape[1] // cost.shape[0])
    assert len(set(flow.flatten().tolist())) == flow.numel()
    assert price(cost, flow) == cheapest(cost.numpy(), len(flow))


def test_a_network_matches_itself():
    net = trained(6, 8)
    method = MGD(net, copy.deepcopy(net))
    for stage in method.stages:
        stage.flow.copy_(stage.flow.flip(1))
    method.start_epoch(1, pairs_of(net, net, images()))
    for stage, row in zip(method.stages, method.report):
        assert torch.equal(stage.flow, torch.arange(stage.flow.numel())[None])
        assert row['cost'] == pytest.approx(0, abs=1e-6)

    # where the norm changes nothing, what is left below the margins is nothing to learn either
    for stage in method.stages:
        stage.norm.running_var.fill_(1 - EPS)
    method.eval()
    assert method(net(images()), net(images()), None)['mgd'].item() == pytest.approx(0, abs=1e-9)


def test_a_permuted_and_doubled_network_is_seen_through():
    """Each teacher channel is a student channel times a positive number: groups have to be found exactly."""
    order = torch.tensor([2, 0, 1, 1, 2, 0, 0])
    f_s = random(4, 3, 5, 5)
    f_t = f_s[:, order] * torch.arange(1.0, 8).view(7, 1, 1) + 1e-3 * random(4, 7, 5, 5, seed=1)
    flow = match(2 - 2 * cosines(f_s, f_t) / 4, 2)
    assert torch.equal(order[flow], torch.arange(3).expand(2, 3))


@pytest.mark.parametrize('remainder, reducer, shape, highest', [
    ('assign', 'amp', (2, 3), 7), ('cut', 'amp', (2, 3), 5), ('assign', 'sm', (1, 3), 7), ('cut', 'sm', (1, 3), 7)])
def test_remainder_of_the_teachers_channels(remainder, reducer, shape, highest):
    student, teacher = trained(3), trained(8, seed=1)
    method = MGD(student, teacher, remainder=remainder, reducer=reducer)
    s, t = student(images()), teacher(images())
    t.preact[0][:, 6:] = s.preact[0][:, :2]  # the best partners come last
    method.start_epoch(1, lambda: [(s, t)])
    flow = method.stages[0].flow
    assert flow.shape == shape and (flow.max() == highest if highest == 7 else flow.max() <= highest)


# Pairing

@pytest.mark.parametrize('s, t, pairing', [
    ((2, 3, 4), (4, 4, 4), [(0, 0), (1, 1), (2, 2)]),
    ((3, 4), (2, 4, 4), None),  # the deepest maps differ in size
])
def test_pairing_needs_equal_sizes(s, t, pairing):
    student, teacher = trained(*s), trained(*t)
    if pairing is None:
        with pytest.raises(ValueError, match='differ in size'):
            MGD(student, teacher)
    else:
        assert MGD(student, teacher).pairing == pairing


def test_shallow_stages_without_a_partner_are_ignored():
    sizes = [((9, 28, 28), (2, 28, 28), (3, 14, 14), (4, 7, 7)), ((1, 56, 56), (2, 28, 28), (6, 14, 14), (8, 7, 7))]
    assert mgd.pair(*sizes) == [(1, 1), (2, 2), (3, 3)]
    assert mgd.pair(sizes[0][2:], sizes[1]) == [(0, 2), (1, 3)]
    assert mgd.pair(sizes[0], sizes[1][3:]) == [(3, 0)]


def test_without_or_tools_it_is_said_before_the_first_epoch(tmp_path):
    program = "import sys; sys.modules['ortools'] = None; import main_distill; main_distill.main()"
    flags = '--dummy --dataset cifar10 --dummy-images 4 --arch resnet8 --teacher-arch resnet8 --no-accel --output'
    ended = subprocess.run([sys.executable, '-c', program, *flags.split(), tmp_path], cwd=ROOT, env=environment(),
                           capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.endswith('which is not installed: pip install ortools\n')


def test_a_wider_student_is_refused():
    with pytest.raises(ValueError, match='student has 5 channels where the teacher has 4'):
        MGD(trained(2, 5), trained(4, 4))


@pytest.mark.parametrize('hyper', [{'loss_factor': -1.0}, {'update_freq': 0}, {'stage_factors': (1.0,)}])
def test_senseless_hyper_parameters_are_refused(hyper):
    with pytest.raises(ValueError):
        MGD(trained(2, 3), trained(4, 6), **hyper)


# Schedule and state

def test_updates_come_when_due():
    student, teacher = trained(2, 3), trained(4, 6, seed=1)
    method, solved = MGD(student, teacher, update_freq=2), []

    def pairs(epoch):
        solved.append(epoch)
        return pairs_of(student, teacher, images(seed=epoch))()

    for epoch in [1, 1, 2, 3, 3, 4, 5]:
        method.start_epoch(epoch, lambda epoch=epoch: pairs(epoch))
    assert solved == [1, 3, 5]
    assert all(0 <= row['changed'] <= 1 for row in method.report)

    late = MGD(student, teacher, update_freq=2)  # a run with --start-epoch
    late.start_epoch(4, lambda: pairs(4))
    assert solved[-1] == 4


def test_report_of_changes():
    student, teacher = trained(2), trained(4, seed=1)
    method = MGD(student, teacher)
    x = images()
    method.start_epoch(1, pairs_of(student, teacher, x))
    method.start_epoch(2, pairs_of(student, teacher, x))
    assert method.report[0]['changed'] == 0.0
    method.stages[0].flow.copy_(method.stages[0].flow.flip(1))  # all four channels change hands
    method.start_epoch(3, pairs_of(student, teacher, x))
    assert method.report[0]['changed'] == 1.0


def test_state_brings_the_flow_along():
    student, teacher = trained(2, 3), Net(4, 6, norm=lambda c: nn.GroupNorm(1, c))
    method = MGD(student, teacher)
    method.start_epoch(3, pairs_of(student, teacher, images()))
    method(student(images()), teacher(images()), None)

    resumed = MGD(student, teacher)
    resumed.load_state_dict(method.state_dict())
    resumed.start_epoch(3, lambda: pytest.fail('solved again'))
    assert_same(resumed.state_dict(), method.state_dict())
    for key in ('flow', 'margins', 'norm.weight', 'norm.running_mean'):
        assert f'stages.1.{key}' in method.state_dict()
    losses = [m(student(images()), teacher(images()), None)['mgd'] for m in (method, resumed)]
    assert torch.equal(*losses)


def test_an_update_that_can_tell_nothing_is_an_error():
    student, teacher = trained(2), trained(4)
    with pytest.raises(ValueError, match='no images'):
        MGD(student, teacher).start_epoch(1, list)
    with pytest.raises(ValueError, match='not finite'):
        MGD(student, teacher).start_epoch(1, pairs_of(student, teacher, images() * math.inf))


# Ranks

def networks():
    return trained(4, 6), Net(9, 20, norm=lambda c: nn.GroupNorm(1, c))


def solve(rank, world, folder):
    """One rank of several; each sees its share of the images, and they are not equally many."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    torch.manual_seed(0)
    student, teacher = networks()
    method = MGD(student, teacher)
    method.start_epoch(1, pairs_of(student, teacher, images(7)[rank::world]))
    torch.save([method.state_dict(), [row['cost'] for row in method.report]], f'{folder}/{rank}')
    dist.destroy_process_group()


def test_ranks_find_the_flow_of_one_process(tmp_path):
    torch.manual_seed(0)
    student, teacher = networks()
    alone = MGD(student, teacher)
    alone.start_epoch(1, pairs_of(student, teacher, images(7)))
    torch.multiprocessing.spawn(solve, (2, str(tmp_path)), nprocs=2)

    (first, costs), (second, _) = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert_same(first, second)
    for stage, cost, row in zip(range(2), costs, alone.report):
        assert torch.equal(first[f'stages.{stage}.flow'], alone.stages[stage].flow)
        torch.testing.assert_close(first[f'stages.{stage}.margins'], alone.stages[stage].margins)
        assert cost == pytest.approx(row['cost'], rel=1e-6)


def test_channels_last_changes_the_layout_of_the_gradient_and_nothing_else():
    student, teacher = trained(2, 6).train(), trained(5, 12, seed=1)
    method = MGD(student, teacher)
    s, t = student(images()), teacher(images())
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        f_s, f_t = ([x.detach().contiguous(memory_format=layout) for x in f.preact] for f in (s, t))
        for x in f_s:
            x.requires_grad_()
        method(s._replace(preact=f_s), t._replace(preact=f_t), None)['mgd'].backward()
        assert all(x.grad.is_contiguous(memory_format=layout) for x in f_s)
        gradients.append([x.grad for x in f_s])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
