"""Methods that compare maps, against slow formulations: FitNet, AT, NST, VID, KDSVD, OFD, AB, FSP."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import PAIRS, make, make_batch

from distillers import Distillation
from distillers.ab import AB
from distillers.at import AT
from distillers.base import by_the_batch, probe
from distillers.fitnet import FitNet
from distillers.fsp import FSP
from distillers.kdsvd import KDSVD, right_vectors
from distillers.mgd import margins_of
from distillers.nst import NST, discrepancy
from distillers.ofd import OFD
from distillers.parts import Regressor
from distillers.vid import VID
from models import Features, create_model


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shown(which, size=8, n=3):
    """Random features in the shapes that a pair of the zoo has, with negative values left in the maps."""
    both = []
    for seed, how in enumerate(PAIRS[which]):
        sizes = size // np.cumprod(how['strides'])
        preact, maps = ([random(n, c, hw, hw, seed=10 * k + seed + more).requires_grad_(not seed)
                         for k, (c, hw) in enumerate(zip(how['channels'], sizes))] for more in (0, 5))
        both.append(Features(torch.zeros(n, 5), None, None, preact, maps))
    return both


def slow_smaller(a, b):
    """Two maps at the smaller size, by blocks."""
    size = min(a.shape[2], b.shape[2])
    return [x.unflatten(3, (size, -1)).unflatten(2, (size, -1)).mean((3, 5)) for x in (a, b)]


def value(method, s, t):
    (loss,) = method(s, t, None).values()
    assert loss.dtype == torch.float32
    return loss.item()


# AT

@pytest.mark.parametrize('which', ['same', 'narrower', 'smaller maps', 'larger maps', 'fewer stages'])
@pytest.mark.parametrize('p', [1.0, 2.0, 3.0])
def test_at_is_the_formula(which, p):
    s, t = shown(which)
    n = min(len(s.maps), len(t.maps))
    expected = 0.0
    for pair in zip(s.maps[-n:], t.maps[-n:]):
        attention = []
        for f in slow_smaller(*pair):
            rows = [[sum(abs(v)**p for v in pixel) / len(pixel) for pixel in image]
                    for image in f.flatten(2).mT.tolist()]
            attention.append([[a / math.sqrt(sum(b * b for b in row)) for a in row] for row in rows])
        terms = [(a - b)**2 for row_a, row_b in zip(*attention) for a, b in zip(row_a, row_b)]
        expected += sum(terms) / len(terms)
    assert value(AT(*make(which), p=p, weight=7.0), s, t) == pytest.approx(7 * expected, rel=1e-5)


def test_at_refuses_a_power_whose_slope_is_infinite():
    with pytest.raises(ValueError, match=r'p is 0\.5'):
        AT(*make('same'), p=0.5)


# NST

def slow_discrepancy(f_s, f_t):
    """[N, C, P], by pairs of channels."""
    def mean_kernel(a, b):
        return sum(sum(u * v for u, v in zip(x, y))**2 for x in a for y in b) / (len(a) * len(b))
    each = [mean_kernel(b, b) + mean_kernel(a, a) - 2 * mean_kernel(a, b) for a, b in zip(f_s.tolist(), f_t.tolist())]
    return sum(each) / len(each)


@pytest.mark.parametrize('c_s, c_t, pixels, gram', [
    (3, 2, 30, False), (4, 9, 3, True), (8, 8, 11, True), (8, 8, 12, False),
])
def test_nst_by_channels_and_by_pixels(c_s, c_t, pixels, gram, monkeypatch):
    f_s, f_t = (F.normalize(random(2, c, pixels, seed=c), dim=2) for c in (c_s, c_t))
    f_t = f_t.flip(2)
    calls = []
    monkeypatch.setattr('distillers.nst.kernel', lambda a, b: calls.append(0) or (a @ b.mT).square().mean())
    assert discrepancy(f_s, f_t).item() == pytest.approx(slow_discrepancy(f_s, f_t), rel=1e-9)
    assert gram == (not calls)


@pytest.mark.parametrize('which', ['narrower', 'smaller maps', 'more stages'])
def test_nst_is_the_formula(which):
    s, t = shown(which)
    expected = sum(slow_discrepancy(*(x.flatten(2) / x.flatten(2).norm(dim=2, keepdim=True)
                                      for x in slow_smaller(*pair))) for pair in zip(s.maps[-3:], t.maps))
    assert value(NST(*make(which), weight=3.0), s, t) == pytest.approx(3 * expected, rel=1e-5)


@pytest.mark.parametrize('method', [AT, NST])
def test_single_pixels_are_refused_where_no_pair_has_more(method):
    """Brought to length 1 over the pixels of an image, they are all the same."""
    (deep, _), (teacher, _) = make('one pixel'), make('same')
    with pytest.raises(ValueError, match=r'have a single pixel.*--image-size'):
        method(deep, teacher)
    shallow = type(teacher)((8, 12), (4, 4))
    assert method(shallow, teacher).pairing == [(0, 1), (1, 2)]


# VID

@pytest.mark.parametrize('which', ['narrower', 'smaller maps', 'larger maps'])
def test_vid_is_the_formula(which):
    s, t = shown(which)
    method = VID(*make(which), variance=2.0, weight=3.0)
    for stage in method.stages:
        nn.init.uniform_(stage.rho, -1, 2)
    expected = 0.0
    for stage, *pair in zip(method.stages, s.maps, t.maps):
        f_s, f_t = slow_smaller(*pair)
        mean = stage.regressor(f_s.float()).tolist()
        variances = [math.log(1 + math.exp(rho)) + 1e-5 for rho in stage.rho.flatten().tolist()]
        terms = [0.5 * ((m - f)**2 / v + math.log(v)) for image_m, image_f in zip(mean, f_t.tolist())
                 for v, rows_m, rows_f in zip(variances, image_m, image_f)
                 for row_m, row_f in zip(rows_m, rows_f) for m, f in zip(row_m, row_f)]
        expected += sum(terms) / len(terms)
    assert value(method, s, t) == pytest.approx(3 * expected, rel=1e-5)


@pytest.mark.parametrize('variance', [2e-5, 0.1, 5.0, 1000.0])
def test_vid_begins_with_the_variance_it_is_given(variance):
    rho = VID(*make('same'), variance=variance).stages[0].rho
    assert (F.softplus(rho) + 1e-5).detach().flatten().tolist() == pytest.approx([variance] * rho.numel(), rel=1e-4)


@pytest.mark.parametrize('variance', [0.0, 1e-5, -1.0, math.inf, math.nan])
def test_vid_refuses_what_is_no_variance(variance):
    with pytest.raises(ValueError, match=f'^variance is {variance}, but'):
        VID(*make('same'), variance=variance)


def test_vid_trains_its_variances():
    """Published code that keeps them in a plain list leaves them at 5."""
    s, t = shown('same')
    method = VID(*make('same'))
    start = [F.softplus(stage.rho) + 1e-5 for stage in method.stages]
    assert all(v.flatten().tolist() == pytest.approx([5.0] * len(v), abs=1e-5) for v in start)
    optimizer = torch.optim.SGD([p for name, p in method.named_parameters() if name.endswith('rho')], lr=50.0)
    for _ in range(60):
        optimizer.zero_grad()
        method(s, t, None)['vid'].backward()
        optimizer.step()
    for stage, f_s, f_t in zip(method.stages, s.maps, t.maps):  # the best variance is that of the error
        error = (stage.regressor(f_s.float()) - f_t).square().mean((0, 2, 3))
        torch.testing.assert_close((F.softplus(stage.rho) + 1e-5).flatten(), error.float(), rtol=0.02, atol=0)


# KDSVD

def slow_kdsvd(maps_s, maps_t, k, form):
    """Image by image, with numpy."""
    def vectors(f, keep):
        x = f.detach().numpy()
        x = x.reshape(len(x), -1).T if form == 'channel' else x.reshape(-1, x.shape[2])
        _, values, rows = np.linalg.svd(x, full_matrices=False)
        return rows[:keep], values[:keep]

    total = 0.0
    for b in range(len(maps_t[0])):
        before = None
        for f_s, f_t in zip(maps_s, maps_t):
            (rows_t, values), (rows_s, _) = vectors(f_t[b], k), vectors(f_s[b], k + 3)
            now = []
            for row, factor in zip(rows_t, values / math.sqrt(sum(values**2))):
                row = row * (1 if max(row, key=abs) > 0 else -1)
                best = max(rows_s, key=lambda candidate: abs(candidate @ row))
                best = best * (1 if best @ row > 0 else -1)
                now.append((best * factor, row * factor))
            for pair, pair_before in zip(now, before or []):
                r_s, r_t = (np.exp(-(a[:, None] - c[None])**2 / 8) for a, c in zip(pair, pair_before))
                total += ((r_s - r_t)**2).sum()
            before = now
    return total / len(maps_t[0])


@pytest.mark.parametrize('which, form', [('same', 'channel'), ('smaller maps', 'channel'), ('same', 'width'),
                                         ('narrower', 'width')])
@pytest.mark.parametrize('k', [1, 2])
def test_kdsvd_is_the_formula(which, form, k):
    s, t = shown(which, size=32 if which == 'smaller maps' else 16)
    method = KDSVD(*make(which), k=k, form=form, weight=3.0)
    expected = 3 * slow_kdsvd(s.maps, t.maps, k, form)
    assert expected > 0 and value(method, s, t) == pytest.approx(expected, rel=1e-4)


def test_kdsvd_of_fewer_vectors_than_asked_for():
    s, t = shown('same', size=4)  # the deepest map is one pixel
    expected = value(KDSVD(*make('same'), k=1), s, t)
    assert expected > 0 and value(KDSVD(*make('same'), k=5), s, t) == expected


@pytest.mark.parametrize('shape', [(3, 9, 5), (3, 5, 9), (2, 6, 6)])
def test_right_vectors_and_their_gradient_are_those_of_a_decomposition(shape):
    x, weight, k = random(*shape).requires_grad_(), random(shape[0], shape[2], shape[2], seed=1), 2

    def of(v):  # indifferent to signs
        return sum((v[..., i, None] * v[..., None, :, i] * weight).sum() * (i + 1) for i in range(k))

    v, values = right_vectors(x, k)
    _, S, Vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(values, S[:, :k].float())
    assert of(v).item() == pytest.approx(of(Vh.mT).item(), rel=1e-4)
    mine, theirs = (torch.autograd.grad(of(y), x)[0] for y in (v, Vh.mT))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('shape', [(64, 32), (20, 40)])
def test_right_vectors_of_an_image_with_silent_channels_have_their_gradient(shape):
    """Singular values of 0 repeat, which the gradient of torch's decomposition does not survive."""
    x, weight, change = random(*shape).abs(), random(shape[1], seed=1), random(*shape, seed=2)
    x[:, :25] = 0

    def first(x):
        v = np.linalg.svd(x.detach().numpy())[2][0]
        return abs(v @ weight.numpy())

    expected = (first(x + 1e-5 * change) - first(x - 1e-5 * change)) / 2e-5
    x = x[None].requires_grad_()
    (right_vectors(x, 1)[0][0, :, 0].double() @ weight).abs().backward()
    assert (x.grad[0] * change).sum().item() == pytest.approx(expected, rel=1e-3)


def test_singular_values_that_are_zero_but_for_rounding_are_numbers():
    x = random(20, 9, 1) @ random(20, 1, 4, seed=1)
    _, values = right_vectors(x, 4)
    assert values.isfinite().all() and (values[:, 1:] < 1e-2 * values[:, :1]).all()


@pytest.mark.parametrize('factor', [1e30, 1e-30])
def test_right_vectors_are_those_of_features_of_any_size(factor):
    x = random(3, 9, 5).float()
    large = (x * factor).requires_grad_()
    (v, values), (expected, sizes) = right_vectors(large, 2), right_vectors(x, 2)
    torch.testing.assert_close((v.abs(), values / factor), (expected.abs(), sizes))
    v.square().sum((1, 2)).sub(v[..., 0].sum(1)).sum().backward()
    assert large.grad.isfinite().all() and large.grad.any()


@pytest.mark.parametrize('fill', [0.0, 1.0])
def test_kdsvd_of_a_constant_image_has_a_finite_gradient(fill):
    s, t = shown('same')
    for f in s.maps:
        f.data[0] = fill
    KDSVD(*make('same'))(s, t, None)['kdsvd'].backward()
    assert all(f.grad.abs().max() < 1 and f.grad[1:].any() for f in s.maps)


def test_kdsvd_of_features_that_are_not_finite_is_not_finite():
    s, t = shown('same')
    s.maps[1].data[1, 2, 3, 1] = math.inf
    assert not math.isfinite(value(KDSVD(*make('same')), s, t))


@pytest.mark.parametrize('which, how, message', [
    ('narrower', {}, '4 and 8 channels .* width'), ('smaller maps', {'form': 'width'}, 'columns .* channel'),
])
def test_kdsvd_refuses_vectors_of_unequal_length(which, how, message):
    with pytest.raises(ValueError, match=message):
        KDSVD(*make(which), **how)


# FSP

@pytest.mark.parametrize('which', ['same', 'smaller maps', 'larger maps'])
def test_fsp_is_the_formula(which):
    s, t = shown(which)
    expected = 0.0
    for k in range(2):
        flows = []
        for x in (s, t):
            a, b = (f.flatten(2).tolist() for f in slow_smaller(x.maps[k], x.maps[k + 1]))
            flows.append([sum(u * v for u, v in zip(p, q)) / len(p) for i, j in zip(a, b) for p in i for q in j])
        expected += sum((u - v)**2 for u, v in zip(*flows)) / len(flows[0])
    assert value(FSP(*make(which), weight=3.0), s, t) == pytest.approx(3 * expected, rel=1e-5)


def test_fsp_refuses_unequal_channels():
    with pytest.raises(ValueError, match='4 and 8 channels'):
        FSP(*make('narrower'))


# FitNet

@pytest.mark.parametrize('which', ['narrower', 'smaller maps', 'larger maps', 'fewer stages'])
def test_fitnet_is_the_formula(which):
    s, t = shown(which)
    method = FitNet(*make(which), weight=3.0)
    stage_t = {'fewer stages': 2}.get(which, 1)
    assert t.maps[stage_t].shape[2] == {'fewer stages': 2}.get(which, 4)
    guess = method.regressor.layers[0](s.maps[1].float())
    mean, var = guess.mean((0, 2, 3), keepdim=True), guess.var((0, 2, 3), keepdim=True, unbiased=False)
    guess, hint = ((guess - mean) / (var + 1e-5).sqrt()).flatten().tolist(), t.maps[stage_t].flatten().tolist()
    expected = sum((max(g, 0) - h)**2 for g, h in zip(guess, hint, strict=True)) / len(hint)
    assert value(method, s, t) == pytest.approx(3 * expected, rel=1e-5)


@pytest.mark.parametrize('size_s, size_t, kernel, size', [
    (8, 8, 1, 8), (8, 4, 3, 4), (4, 8, 4, 8), (16, 4, 1, 4), (4, 16, 1, 4), (6, 4, 1, 4), (5, 8, 1, 5),
])
def test_regressor_brings_maps_to_one_size(size_s, size_t, kernel, size):
    f_s, f_t = random(2, 3, size_s, size_s), random(2, 5, size_t, size_t)
    regressor = Regressor(f_s.shape, f_t.shape)
    guess, hint = regressor(f_s, f_t)
    assert guess.shape == hint.shape == (2, 5, size, size) and guess.dtype == hint.dtype == torch.float32
    conv = regressor.layers[0]
    assert conv.kernel_size == (kernel, kernel) and conv.bias is not None
    assert isinstance(conv, nn.ConvTranspose2d) == (kernel == 4)
    if max(size_s, size_t) % size == 0:
        expected = slow_smaller(torch.zeros(1, 1, size, size), f_t)[1]
        torch.testing.assert_close(hint, expected.float())
        if kernel == 1:
            expected = regressor.layers(slow_smaller(f_s, torch.zeros(1, 1, size, size))[0].float())
            torch.testing.assert_close(guess, expected)


def test_regressor_meets_sizes_that_it_was_not_built_for():
    for built, met in (((8, 4), (7, 3)), ((4, 8), (4, 7)), ((8, 4), (4, 4))):
        regressor = Regressor(*(torch.Size([1, c, hw, hw]) for c, hw in zip((3, 5), built)))
        guess, hint = regressor(*(random(2, c, hw, hw) for c, hw in zip((3, 5), met)))
        assert guess.shape == hint.shape


def test_fitnet_refuses_a_stage_without_partner():
    with pytest.raises(ValueError, match=r'stage 1 .* these have one: 2, 3, 4'):
        FitNet(*make('more stages'), stage=1)
    for stage, expected in ((2, 0), (4, 2)):
        assert FitNet(*make('more stages'), stage=stage).stage_t == expected


def test_fitnet_takes_the_hint_it_is_told():
    student, teacher = (create_model(name, 100) for name in ('cifar_mobilenet_v2_x1_0', 'wrn_40_4'))
    student.image_size = teacher.image_size = 32
    assert FitNet(student, teacher, stage=3).stage_t == 1  # by depth
    method = FitNet(student, teacher, stage=3, stage_t=3)
    s, t = probe(student), probe(teacher)
    guess, hint = method.regressor(s.maps[2], t.maps[2])
    assert method.stage_t == 2 and guess.shape == hint.shape == (1, 256, 8, 8)
    assert torch.equal(hint, t.maps[2])
    for stage, stage_t, says in ((3, 4, 'has 3 stages, and no stage 4'), (5, 3, 'these have one: 1, 2, 3, 4')):
        with pytest.raises(ValueError, match=says):
            FitNet(student, teacher, stage=stage, stage_t=stage_t)


# AB

@pytest.mark.parametrize('which', ['same', 'narrower', 'smaller maps', 'larger maps'])
def test_ab_is_the_formula(which):
    s, t = shown(which)
    method, margin = AB(*make(which), margin=1.5, weight=3.0), 1.5
    expected = 0.0
    for factor, regressor, *pair in zip((0.25, 0.5, 1), method.regressors, s.preact, t.preact):
        guess, truth = regressor(*pair)
        for a, b in zip(guess.flatten().tolist(), truth.flatten().tolist(), strict=True):
            if a > -margin and b <= 0:
                expected += factor * (a + margin)**2
            if a <= margin and b > 0:
                expected += factor * (a - margin)**2
    assert value(method, s, t) == pytest.approx(3 * 3 / 1000 * expected / 3, rel=1e-5)
    assert (sum(p.numel() for p in method.parameters()) == 0) == (which == 'same')


# OFD

@pytest.mark.parametrize('which', ['narrower', 'smaller maps', 'larger maps', 'more stages'])
def test_ofd_is_the_formula(which):
    s, t = shown(which)
    student, teacher = make(which)
    method, repeat = OFD(student, teacher, weight=0.1), torch.Tensor.repeat_interleave
    expected = 0.0
    for factor, stage, norm, f_s, f_t in zip((0.25, 0.5, 1), method.stages, teacher.norms, s.preact[-3:], t.preact):
        assert torch.equal(stage.margins, margins_of(norm)) and (stage.margins < 0).all()
        a = stage.connector(f_s.float())
        times = a.shape[2] // f_t.shape[2]
        f_t = repeat(repeat(f_t, times, 2), times, 3) if times else slow_smaller(a, f_t)[1]
        margins = stage.margins[:, None, None].expand_as(a)
        for x, y, m in zip(*(v.flatten().tolist() for v in (a, f_t, margins)), strict=True):
            target = max(y, m)
            if x > target or target > 0:
                expected += factor * (x - target)**2
    assert value(method, s, t) == pytest.approx(0.1 * expected / 3, rel=1e-5)


def test_ofd_measures_the_margins_that_no_norm_tells_once():
    student, teacher = make('no norm')
    method = OFD(student, teacher)
    batches = [make_batch(seed=0), make_batch(n=3, seed=1)]
    Distillation(student, teacher, {'ofd': method}).start_epoch(1, lambda: batches)
    seen = teacher(torch.cat([batch.images for batch in batches]), features=True).preact
    for stage, f_t in zip(method.stages, seen):
        for c, margin in enumerate(stage.margins.tolist()):
            below = [x for x in f_t[:, c].flatten().tolist() if x < 0]
            assert margin == pytest.approx(sum(below) / len(below) if below else 0, rel=1e-5)

    def nobody_asks():
        raise AssertionError
    method.start_epoch(2, nobody_asks)
    resumed = OFD(student, teacher)
    resumed.load_state_dict(method.state_dict())
    resumed.start_epoch(2, nobody_asks)
    OFD(*make('same')).start_epoch(1, nobody_asks)


def test_ofd_leaves_the_teachers_statistics_be():
    """Published code runs the teacher in train mode, and its running statistics drift."""
    student, teacher = make('same')
    batch, before = make_batch(), copy.deepcopy(teacher.state_dict())
    expected = {'eval': teacher(batch.images, features=True),
                'batch': copy.deepcopy(teacher).train()(batch.images, features=True)}
    for mode, t in expected.items():
        method = OFD(student, teacher, teacher_bn=mode)
        task = Distillation(student.eval(), teacher, {'ofd': method})
        s = student(batch.images, features=True)
        assert task(batch)[1]['ofd'].item() == pytest.approx(method(s, t, batch)['ofd'].item(), rel=1e-5)
        assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    with by_the_batch(teacher, True):
        assert not torch.equal(expected['eval'].logits, teacher(batch.images))


def test_ofd_connectors_start_as_published():
    torch.manual_seed(0)
    student, teacher = create_model('resnet8x4', 100), create_model('resnet32x4', 100)
    for stage, c in zip(OFD(student, teacher).stages, (64, 128, 256)):
        assert stage.connector[0].weight.std().item() == pytest.approx(math.sqrt(2 / c), rel=0.05)


# All of them

@pytest.mark.parametrize('method, expected', [(FitNet, 16768), (VID, 258048 + 64 + 128 + 256), (OFD, 86912)])
def test_number_of_weights_is_the_published_one(method, expected):
    method = method(create_model('resnet8x4', 100), create_model('resnet32x4', 100))
    assert sum(p.numel() for p in method.parameters()) == expected


@pytest.mark.parametrize('method', [AT, NST, KDSVD, FSP])
def test_of_equal_maps_is_zero(method):
    student, _ = make('same')
    s = probe(student)
    assert value(method(student, student), s, s) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize('method', [AT, NST, KDSVD, FSP])
def test_mixed_precision_does_not_round_the_loss(method):
    s, t = shown('same')
    method = method(*make('same'))
    expected = value(method, s, t)
    with torch.autocast('cpu', torch.bfloat16):
        assert value(method, s, t) == expected


@pytest.mark.parametrize('method', [KDSVD, FSP])
def test_a_single_pair_of_stages_is_refused(method, monkeypatch):
    monkeypatch.setattr(f'{method.__module__}.stage_pairs', lambda *_: [(2, 2)])
    with pytest.raises(ValueError, match='one pair is all there is'):
        method(*make('same'))
