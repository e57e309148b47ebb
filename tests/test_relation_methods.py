"""SP, RKD, PKT, CC, CRD: their formulas; and that relations mean the same on one rank and on two."""
import copy
import math
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import zoo

from distillers import DISTILLERS, Distiller, crd, rkd
from distillers.flags import hyper_parameters
from distillers.parts import of_all_ranks, unit
from models import Features
from utils.data import Batch

CHANNELS = {'student': 8, 'teacher': 16}  # of the pair 'narrower'
SAMPLES = 23  # of the data set that CRD knows


def features(n, network, seed=0) -> Features:
    generator = torch.Generator().manual_seed(100 * seed + CHANNELS[network])
    maps = torch.randn(n, CHANNELS[network], 3, 3, generator=generator).relu()
    logits = 3 * torch.randn(n, zoo.CLASSES, generator=generator)
    return Features(logits, maps.mean((2, 3)), maps, [maps], [maps])


def batch_of(index, weight=1.0) -> Batch:
    index = torch.as_tensor(index)
    return Batch(None, index % zoo.CLASSES, index, torch.full_like(index, -1), weight)


def build(name, **hyper) -> Distiller:
    student, teacher = zoo.make('narrower')
    torch.manual_seed(1)
    method = METHODS[name](student, teacher, **hyper).eval()
    method.know(torch.arange(SAMPLES) % zoo.CLASSES)
    return method


def pair(n, seed=0):
    s, t = features(n, 'student', seed), features(n, 'teacher', seed)
    s.pooled.requires_grad_()
    s.maps[-1].requires_grad_()
    return s, t


def same_as(s: Features) -> Features:
    return Features(*([x.detach() for x in field] if isinstance(field, list) else field.detach() for field in s))


class Plus(Distiller):
    """Two gathers whose gradients come in as one tensor.

    local: relations within a rank's share of the batch only, as published, instead of over the global batch
    """

    def __init__(self, student, teacher, *, local=False):
        super().__init__()
        self.local = local

    def forward(self, s, t, batch):
        a, b = (of_all_ranks(x, batch, self.local) for x in (s.logits, s.pooled[:, :zoo.CLASSES]))
        return {'plus': ((a + b) ** 2 * torch.arange(1, len(a) + 1)[:, None]).mean()}


METHODS = DISTILLERS | {'plus': Plus}
RELATIONS = [name for name, method in METHODS.items() if 'local' in hyper_parameters(method)]


# Formulas

def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def scaled(row):
    return [x / math.sqrt(dot(row, row)) for x in row]


def slow_sp(f_s, f_t):
    g_s, g_t = ([scaled([dot(a, b) for b in f]) for a in f] for f in (f_s, f_t))
    return sum((x - y) ** 2 for a, b in zip(g_s, g_t) for x, y in zip(a, b)) / len(f_s) ** 2


def slow_pkt(f_s, f_t):
    total = 0.0
    for a_s, a_t in zip(f_s, f_t):
        k_s, k_t = ([(dot(scaled(a), scaled(b)) + 1) / 2 for b in f] for a, f in ((a_s, f_s), (a_t, f_t)))
        total += sum(q / sum(k_t) * math.log((q / sum(k_t) + 1e-7) / (p / sum(k_s) + 1e-7)) for p, q in zip(k_s, k_t))
    return total / len(f_s) ** 2


def slow_cc(e_s, e_t):
    d = [[abs(x - y) for x, y in zip(a, b)] for a, b in zip(e_s, e_t)]
    return sum(dot(a, b) for a, b in pairwise(d)) / (len(d) - 1)


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def slow_rkd(f_s, f_t):
    """Distances, angles."""
    everyone = range(len(f_s))

    def minus(a, b):
        return [x - y for x, y in zip(a, b)]

    def cosine(f, i, j, k):
        return 0.0 if i in (j, k) else dot(scaled(minus(f[j], f[i])), scaled(minus(f[k], f[i])))

    d_s, d_t = ([math.dist(f[i], f[j]) for i in everyone for j in everyone] for f in (f_s, f_t))
    means = [sum(d) / sum(x > 0 for x in d) for d in (d_s, d_t)]
    distance = sum(huber(a / means[0] - b / means[1]) for a, b in zip(d_s, d_t)) / len(d_s)
    angle = [huber(cosine(f_s, i, j, k) - cosine(f_t, i, j, k)) for i in everyone for j in everyone for k in everyone]
    return distance, sum(angle) / len(angle)


@pytest.mark.parametrize('name, slow, weight', [('sp', slow_sp, 3000), ('pkt', slow_pkt, 30000)])
def test_formula(name, slow, weight):
    s, t = pair(7)
    rows = ((x.maps[-1].flatten(1) if name == 'sp' else x.pooled).double().tolist() for x in (s, t))
    expected = slow(*rows)
    assert build(name)(s, t, batch_of(range(7)))[name].item() == pytest.approx(weight * expected, rel=2e-4)
    assert build(name, weight=2.0)(s, t, batch_of(range(7)))[name].item() == pytest.approx(2 * expected, rel=2e-4)


def test_formula_of_rkd():
    s, t = pair(7)
    distance, angle = slow_rkd(*(x.pooled.double().tolist() for x in (s, t)))
    losses = build('rkd')(s, t, batch_of(range(7)))
    assert losses['rkd_distance'].item() == pytest.approx(25 * distance, rel=1e-4)
    assert losses['rkd_angle'].item() == pytest.approx(50 * angle, rel=1e-4)
    alone = build('rkd', distance=1.0, angle=0.0)(s, t, batch_of(range(7)))
    assert list(alone) == ['rkd_distance'] and alone['rkd_distance'].item() == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize('feat_dim', [128, 3])
def test_formula_of_cc(feat_dim):
    s, t = pair(6)
    method = build('cc', feat_dim=feat_dim)
    assert method.embed_s.weight.shape == (feat_dim, 8) and method.embed_t.weight.shape == (feat_dim, 16)
    e_s, e_t = ([[dot(row, w) + b for w, b in zip(embed.weight.tolist(), embed.bias.tolist())]
                 for row in x.pooled.tolist()] for embed, x in ((method.embed_s, s), (method.embed_t, t)))
    assert method(s, t, batch_of(range(6)))['cc'].item() == pytest.approx(0.02 * slow_cc(e_s, e_t), rel=1e-4)


@pytest.mark.parametrize('name', ['sp', 'rkd', 'pkt'])
def test_relations_do_not_see_what_leaves_them_alone(name):
    s, _ = pair(6)
    batch = batch_of(range(6))
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    turned = torch.einsum('nchw,cd->ndhw', s.maps[-1].detach(), 3 * turn)
    moved = same_as(s)._replace(maps=[turned], pooled=turned.mean((2, 3)) + (2.0 if name == 'rkd' else 0.0))
    values = [sum(build(name)(s, t, batch).values()).item() for t in (same_as(s), moved, features(6, 'teacher'))]
    assert values[0] == pytest.approx(0, abs=1e-6) and values[1] == pytest.approx(0, abs=1e-3) and values[2] > 0.1


@pytest.mark.parametrize('name', ['sp', 'rkd', 'pkt', 'cc'])
def test_one_image_is_in_no_relation(name):
    s, t = pair(1)
    loss = sum(build(name)(s, t, batch_of([4])).values())
    loss.backward()
    assert loss.item() == 0 and not (s.maps[-1] if name == 'sp' else s.pooled).grad.any()


@pytest.mark.parametrize('name', ['sp', 'rkd', 'pkt', 'cc', 'crd'])
def test_mixed_precision_stays_out(name):
    """Products of float32 become bfloat16 under autocast, which is too coarse for differences of similarities."""
    s, t = pair(6)
    values = []
    for enabled in (False, True):
        method = build(name)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            values.append(method(s, t, batch_of(range(6))))
    assert values[0] == values[1]


def test_rkd_in_parts_is_rkd(monkeypatch):
    s, t = pair(7)
    results = []
    for at_once in (64, 3):
        monkeypatch.setattr(rkd, 'ANCHORS_AT_ONCE', at_once)
        loss = build('rkd')(s, t, batch_of(range(7)))['rkd_angle']
        results.append((loss.item(), *torch.autograd.grad(loss, s.pooled)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize('rows', [[0, 0, 1, 2], [0, 0, 0, 0]])
def test_rkd_of_equal_samples_has_a_sane_gradient(rows):
    s, t = pair(4)
    pooled = s.pooled.detach()[rows].requires_grad_()
    sum(build('rkd')(s._replace(pooled=pooled), t, batch_of(range(4))).values()).backward()
    assert pooled.grad.isfinite().all() and pooled.grad.abs().max() < 1e3
    assert pooled.grad.any() == (rows != [0] * 4)


def test_unit():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    assert unit(x).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]
    unit(x)[:, 0].sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.128, -0.096], [0.0, 0.0]]))


# CRD

def slow_crd(method, s, t, index, drawn, z=None):
    """The loss with its graph, Z, and the memories after it."""
    memories = [memory.double() for memory in (method.memory_s, method.memory_t)]
    embedded = []
    for embed, x in ((method.embed_s, s), (method.embed_t, t)):
        e = x.pooled.double() @ embed.weight.double().T + embed.bias.double()
        embedded.append([row / (row ** 2).sum().sqrt() for row in e])
    n, K, total = len(memories[0]), drawn.shape[1] - 1, 0.0
    fixed = []
    for side, (e, memory) in enumerate(zip(embedded, memories[::-1])):
        similar = [[((row * memory[k]).sum() / method.tau).exp() for k in numbers]
                   for row, numbers in zip(e, drawn.tolist())]
        fixed.append(z[side] if z else n * sum(sum(row) for row in similar).item() / (len(e) * (K + 1)))
        for first, *others in ([x / fixed[-1] for x in row] for row in similar):
            total = total - (first / (first + K / n + 1e-7)).log() / len(e)
            for p in others:
                total = total - (K / n / (p + K / n + 1e-7)).log() / len(e)
    after = [memory.clone() for memory in memories]
    for memory, e in zip(after, embedded):
        for i, row in zip(index, e):
            mixed = method.momentum * memory[i] + (1 - method.momentum) * row.detach()
            memory[i] = mixed / (mixed ** 2).sum().sqrt()
    return method.weight * total, fixed, after


@pytest.mark.parametrize('hyper', [{}, {'mode': 'relax', 'negatives': 9, 'momentum': 0.25, 'tau': 0.2, 'weight': 2.0}])
def test_formula_of_crd(hyper):
    method, z = build('crd', **{'negatives': 40} | hyper), None
    for step, index in enumerate(([3, 14, 5, 22], [7, 3, 0])):
        s, t = pair(len(index), seed=step)
        torch.manual_seed(step)
        drawn = method.draw(torch.tensor(index))
        expected, z, after = slow_crd(copy.deepcopy(method), s, t, index, drawn, z)  # Z of the first step, for ever
        torch.manual_seed(step)
        loss = method(s, t, batch_of(index))['crd']
        grads = [torch.autograd.grad(x, [s.pooled])[0] for x in (loss, expected)]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
        assert method.z.tolist() == pytest.approx(z, rel=1e-4)
        for memory, slow in zip((method.memory_s, method.memory_t), after):
            torch.testing.assert_close(memory.double(), slow, rtol=0, atol=1e-6)


@pytest.mark.parametrize('share', [0.7, 0.3])
def test_crd_takes_mixed_images_for_the_larger_share(share):
    """As torchvision mixes them: each with the one before it."""
    method, index = build('crd', negatives=10), torch.tensor([3, 14, 5, 22])
    classes = torch.nn.functional.one_hot(method.targets[index], int(method.targets.max()) + 1).float()
    batch = batch_of(index.tolist())._replace(target=share * classes + (1 - share) * classes.roll(1, 0))
    larger = index if share > 0.5 else index.roll(1)
    assert torch.equal(method.largest(batch), larger) and len({*method.targets[index].tolist()}) > 1
    before = method.memory_s.clone()
    torch.manual_seed(0)
    loss = method(*pair(4), batch)
    assert {*(method.memory_s != before).any(1).nonzero()[:, 0].tolist()} == {*index.tolist()}
    other = build('crd', negatives=10)
    torch.manual_seed(0)
    assert torch.equal(other(*pair(4), batch_of(larger.tolist()))['crd'], loss['crd'])
    assert torch.equal(other.memory_t, method.memory_t)


def test_crd_trains_both_embeddings():
    method = build('crd', negatives=10)
    method(*pair(4), batch_of(range(4)))['crd'].backward()
    assert all(p.grad.any() for p in method.parameters())


def test_crd_with_a_sum_that_would_cancel():
    """Of 16384 negatives, each adds 6e-5 to terms that are log (K / N), some 10, when taken apart."""
    method = build('crd')
    s, t = pair(2)
    torch.manual_seed(0)
    drawn = method.draw(torch.arange(2))
    counts = [numbers[1:].bincount(minlength=SAMPLES) for numbers in drawn]
    torch.manual_seed(0)
    loss = method(s, t, batch_of(range(2)))['crd'].item()
    fresh, expected = build('crd'), 0.0
    c = method.negatives / SAMPLES
    for embed, x, memory, z in ((fresh.embed_s, s, fresh.memory_t, method.z[0]),
                                (fresh.embed_t, t, fresh.memory_s, method.z[1])):
        e = torch.nn.functional.normalize(embed(x.pooled).double(), dim=1)
        p = (e @ memory.double().T / 0.07).exp() / z.double()
        for i in range(2):
            expected -= 0.8 / 2 * ((p[i, i] / (p[i, i] + c)).log() - (counts[i] * (p[i] / c).log1p()).sum()).item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_crd_draws_evenly_from_other_classes():
    targets = torch.tensor([2, 0, 2, 2, 0, 5, 2, 2])  # classes of several sizes; 1, 3 and 4 are empty
    method = build('crd', negatives=20000, mode='relax')
    method.know(targets)
    torch.manual_seed(0)
    drawn = method.draw(torch.arange(8))
    for i, (_, *negatives) in enumerate(drawn.tolist()):
        others = [k for k in range(8) if targets[k] != targets[i]]
        counts = torch.tensor(negatives).bincount(minlength=8)
        assert counts[others].sum() == 20000
        share = 20000 / len(others)
        assert all(abs(count - share) < 5 * math.sqrt(share) for count in counts[others].tolist())
    positives = torch.stack([method.draw(torch.arange(8))[:, 0] for _ in range(60)])
    assert torch.equal(targets[positives], targets.expand(60, 8))
    assert set(positives[:, 0].tolist()) == {0, 2, 3, 6, 7}
    method.mode = 'exact'
    assert torch.equal(method.draw(torch.arange(8))[:, 0], torch.arange(8))


def test_crd_draws_below_its_bounds_and_down_to_zero(monkeypatch):
    """The largest random number, too, and with a bound as of ImageNet: the integer part of bound * number / 2^31."""
    numbers = torch.tensor([0, 1, 12345, 2**30, 2**31 - 2, 2**31 - 1], dtype=torch.int32)
    monkeypatch.setattr(torch.Tensor, 'random_', lambda self: self.copy_(numbers))
    below = torch.tensor([[1], [7], [49500], [1281167]], dtype=torch.int32)
    drawn = crd.uniform((4, 6), below)
    assert drawn.tolist() == [[bound * x // 2**31 for x in numbers.tolist()] for bound in below.flatten().tolist()]
    assert (drawn >= 0).all() and (drawn < below).all()


def test_crd_starts_at_even_embeddings():
    memory = build('crd').memory_s
    assert memory.shape == (SAMPLES, 128) and memory.abs().max() <= math.sqrt(3 / 128)
    assert memory.square().sum(1).mean().item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(memory, build('crd').memory_t) and torch.equal(memory, build('crd').memory_s)


def test_crd_is_restored_with_its_memories():
    method, other = build('crd', negatives=10), build('crd', negatives=10)
    method(*pair(4), batch_of(range(4)))
    assert set(method.state_dict()) == {'z', 'memory_s', 'memory_t', 'embed_s.weight', 'embed_s.bias',
                                        'embed_t.weight', 'embed_t.bias'}
    other.load_state_dict(method.state_dict())
    for _ in range(2):
        losses = []
        for each in (method, other):
            torch.manual_seed(3)
            losses.append(each(*pair(4, seed=1), batch_of(range(4)))['crd'].item())
        assert losses[0] == losses[1]
    assert torch.equal(method.memory_s, other.memory_s) and torch.equal(method.memory_t, other.memory_t)


def test_crd_says_what_it_lacks():
    networks = zoo.make('narrower')
    with pytest.raises(RuntimeError, match='classes of all training samples'):
        DISTILLERS['crd'](*networks)(*pair(2), batch_of(range(2)))
    with pytest.raises(ValueError, match='all training samples are of one'):
        DISTILLERS['crd'](*networks).know(torch.full((9,), 3))
    with pytest.raises(ValueError, match='momentum is 1'):
        DISTILLERS['crd'](*networks, momentum=1.0)


# One rank and two

CASES = [(name, n, local) for name in RELATIONS for n in (5, 1) for local in (False, True)] + [
    ('crd', 5, None), ('crd', 1, None)]
ALIKE = {'sp', 'rkd', 'pkt', 'cc', 'plus'}  # all they return is taken over the whole batch


def outcome(name, n, local, rank, world) -> dict:
    """Two steps on a rank's share of a batch of n: losses and gradients of the last, and what is remembered."""
    method = build(name, **{'negatives': 6} if local is None else {'local': local})
    if name == 'crd':  # the draws of a sample, whichever rank it is on
        method.draw = torch.randint(SAMPLES, (SAMPLES, 7), generator=torch.Generator().manual_seed(0)).__getitem__
    share = list(range(n))[rank::world]
    weight = len(share) * world / n
    share = share or [4]  # computed along, but of no account
    for step in range(2):
        s, t = (Features(*([x[share] for x in field] if isinstance(field, list) else field[share]
                           for field in features(5, network, seed=step))) for network in CHANNELS)
        leaves = [s.logits, s.pooled, s.head, s.maps[-1]]
        for leaf in leaves:
            leaf.requires_grad_()
        method.zero_grad()
        losses = method(s, t, batch_of([4 * i + step for i in share], weight))
        (weight * sum(losses.values())).backward()
    return {'weight': weight, 'losses': {key: loss.item() for key, loss in losses.items()},
            'rows': [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves],
            'parameters': [p.grad for p in method.parameters()], 'state': method.state_dict()}


def on_a_rank(number, rank, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    try:
        torch.save({case: outcome(*case, rank, 2) for case in CASES}, folder / str(rank))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    other = mp.spawn(on_a_rank, (1, folder), join=False)
    on_a_rank(0, 0, folder)  # this process is the other rank: one start less
    while not other.join():
        pass
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(2)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name, n', [(name, n) for name, n, local in CASES if not local])
def test_two_ranks_are_one(name, n, two_ranks):
    case = (name, n, None if name == 'crd' else False)
    ranks, whole = [rank[case] for rank in two_ranks], outcome(*case, 0, 1)
    assert [rank['weight'] for rank in ranks] == ([1.2, 0.8] if n == 5 else [2.0, 0.0])
    for key, loss in whole['losses'].items():
        assert sum(rank['weight'] * rank['losses'][key] for rank in ranks) / 2 == pytest.approx(loss, rel=1e-4), key
        if name in ALIKE:
            assert [rank['losses'][key] for rank in ranks] == pytest.approx([loss] * 2, rel=1e-4), key
    for grad, *parts in zip(whole['rows'], *(rank['rows'] for rank in ranks)):
        for r, part in enumerate(parts):
            close(part / 2, grad[r::2] if r < n else torch.zeros_like(grad))
    assert n == 1 or any(grad.any() for grad in whole['rows'])
    for grad, *parts in zip(whole['parameters'], *(rank['parameters'] for rank in ranks)):
        close(sum(parts) / 2, grad)
    for key, value in whole['state'].items():  # as z and the memories of CRD
        assert torch.equal(ranks[0]['state'][key], ranks[1]['state'][key]), key
        close(ranks[0]['state'][key], value)


@pytest.mark.parametrize('name', RELATIONS)
def test_local_relations_are_those_of_the_share(name, two_ranks):
    """Each rank's loss is that of a process which knows of no other samples."""
    for n in (5, 1):
        for r, rank in enumerate(two_ranks):
            alone = outcome(name, n, False, r, 2)  # the share of a rank, on one that has no peers
            mine = rank[name, n, True]
            assert mine['losses'] == pytest.approx(alone['losses'], rel=1e-4)
            for a, b in zip(mine['rows'], alone['rows']):
                close(a, b)
    if name != 'srd':  # whose default loss has no relation
        assert two_ranks[0][name, 5, True]['losses'] != two_ranks[0][name, 5, False]['losses']
