"""Methods that see logits only, against slow formulations: DKD, EDKD, MRKD, DIST, DML, and Logit Standardization."""
import math
from statistics import fmean, stdev

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import make, make_batch

from distillers import Distillation, mrkd, parts
from distillers.base import z_scores
from distillers.dist import DIST
from distillers.dkd import DKD
from distillers.dml import DML
from distillers.edkd import EDKD
from distillers.kd import KD
from distillers.mrkd import MRKD
from models import Features
from utils.data import Batch

N, K = 6, 7


def logits(n=N, k=K, scale=3.0, seed=0):
    """Of the student, which wants a gradient, and of the teacher."""
    z_s, z_t = scale * torch.randn(2, n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z_s.requires_grad_(), z_t


def targets(n=N, k=K):
    return 3 * torch.arange(n) % k


def run(method, z_s, z_t, target=None):
    batch = Batch(None, targets(*z_s.shape) if target is None else target, None, None)
    return method(*(Features(z, None, None, [], []) for z in (z_s, z_t)), batch)


def values(losses):
    return {name: loss.item() for name, loss in losses.items()}


def softmax(row, T=1.0):
    powers = [math.exp(z / T) for z in row]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a)


def pearson(a, b):
    a, b = ([x - fmean(row) for x in row] for row in (a, b))
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


# DKD and EDKD

def slow_decoupled(z_s, z_t, target, T):
    """TCKD, NCKD and the teacher's probability of the target, sample by sample."""
    for row_s, row_t, y in zip(z_s.tolist(), z_t.tolist(), target.tolist()):
        p_s, p_t = softmax(row_s, T), softmax(row_t, T)
        q_s, q_t = ([x / (1 - p[y]) for c, x in enumerate(p) if c != y] for p in (p_s, p_t))
        yield T * T * kl((p_t[y], 1 - p_t[y]), (p_s[y], 1 - p_s[y])), T * T * kl(q_t, q_s), p_t[y]


@pytest.mark.parametrize('hyper', [{}, {'alpha': 0.5, 'beta': 2.0, 'temperature': 1.0}, {'alpha': 0.0}])
def test_dkd_is_the_formula(hyper):
    z_s, z_t = logits()
    alpha, beta, T = ({'alpha': 1.0, 'beta': 8.0, 'temperature': 4.0} | hyper).values()
    tckd, nckd, _ = zip(*slow_decoupled(z_s, z_t, targets(), T))
    found = values(run(DKD(None, None, **hyper), z_s, z_t))
    assert found == pytest.approx({'dkd_tckd': alpha * fmean(tckd), 'dkd_nckd': beta * fmean(nckd)}, rel=1e-5)


def test_dkd_adds_up_to_kd():
    """KL(p_t || p_s) = TCKD + (1 - p_t[y]) NCKD of a sample, at temperature 1."""
    z_s, z_t = logits(n=1)
    found = values(run(DKD(None, None, beta=1.0, temperature=1.0), z_s, z_t))
    others = 1 - softmax(z_t[0].tolist())[targets(1)]
    expected = kl(softmax(z_t[0].tolist()), softmax(z_s[0].tolist()))
    assert found['dkd_tckd'] + others * found['dkd_nckd'] == pytest.approx(expected, rel=1e-5)


def test_dkd_parts_look_at_different_things():
    """TCKD leaves the ratios of the others alone, NCKD the target."""
    z_s, z_t = logits()
    y = F.one_hot(targets(), K).bool()
    for name, silent in ('dkd_tckd', None), ('dkd_nckd', y):
        grad, = torch.autograd.grad(run(DKD(None, None), z_s, z_t)[name], z_s)
        if silent is not None:
            assert grad[~silent].abs().min() > 0 and not grad[silent].any()
        else:
            others = grad[~y].view(N, K - 1) / (z_s[~y].view(N, K - 1) / 4).softmax(1)
            torch.testing.assert_close(others, others.mean(1, keepdim=True).expand_as(others), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize('method', [DKD, EDKD])
def test_decoupled_losses_start_small(method):
    z_s, z_t = logits()
    built = method(None, None, warmup=20)
    full = values(run(built, z_s, z_t))
    for epoch, factor in (1, 0.05), (10, 0.5), (20, 1.0), (21, 1.0), (5, 0.25):
        built.start_epoch(epoch, None)
        expected = {name: factor * loss for name, loss in full.items()}
        assert values(run(built, z_s, z_t)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('method', [DKD, EDKD])
def test_the_target_of_mixed_labels_has_the_largest_share(method):
    z_s, z_t = logits()
    shares = 0.7 * F.one_hot(targets(), K) + 0.3 * F.one_hot(targets() + 1, K + 1)[:, :K]
    assert values(run(method(None, None), z_s, z_t, shares)) == values(run(method(None, None), z_s, z_t))


@pytest.mark.parametrize('method', [DKD, EDKD])
def test_of_two_classes_there_is_but_one_other(method):
    z_s, z_t = logits(k=2)
    tckd, nckd = run(method(None, None), z_s, z_t).values()
    (tckd + nckd).backward()
    assert nckd == 0 and tckd > 0 and z_s.grad.isfinite().all() and z_s.grad.any()


@pytest.mark.parametrize('method', [DKD, EDKD])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_decoupled_losses_of_any_gap_are_right(method, dtype):
    """Where a softmax underflows, and where a mask of -1000 is not low enough."""
    z_s = torch.tensor([[8192.0, 0, -8192], [0, 0, 0]], dtype=dtype, requires_grad=True)
    z_t = torch.tensor([[-8192.0, 8192, 0], [8192, 0, -8192]], dtype=dtype)
    tckd, nckd = run(method(None, None), z_s, z_t, torch.tensor([0, 0])).values()
    (tckd + nckd).backward()
    # the teacher bets on class 1: the student has it 8192 lower than the target, but above the other one
    assert tckd.item() == pytest.approx(16 * (8192 / 4 + math.log(3)) / 2, rel=1e-5)
    assert nckd.item() == pytest.approx(8 * 16 * math.log(2) / 2, rel=1e-5)
    assert tckd.dtype == torch.float32 and z_s.grad.isfinite().all() and z_s.grad.any()


@pytest.mark.parametrize('confidence', ['max', 'target'])
@pytest.mark.parametrize('beta', ['sample', 'batch'])
@pytest.mark.parametrize('beta_max, T', [(8.0, 4.0), (5.0, 1.0)])
def test_edkd_is_the_formula(beta, confidence, beta_max, T):
    z_s, z_t = logits()
    tckd, nckd, p = zip(*slow_decoupled(z_s, z_t, targets(), T))
    m = p if confidence == 'target' else [max(x, 1 - x) for x in p]
    betas = [beta_max * math.exp(-(1 - x)) for x in m]
    if beta == 'batch':
        betas = [fmean(betas)] * N
    method = EDKD(None, None, beta=beta, confidence=confidence, beta_max=beta_max, temperature=T)
    expected = {'edkd_tckd': fmean(tckd), 'edkd_nckd': fmean(b * x for b, x in zip(betas, nckd))}
    assert values(run(method, z_s, z_t)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('p, beta', [(0.001, 7.992), (0.25, 6.230), (0.5, 4.852), (0.75, 6.230), (0.999, 7.992)])
def test_edkd_weighs_the_others_least_where_the_teacher_is_torn(p, beta):
    z_t = torch.tensor([[p, 0.8 * (1 - p), 0.2 * (1 - p)]]).log()
    z_s, y = torch.zeros(1, 3), torch.tensor([0])
    losses = (run(EDKD(None, None, temperature=1.0), z_s, z_t, y)['edkd_nckd'],
              run(DKD(None, None, beta=1.0, temperature=1.0), z_s, z_t, y)['dkd_nckd'])
    assert (losses[0] / losses[1]).item() == pytest.approx(beta, abs=1e-3)


# MRKD

def slow_mrkd(z_s, z_t, beta=0.5, top=1.0):
    """P and K of one direction."""
    correlations, concordances = [], []
    for row_s, row_t in zip(z_s.tolist(), z_t.tolist()):
        correlations.append(pearson(row_s, row_t))
        n_s, n_t = ([(x - fmean(row)) / stdev(row) for x in row] for row in (row_s, row_t))
        kept = sorted(range(len(n_t)), key=n_t.__getitem__, reverse=True)[:math.floor(top * len(n_t))]
        concordances.append(fmean(2 / (1 + math.exp(-beta * (n_t[i] - n_t[j]) * (n_s[i] - n_s[j]))) - 1
                                  for i in kept for j in kept if i < j))
    return 1 - fmean(correlations), 1 - fmean(concordances)


@pytest.mark.parametrize('hyper', [{}, {'pearson': 32.0, 'kendall': 16.0, 'top': 0.5}, {'beta': 3.0, 'top': 0.8}])
@pytest.mark.parametrize('at_once', [2**24, 100, 1])
def test_mrkd_is_the_formula(hyper, at_once, monkeypatch):
    monkeypatch.setattr(mrkd, 'PAIRS_AT_ONCE', at_once)
    z_s, z_t = logits()
    rest = {name: hyper[name] for name in ('beta', 'top') if name in hyper}
    p, k = map(sum, zip(slow_mrkd(z_s, z_t, **rest), slow_mrkd(z_s.T, z_t.T, **rest)))
    expected = {'mrkd_pearson': hyper.get('pearson', 16.0) * p, 'mrkd_kendall': hyper.get('kendall', 32.0) * k}
    assert values(run(MRKD(None, None, **hyper), z_s, z_t)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('at_once', [2**24, 100])
def test_gradient_of_the_kendall_term(at_once, monkeypatch):
    monkeypatch.setattr(mrkd, 'PAIRS_AT_ONCE', at_once)
    z_s, z_t = logits(scale=1.0)
    assert torch.autograd.gradcheck(lambda s: mrkd.Concordance.apply(s, z_t, 0.5), z_s)


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is computed."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_mrkd_never_holds_all_pairs(monkeypatch):
    monkeypatch.setattr(mrkd, 'PAIRS_AT_ONCE', 10000)
    z_s, z_t = logits(30, 50)
    with Largest() as largest:
        sum(run(MRKD(None, None), z_s, z_t).values()).backward()
    assert 50 * 50 <= largest.elements <= 10000 < 50 * 30 * 30


def test_mrkd_knows_no_scale_and_no_shift():
    z_s, z_t = logits()
    losses = [values(run(MRKD(None, None), z, z_t)) for z in (z_s, 0.1 * z_s - 5)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_floor_of_mrkd():
    """Equal logits correlate perfectly, but tanh never gets to 1: 0.663 a direction for normal ones."""
    _, z_t = logits(200, 200)
    found = values(run(MRKD(None, None, pearson=1.0, kendall=1.0), z_t, z_t))
    assert found['mrkd_pearson'] == pytest.approx(0, abs=1e-5)
    assert found['mrkd_kendall'] == pytest.approx(2 * 0.663, abs=0.01)


def test_mrkd_of_constant_rows():
    z_s, z_t = logits()
    z_s, z_t = z_s.detach().clone(), z_t.clone()
    z_s[0], z_t[1], z_s[:, 2], z_t[:, 3] = 1.0, 1.0, 0.5, 0.5
    z_s.requires_grad_()
    for top in 1.0, 0.5:
        losses = run(MRKD(None, None, top=top), z_s, z_t)
        grad, = torch.autograd.grad(sum(losses.values()), z_s)
        assert all(loss.isfinite() for loss in losses.values()) and grad.isfinite().all()


def test_rows_of_mrkd_keep_a_pair():
    z_s, z_t = logits(n=3)
    for top in 0.5, 0.01:  # of three samples, one or none
        assert all(loss.isfinite() and loss > 0 for loss in run(MRKD(None, None, top=top), z_s, z_t).values())


# DIST

def slow_dist(z_s, z_t, T):
    y_s, y_t = (torch.tensor([softmax(row, T) for row in z.tolist()], dtype=torch.float64) for z in (z_s, z_t))
    return [1 - fmean(map(pearson, a.tolist(), b.tolist())) for a, b in ((y_s, y_t), (y_s.T, y_t.T))]


@pytest.mark.parametrize('hyper', [{}, {'beta': 1.0, 'gamma': 3.0, 'temperature': 1.0}, {'scale_t2': False}])
def test_dist_is_the_formula(hyper):
    z_s, z_t = logits()
    beta, gamma, T, scale = ({'beta': 2.0, 'gamma': 2.0, 'temperature': 4.0, 'scale_t2': True} | hyper).values()
    inter, intra = slow_dist(z_s, z_t, T)
    factor = T * T if scale else 1
    expected = {'dist_inter': factor * beta * inter, 'dist_intra': factor * gamma * intra}
    assert values(run(DIST(None, None, **hyper), z_s, z_t)) == pytest.approx(expected, rel=1e-4)


def test_correlation_of_rows_that_hardly_vary_fades_as_published():
    """As of classes that no image of a batch shows: a thousand classes have many of these."""
    a, b = logits()[0].detach(), logits()[1]
    a, b = ((x - x.mean(1, keepdim=True)) / (x - x.mean(1, keepdim=True)).norm(dim=1, keepdim=True) for x in (a, b))
    cosines = (a * b).sum(1)
    for size, share in (1.0, 1.0), (1e-4, 0.5), (1e-5, 1 / 101):
        torch.testing.assert_close(parts.row_pearson(size * a + 3, size * b), share * cosines, rtol=1e-4, atol=1e-6)
    a[0] = 3.0
    a.requires_grad_()
    parts.row_pearson(a, b).sum().backward()
    assert not a.grad[0].any() and a.grad[1:].abs().max() < 10


def test_dist_of_equal_logits_is_zero():
    _, z_t = logits()
    assert values(run(DIST(None, None), z_t, z_t)) == pytest.approx({'dist_inter': 0, 'dist_intra': 0}, abs=1e-4)


# Relations over the batch

@pytest.fixture
def two_ranks(monkeypatch):
    """Rows of a first rank become those of both, where they are gathered: first the student's, then the teacher's."""
    def gathered(*rows):
        left = iter(rows)
        monkeypatch.setattr(parts.distributed, 'gather_rows', lambda rows, counts: next(left).float())
    return gathered


def test_relations_of_dist_are_over_the_global_batch(two_ranks):
    (z_s, z_t), half = logits(2 * N), slice(N)
    two_ranks((z_s / 4).softmax(1), (z_t / 4).softmax(1))
    inter, intra = slow_dist(z_s[half], z_t[half], 4)[0], slow_dist(z_s, z_t, 4)[1]
    found = values(run(DIST(None, None), z_s[half], z_t[half]))
    assert found == pytest.approx({'dist_inter': 32 * inter, 'dist_intra': 32 * intra}, rel=1e-4)
    local = values(run(DIST(None, None, local=True), z_s[half], z_t[half]))
    assert local['dist_intra'] == pytest.approx(32 * slow_dist(z_s[half], z_t[half], 4)[1], rel=1e-4)


def test_relations_of_mrkd_are_over_the_global_batch(two_ranks):
    (z_s, z_t), half = logits(2 * N), slice(N)
    two_ranks(z_s, z_t)
    within = slow_mrkd(z_s[half], z_t[half])
    for local, rows in (False, slice(2 * N)), (True, half):
        p, k = map(sum, zip(within, slow_mrkd(z_s[rows].T, z_t[rows].T)))
        found = values(run(MRKD(None, None, local=local), z_s[half], z_t[half]))
        assert found == pytest.approx({'mrkd_pearson': 16 * p, 'mrkd_kendall': 32 * k}, rel=1e-5)


def test_mean_factor_of_edkd_is_over_the_global_batch(two_ranks):
    (z_s, z_t), half = logits(2 * N), slice(N)
    _, _, p = zip(*slow_decoupled(z_s, z_t, targets(2 * N), 1.0))
    betas = [8 * math.exp(max(x, 1 - x) - 1) for x in p]
    two_ranks(torch.tensor(betas))
    _, nckd, _ = zip(*slow_decoupled(z_s[half], z_t[half], targets(2 * N)[half], 1.0))
    found = run(EDKD(None, None, beta='batch', temperature=1.0), z_s[half], z_t[half], targets(2 * N)[half])
    assert found['edkd_nckd'].item() == pytest.approx(fmean(betas) * fmean(nckd), rel=1e-5)


def test_one_sample_is_in_no_relation():
    z_s, z_t = logits(n=1)
    intra = run(DIST(None, None), z_s, z_t)['dist_intra']
    assert intra == 0 and intra.requires_grad
    p, k = slow_mrkd(z_s, z_t)
    found = values(run(MRKD(None, None), z_s, z_t))
    assert found == pytest.approx({'mrkd_pearson': 16 * p, 'mrkd_kendall': 32 * k}, rel=1e-5)


# DML

def test_dml_is_the_formula():
    z_s, z_t = logits()
    p_s, p_t = ([softmax(row) for row in z.tolist()] for z in (z_s, z_t))
    expected = {'dml_student': 0.5 * fmean(map(kl, p_t, p_s)), 'dml_teacher': 2 * fmean(map(kl, p_s, p_t))}
    losses = run(DML(None, None, weight_s=0.5, weight_t=2.0), z_s, z_t)
    assert values(losses) == pytest.approx(expected, rel=1e-5)


def test_the_second_network_of_dml_learns_from_the_labels_as_the_first_does():
    z_s, z_t = (z.detach().float() for z in logits())
    task = Distillation(Fixed(z_s), Fixed(z_t), {'dml': DML(None, None)}, ce_weight=0.5, standardize=True)
    expected = 0.5 * fmean(-math.log(softmax(row)[y]) for row, y in zip(z_t.tolist(), targets().tolist()))
    assert task(Batch(None, targets(), None, None))[1]['ce_teacher'].item() == pytest.approx(expected, rel=1e-5)


def test_each_network_of_dml_sees_the_other_as_a_constant():
    z_s, z_t = logits()
    z_t.requires_grad_()
    sum(run(DML(None, None), z_s, z_t).values()).backward()
    p_s, p_t = z_s.detach().softmax(1), z_t.detach().softmax(1)
    torch.testing.assert_close(z_s.grad, (p_s - p_t) / N, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(z_t.grad, (p_t - p_s) / N, rtol=1e-4, atol=1e-7)


def test_the_second_network_of_dml_trains():
    student, teacher = make('same')
    teacher.train().requires_grad_(True)
    batch = make_batch()

    def gradients(**others):
        task = Distillation(student, teacher, {'dml': DML(student, teacher), **others})
        task.zero_grad()
        sum(task.train()(batch)[1].values()).backward()
        assert all(p.grad.any() for network in (student, teacher) for p in network.norms.parameters())
        return torch.cat([p.grad.flatten() for p in teacher.parameters()])

    assert torch.equal(gradients(), gradients(kd=KD(None, None)))  # to all other methods it is a teacher


# Logit Standardization

class Fixed(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x, features=False):
        return Features(self.logits, self.logits, self.logits, [], [])


def test_logit_standardization_is_kd_of_z_scores():
    z_s, z_t = (z.detach().float() for z in logits())
    total = 0.0
    for row_s, row_t in zip(z_s.tolist(), z_t.tolist()):
        n_s, n_t = ([(z - fmean(row)) / stdev(row) for z in row] for row in (row_s, row_t))
        total += 9 * 4 * kl(softmax(n_t, 2), softmax(n_s, 2)) / N
    task = Distillation(Fixed(z_s), Fixed(z_t), {'kd': KD(None, None, temperature=2.0, weight=9.0)}, ce_weight=1.0,
                        standardize=True)
    shown, losses = task(Batch(None, targets(), None, None))
    assert losses['kd'].item() == pytest.approx(total, rel=1e-5)
    assert torch.equal(shown, z_s)
    assert losses['ce'].item() == pytest.approx(
        fmean(-math.log(softmax(row)[y]) for row, y in zip(z_s.tolist(), targets().tolist())), rel=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_z_scores_of_any_logits(dtype):
    z = torch.tensor([[1e4, -1e4, 0], [2, 2, 2], [1e-4, 2e-4, 3e-4]], dtype=dtype)
    found = z_scores(z)
    assert found.dtype == torch.float32 and found.isfinite().all()
    torch.testing.assert_close(found[:2], torch.tensor([[1.0, -1, 0], [0, 0, 0]]))
    torch.testing.assert_close(found[2].std(), torch.tensor(1.0), rtol=2e-3, atol=0)


def test_equal_logits_have_no_z_scores_to_pull():
    """As those of a classifier that starts at zero: a slope of 1e7 would ruin it in its first update."""
    z = torch.tensor([[0.0, 0, 0], [3, 3, 3], [1, 2, 3]], requires_grad=True)
    (z_scores(z) * torch.tensor([1.0, -2, 5])).sum().backward()
    assert not z.grad[:2].any() and z.grad[2].isfinite().all() and z.grad[2].any()


# Hyper-parameters

@pytest.mark.parametrize('method, hyper', [
    (DKD, {'alpha': 0.0, 'beta': 0.0}), (DKD, {'temperature': 0.0}), (DKD, {'warmup': 0}), (EDKD, {'beta_max': 0.0}),
    (MRKD, {'pearson': 0.0, 'kendall': 0.0}), (MRKD, {'beta': 0.0}), (MRKD, {'top': 0.0}), (MRKD, {'top': 1.5}),
    (DIST, {'beta': 0.0, 'gamma': 0.0}), (DML, {'weight_s': 0.0}), (DML, {'weight_t': -1.0})])
def test_senseless_hyper_parameters_are_refused(method, hyper):
    with pytest.raises(ValueError, match=next(iter(hyper))):
        method(None, None, **hyper)
