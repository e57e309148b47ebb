"""ReviewKD, Exp-KD, SRD, SRD with DIST, SimKD and FT against slow formulations."""
import copy
import math

import pytest
import torch
import torch.distributed as dist
import zoo
from conftest import assert_close, assert_same
from torch.nn.parallel import DistributedDataParallel

from distillers import DISTILLERS, Distillation
from distillers.expkd import ExpKD
from distillers.ft import FT
from distillers.reviewkd import ReviewKD, hcl
from distillers.simkd import SimKD
from distillers.srd import SRD
from distillers.srdwithdist import SRDwithDIST
from models import Features, create_model
from utils import distributed

HERE = ['reviewkd', 'expkd', 'srd', 'srdwithdist', 'simkd', 'ft']


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looks(pair, n=3, seed=0, size=16):
    """Both networks and their features of some images, the student's as leaves."""
    student, teacher = zoo.make(pair)
    images = zoo.make_batch(n, size, seed).images
    s, t = student(images, features=True), teacher(images, features=True)
    s = Features(*([x.detach().requires_grad_() for x in field] if isinstance(field, list)
                   else field.detach().requires_grad_() for field in s))
    return student, teacher, s, t


# Slow parts, in float64

def bn(x):
    """A fresh norm in training."""
    x = x.double()
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    return (x - mean) / (var + 1e-5).sqrt()


def conv1(x, conv):
    """A convolution of one pixel."""
    y = torch.einsum('oi,nihw->nohw', conv.weight[:, :, 0, 0].double(), x.double())
    return y if conv.bias is None else y + conv.bias.double().view(-1, 1, 1)


def conv3(x, conv):
    """3 x 3, by its nine shifts."""
    h, w = x.shape[2:]
    padded = torch.zeros(*x.shape[:2], h + 2, w + 2, dtype=torch.float64)
    padded[:, :, 1:-1, 1:-1] = x.double()
    return sum(torch.einsum('oi,nihw->nohw', conv.weight[:, :, i, j].double(), padded[:, :, i:i + h, j:j + w])
               for i in range(3) for j in range(3))


def nearest(x, size):
    rows, columns = ([i * old // new for i in range(new)] for old, new in zip(x.shape[2:], size))
    return x[:, :, rows][:, :, :, columns]


def averaged(x, size):
    """Means over bins that cover the map evenly."""
    h, w = x.shape[2:]
    bins = [[x[:, :, i * h // size[0]:-(-(i + 1) * h // size[0]), j * w // size[1]:-(-(j + 1) * w // size[1])]
             .mean((2, 3)) for j in range(size[1])] for i in range(size[0])]
    return torch.stack([torch.stack(row, 2) for row in bins], 2)


def mse(a, b):
    return sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist())) / a.numel()


def softmax(row):
    return [math.exp(x) / sum(math.exp(y) for y in row) for x in row]


def slow_kl(z_s, z_t, T):
    total = 0.0
    for row_s, row_t in zip(z_s.tolist(), z_t.tolist()):
        p_s, p_t = softmax([z / T for z in row_s]), softmax([z / T for z in row_t])
        total += sum(q * math.log(q / p) for p, q in zip(p_s, p_t))
    return T * T * total / len(z_s)


def slow_apart(a, b):
    """1 - mean correlation of rows."""
    total = 0.0
    for x, y in zip(a.tolist(), b.tolist()):
        x, y = ([value - sum(row) / len(row) for value in row] for row in (x, y))
        total += sum(p * q for p, q in zip(x, y)) / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))
    return 1 - total / len(a)


# ReviewKD

def slow_hcl(a, b):
    terms, share = [(1.0, mse(a, b))], 1.0
    for size in (4, 2, 1):
        if size < a.shape[2]:
            share /= 2
            terms.append((share, mse(averaged(a, (size, size)), averaged(b, (size, size)))))
    return sum(w * term for w, term in terms) / sum(w for w, _ in terms)


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 7, 8])
def test_hcl(size):
    a, b = random(2, 3, size, size), random(2, 3, size, size, seed=1)
    assert hcl(a, b).item() == pytest.approx(slow_hcl(a, b), rel=1e-9)


@pytest.mark.parametrize('preact', [False, True])
@pytest.mark.parametrize('pair', ['narrower', 'larger maps', 'smaller maps', 'more stages', 'fewer stages',
                                  'later head'])
def test_reviewkd_is_the_formula(pair, preact):
    student, teacher, s, t = looks(pair)
    method = ReviewKD(student, teacher, weight=3.0, max_mid=10, student_preact=preact)
    n = min(len(s.maps), len(t.maps))
    levels = list(zip(method.fusions, [*(s.preact if preact else s.maps)[-n:], s.pooled.view(*s.pooled.shape, 1, 1)],
                      [*t.preact[-n:], t.pooled.view(*t.pooled.shape, 1, 1)], strict=True))
    expected, review = 0.0, None
    with torch.no_grad():
        for fuse, f_s, f_t in levels[::-1]:
            f = bn(conv1(f_s, fuse.enter[0]))
            if review is not None:
                deeper = nearest(review, f.shape[2:])
                a = conv1(torch.cat((f, deeper), 1), fuse.attention).sigmoid()
                f = f * a[:, :1] + deeper * a[:, 1:]
            review = nearest(f, f_t.shape[2:])
            expected += slow_hcl(bn(conv3(review, fuse.leave[0])), f_t)
    assert method(s, t, None)['reviewkd'].item() == pytest.approx(3 * expected, rel=1e-4)


def test_reviewkd_has_the_published_number_of_parameters():
    student, teacher = create_model('resnet8x4', 100), create_model('resnet32x4', 100)
    method = ReviewKD(student, teacher)
    assert [fuse.enter[0].in_channels for fuse in method.fusions] == [64, 128, 256, 256]
    assert sum(p.numel() for p in method.parameters()) == 1_808_774
    bound = math.sqrt(3 / 64)  # of kaiming's uniform distribution with a = 1
    weight = method.fusions[0].enter[0].weight
    assert 0.99 * bound < weight.abs().max() <= bound


def test_reviewkd_fuses_in_no_more_channels_than_asked_for():
    student, teacher = zoo.make('narrower')
    for max_mid, mid in ((512, 8), (5, 5)):
        assert {fuse.enter[0].out_channels for fuse in ReviewKD(student, teacher, max_mid=max_mid).fusions} == {mid}


def test_reviewkd_warms_up():
    student, teacher, s, t = looks('same')
    method = ReviewKD(student, teacher, warmup=4)
    full = method(s, t, None)['reviewkd'].item()
    for epoch, share in ((1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
        method.start_epoch(epoch, None)
        assert method(s, t, None)['reviewkd'].item() == pytest.approx(share * full)


def test_reviewkd_trains_on_a_single_image():
    student, teacher, s, t = looks('narrower', n=1)
    method = ReviewKD(student, teacher)
    loss = method(s, t, None)['reviewkd']
    loss.backward()
    assert loss.isfinite() and s.maps[-1].grad.any() and all(p.grad.isfinite().all() for p in method.parameters())


# Exp-KD

def bilinear(x, size):
    """[K, h, w] -> [K, *size], pixel centres aligned, edges continued."""
    def weights(old, new):
        rows = torch.zeros(new, old, dtype=torch.float64)
        for i in range(new):
            at = max((i + 0.5) * old / new - 0.5, 0.0)
            low = min(int(at), old - 1)
            high = min(low + 1, old - 1)
            rows[i, low] += 1 - (at - low)
            rows[i, high] += at - low
        return rows
    return torch.einsum('ih,khw,jw->kij', weights(x.shape[1], size[0]), x, weights(x.shape[2], size[1]))


def slow_expkd(f_s, w_s, f_t, w_t, z_t, T=1.0, topk=0, reduce='mean', relu=True):
    """Image by image and pixel by pixel; differentiable."""
    total, size = 0.0, [max(a, b) for a, b in zip(f_s.shape[2:], f_t.shape[2:])]
    for b in range(len(f_s)):
        order = sorted(range(len(w_t)), key=lambda c: -z_t[b, c].item())
        kept = order[:topk] if topk else order
        maps = []
        for f, w in ((f_s[b], w_s), (f_t[b], w_t)):
            cam = torch.stack([sum(w[c, d] * f[d] for d in range(len(f))) / (len(f) if reduce == 'mean' else 1)
                               for c in kept])
            maps.append(bilinear(cam.clamp(min=0) if relu else cam, size))
        for y in range(size[0]):
            for x in range(size[1]):
                (e_s, e_t) = ((m[:, y, x] / T).exp() for m in maps)
                total = total + ((e_s / e_s.sum() - e_t / e_t.sum()) ** 2).sum()
    return total / len(f_s)


@pytest.mark.parametrize('pair, how', [
    ('narrower', {}), ('narrower', {'reduce': 'sum'}), ('narrower', {'relu': False}), ('narrower', {'topk': 3}),
    ('narrower', {'temperature': 0.3}), ('larger maps', {'topk': 2}), ('smaller maps', {'reduce': 'sum'}),
    ('later head', {}),
])
def test_expkd_is_the_formula_and_its_gradient_is_right(pair, how):
    student, teacher, s, t = looks(pair, n=2)
    z_t = random(2, zoo.CLASSES, seed=5)  # the likeliest classes are those of the logits given
    f_s = s.head.detach().double().requires_grad_()
    w_s = student.classifier.weight.detach().double().requires_grad_()
    expected = slow_expkd(f_s, w_s, t.head.double(), teacher.classifier.weight.double(), z_t,
                          **{'T' if key == 'temperature' else key: value for key, value in how.items()})
    gradients = torch.autograd.grad(expected, (f_s, w_s))

    loss = ExpKD(student, teacher, weight=7.0, **how)(s, t._replace(logits=z_t), None)['expkd']
    loss.backward()
    assert loss.item() == pytest.approx(7 * expected.item(), rel=1e-4)
    for ours, right in zip((s.head.grad, student.classifier.weight.grad), gradients):
        assert right.abs().max() > 1e-7  # the published code gave 2.7e-19
        torch.testing.assert_close(ours.double(), 7 * right, rtol=1e-3, atol=1e-4 * right.abs().max().item())


def test_expkd_tells_classes_apart_not_images():
    """Batch mates have no say: the loss of a batch is the mean of those of its images, which are not 0."""
    student, teacher, s, t = looks('narrower', n=4)
    method = ExpKD(student, teacher)
    alone = [method(s._replace(head=s.head[i:i + 1]), t._replace(head=t.head[i:i + 1]), None)['expkd'].item()
             for i in range(4)]
    assert min(alone) > 0 and method(s, t, None)['expkd'].item() == pytest.approx(sum(alone) / 4, rel=1e-4)


def test_expkd_of_the_teacher_itself_is_zero():
    _, teacher, _, t = looks('same')
    assert ExpKD(teacher, copy.deepcopy(teacher))(t, t, None)['expkd'].item() == 0


def test_expkd_borrows_the_students_classifier():
    student, teacher = zoo.make('narrower')
    task = Distillation(student, teacher, {'expkd': ExpKD(student, teacher)}).to('cpu', torch.float64)
    method = task.distillers['expkd']
    assert method.classifier_s is student.classifier and method.weight_t.dtype == torch.float64
    assert not list(method.parameters()) and not method.state_dict()
    other = copy.deepcopy(task)
    assert other.distillers['expkd'].classifier_s is other.student.classifier is not student.classifier


def test_expkd_refuses_what_cannot_work():
    student, teacher = zoo.make('same')
    with pytest.raises(ValueError, match='topk is 1'):
        ExpKD(student, teacher, topk=1)
    student.classifier = torch.nn.Linear(16, 7)
    with pytest.raises(ValueError, match='7 classes and the teacher 5'):
        ExpKD(student, teacher)


# SRD and SRD with DIST

def slow_regression(method, s, t, teacher):
    """The connector's map and the student's logits."""
    with torch.no_grad():
        f = bn(conv1(s.head, method.regression.connector[0])).clamp(min=0)
        w, b = teacher.classifier.weight.double(), teacher.classifier.bias.double()
        return f, f.mean((2, 3)) @ w.T + b, t.head.double().mean((2, 3)) @ w.T + b


def slow_features(f_s, f_t):
    size = [min(a, b) for a, b in zip(f_s.shape[2:], f_t.shape[2:])]
    return mse(averaged(f_s, size), averaged(f_t.double(), size))


SLOW_LOGIT = {
    'mse': mse,
    'kl': lambda z_s, z_t: slow_kl(z_s, z_t, 4.0),  # one softmax; of softmaxes it would be hundreds of times smaller
    'pmse': lambda z_s, z_t: mse(*(torch.tensor([softmax(row) for row in z.tolist()]) for z in (z_s, z_t))),
    'dist': lambda z_s, z_t: slow_apart(z_s, z_t) + slow_apart(z_s.T, z_t.T),
}


@pytest.mark.parametrize('logit', SLOW_LOGIT)
@pytest.mark.parametrize('pair, feat', [('narrower', 'mean'), ('narrower', 'full'), ('smaller maps', 'full'),
                                        ('larger maps', 'full'), ('later head', 'mean')])
def test_srd_is_the_formula(pair, feat, logit):
    student, teacher, s, t = looks(pair)
    method = SRD(student, teacher, feat=feat, logit=logit, feature_weight=2.0, logit_weight=3.0)
    losses = method(s, t, zoo.make_batch(3))
    f, z_s, z_t = slow_regression(method, s, t, teacher)
    feature = slow_features(f, t.head) if feat == 'full' else mse(f.mean((2, 3)), t.head.mean((2, 3)))
    assert losses['srd_feature'].item() == pytest.approx(2 * feature, rel=1e-4)
    assert losses['srd_logit'].item() == pytest.approx(3 * SLOW_LOGIT[logit](z_s, z_t), rel=1e-3)


def test_srd_starts_as_published():
    connector = SRD(create_model('resnet8x4', 10), create_model('resnet32x4', 10)).regression.connector
    assert connector[0].weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)


@pytest.mark.parametrize('name', ['srd', 'srdwithdist'])
def test_the_teachers_classifier_passes_gradient_and_belongs_to_the_teacher(name):
    student, teacher, s, t = looks('narrower')
    method = DISTILLERS[name](student, teacher)
    losses = method(s, t, zoo.make_batch(3))
    sum(loss for key, loss in losses.items() if 'feature' not in key).backward()
    assert s.head.grad.abs().max() > 1e-6 and teacher.classifier.weight.grad is None
    kept = [*dict(method.named_parameters()), *method.state_dict()]
    assert kept and all(key.startswith('regression.connector') for key in kept)


def test_mixed_precision_stays_out_of_the_teachers_classifier():
    """Of maps that are equal already it makes logits, to be subtracted."""
    student, teacher, s, t = looks('narrower')
    regression, values = SRD(student, teacher).regression, []
    regression.connector = torch.nn.Identity()
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            values.append(regression(s._replace(head=t.head), t)[2:])
    for one, other in zip(*values):
        assert torch.equal(one, other)


@pytest.mark.parametrize('name', ['srd', 'srdwithdist'])
def test_standardized_logits_are_not_compared_with_raw_ones(name):
    student, teacher = zoo.make('narrower')
    method, batch = DISTILLERS[name](student, teacher), zoo.make_batch()
    raw, standard = (Distillation(student, teacher, {name: copy.deepcopy(method)}, standardize=on)(batch)[1]
                     for on in (False, True))
    assert all(raw[key].item() == standard[key].item() for key in raw)


@pytest.mark.parametrize('pair', ['narrower', 'smaller maps', 'larger maps', 'later head'])
def test_srdwithdist_is_the_formula(pair):
    student, teacher, s, t = looks(pair, n=4)
    method = SRDwithDIST(student, teacher, alpha=2.0, inter=3.0, intra=5.0)
    losses = {key: value.item() for key, value in method(s, t, zoo.make_batch(4)).items()}
    f, z_s, z_t = slow_regression(method, s, t, teacher)
    assert losses == pytest.approx({
        'srdwithdist_feature': 2 * slow_features(f, t.head), 'srdwithdist_inter': 3 * slow_apart(z_s, z_t),
        'srdwithdist_intra': 5 * slow_apart(z_s.T, z_t.T)}, rel=1e-3)


@pytest.mark.parametrize('method, hyper', [(SRD, {'logit': 'dist'}), (SRDwithDIST, {})])
def test_relations_are_over_the_global_batch_unless_local(method, hyper, monkeypatch):
    student, teacher, s, t = looks('narrower')
    gathered = []
    monkeypatch.setattr(distributed, 'gather_rows', lambda rows, counts: gathered.append(counts) or rows)
    for local, times in ((True, 0), (False, 2)):
        method(student, teacher, local=local, **hyper)(s, t, zoo.make_batch(3))
        assert gathered == [True] * times


# What connects to a teacher's map

CONNECTORS = {'simkd': lambda method: method.projector, 'srd': lambda method: method.regression.connector,
              'srdwithdist': lambda method: method.regression.connector, 'fitnet': lambda method: method.activation}


@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('name', CONNECTORS)
def test_a_connector_reaches_what_is_below_zero(name, signed):
    """As in a teacher that ends in a norm: nothing rectified comes near it."""
    student, teacher = zoo.make('narrower')
    plain = teacher.forward
    teacher.forward = lambda x, features: below(plain(x, features), 1.0 * signed)
    connector = CONNECTORS[name](DISTILLERS[name](student, teacher))
    assert (connector(torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))) < 0).any() == signed


def below(f: Features, x: float) -> Features:
    return f._replace(head=f.head - x, pooled=f.pooled - x, maps=[y - x for y in f.maps])


# SimKD

@pytest.mark.parametrize('size', [16, 24])
@pytest.mark.parametrize('pair, student_map', [
    ('narrower', 'head'), ('smaller maps', 'head'), ('larger maps', 'head'), ('later head', 'head'),
    ('later head', 'stage'), ('fewer stages', 'stage')])
def test_simkd_is_the_formula(pair, student_map, size):
    """The student predicts through the projector and the teacher's classifier, at any size of the images."""
    student, teacher, s, t = looks(pair, size=size)
    method = SimKD(student, teacher, weight=2.0, student_map=student_map)
    adapted = method.adapt(s)
    f_s = s.head if student_map == 'head' else s.maps[-1]
    small = [min(a, b) for a, b in zip(f_s.shape[2:], t.head.shape[2:])]
    with torch.no_grad():
        a, b, c = (layer for layer in method.projector if isinstance(layer, torch.nn.Conv2d))
        f = bn(conv1(averaged(f_s.double(), small), a)).clamp(min=0)  # pooled first, as the next one sees more
        f = bn(conv1(bn(conv3(f, b)).clamp(min=0), c)).clamp(min=0)
        logits = f.mean((2, 3)) @ teacher.classifier.weight.double().T + teacher.classifier.bias.double()
    assert (a.out_channels, c.out_channels) == (t.head.shape[1] // 2, t.head.shape[1])
    torch.testing.assert_close(adapted.head.double(), f, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(adapted.logits.double(), logits, rtol=1e-3, atol=1e-4)
    expected = 2 * mse(f, averaged(t.head.double(), small))
    assert method(adapted, t, None)['simkd'].item() == pytest.approx(expected, rel=1e-4)


def test_simkd_trains_by_its_loss_alone_and_ships_what_it_predicts_through():
    student, teacher = zoo.make('narrower')
    task = Distillation(student, teacher, {'simkd': SimKD(student, teacher)})
    assert task.ce_weight == 0
    assert {key.rpartition('.')[0] for key, p in task.named_parameters() if not p.requires_grad} == {
        'student.classifier', 'distillers.simkd.classifier'}
    batch = zoo.make_batch()
    network = task.shipped()
    with torch.no_grad():
        assert torch.equal(task.eval()(batch)[0], network(batch.images))
    other = Distillation(*zoo.make('narrower', seed=1), {'simkd': SimKD(*zoo.make('narrower', seed=1))}).shipped()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.eval()(batch.images), network(batch.images))


@pytest.mark.parametrize('ce_weight', [None, 1.0])
def test_simkd_of_the_last_stage_leaves_what_comes_after_it_out_of_use(ce_weight):
    student, teacher = zoo.make('later head')
    task = Distillation(student, teacher, {'simkd': SimKD(student, teacher, student_map='stage')}, ce_weight)
    assert task.freeze_unreached() == sum(p.numel() for p in student.last.parameters())
    sum(task(zoo.make_batch())[1].values()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in task.parameters())


def test_simkd_is_evaluated_as_it_was_trained(distill, images, tmp_path):
    torch.manual_seed(0)
    torch.save(create_model('resnet18', 3).state_dict(), tmp_path / 'teacher.pth')
    words = [images, '--teacher-arch', 'resnet18', '--teacher-resume', tmp_path / 'teacher.pth', '--distiller', 'simkd']
    run = distill(*words, '--epochs', 1, '--image-size', 64, '--output', tmp_path / 'run')
    assert run.code == 0, run.err
    assert run.log()[0]['train']['losses']['ce'] == 0
    again = distill(*words, '--image-size', 64, '-e', '--output', tmp_path / 'e',
                    '--student-resume', tmp_path / 'run' / 'last.pth')
    assert again.code == 0, again.err
    trained, scored = run.log()[0]['valid'], again.json('evaluate.json')['scores']['student']
    assert (scored['correct1'], scored['n']) == (trained['correct1'], 15)
    assert scored['loss'] == pytest.approx(trained['loss'], rel=1e-6)


# FT

def slow_ft(f_s, f_t):
    size, total = [min(a, b) for a, b in zip(f_s.shape[2:], f_t.shape[2:])], 0.0
    for x, y in zip(averaged(f_s, size).tolist(), averaged(f_t, size).tolist()):
        rows = []
        for f in (x, y):
            a = [sum(channel[i][j] ** 2 for channel in f) / len(f) for i in range(size[0]) for j in range(size[1])]
            rows.append([value / math.sqrt(sum(other ** 2 for other in a)) for value in a])
        total += sum(abs(p - q) for p, q in zip(*rows)) / (size[0] * size[1])
    return total / len(f_s)


@pytest.mark.parametrize('pair', ['narrower', 'smaller maps', 'larger maps', 'later head'])
def test_ft_is_the_formula(pair):
    student, teacher, s, t = looks(pair)
    method = FT(student, teacher, weight=9.0, k=0.25)

    def leaky(x):
        return torch.where(x > 0, x, 0.1 * x)

    with torch.no_grad():
        f_s, f_t = s.maps[-1], t.maps[-1]
        for layer in method.translator:
            f_s = leaky(bn(conv3(f_s, layer[0])))
        for layer in method.encoder:
            f_t = leaky(conv3(f_t, layer[0]) + layer[0].bias.double().view(-1, 1, 1))
    assert f_s.shape[1] == f_t.shape[1] == round(0.25 * t.maps[-1].shape[1])
    assert method(s, t, None)['ft'].item() == pytest.approx(9 * slow_ft(f_s, f_t), rel=1e-4)


def some_pairs(batches):
    student, teacher = zoo.make('narrower')

    def pairs():
        with torch.no_grad():
            for images in batches:
                yield student(images, features=True), teacher(images, features=True)
    return pairs


def batches_of(rows):
    return [zoo.make_batch(10).images[row] for row in rows]


def test_ft_trains_its_paraphraser_once_and_freezes_it():
    pairs = some_pairs(batches_of([range(4), range(4, 10)]))
    method = FT(*zoo.make('narrower'), paraphraser_epochs=12, paraphraser_lr=0.1)
    assert {key.split('.')[0] for key, p in method.named_parameters() if p.requires_grad} == {'translator'}
    before = copy.deepcopy(method.state_dict())
    method.start_epoch(1, pairs)
    errors = [row['mse'] for row in method.report]
    assert len(errors) == 12 and errors[-1] < 0.9 * errors[0]
    with torch.no_grad():
        maps = torch.cat([t.maps[-1] for _, t in pairs()])
        assert mse(method.decoder(method.encoder(maps)), maps) < errors[0]
    for key, value in method.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith('translator'), key
    assert {key.split('.')[0] for key, p in method.named_parameters() if p.requires_grad} == {'translator'}
    assert all(p.grad is None for p in method.parameters())

    resumed = FT(*zoo.make('narrower'))
    resumed.load_state_dict(method.state_dict())
    for again, epoch in ((resumed, 1), (method, 2)):
        again.start_epoch(epoch, lambda: pytest.fail('trained again'))
        assert not again.report
    assert_same(resumed.state_dict(), method.state_dict())


def test_ft_trains_its_paraphraser_as_plain_sgd_does():
    pairs = some_pairs(batches_of([range(4), range(4, 10)]))
    method = FT(*zoo.make('narrower'), paraphraser_epochs=8, paraphraser_lr=0.1)
    plain = copy.deepcopy(torch.nn.Sequential(method.encoder, method.decoder)).requires_grad_()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    method.start_epoch(1, pairs)
    for maps in [t.maps[-1] for _, t in pairs()] * 8:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(plain(maps), maps).backward()
        optimizer.step()
    assert_close(torch.nn.Sequential(method.encoder, method.decoder).state_dict(), plain.state_dict(), atol=1e-6)


def test_ft_says_what_is_wrong_with_its_paraphraser():
    method = FT(*zoo.make('narrower'), paraphraser_lr=1e6)
    with pytest.raises(ValueError, match='no images'):
        method.start_epoch(1, list)
    with pytest.raises(ValueError, match=r'diverged: --ft-paraphraser-lr .* is too high'):
        method.start_epoch(1, some_pairs(batches_of([range(4), range(4, 10)])))


def test_ft_refuses_a_last_map_of_one_pixel():
    teacher, _ = zoo.make('same')
    for channels, strides in (((8,), (16,)), ((8, 12), (4, 4))):
        with pytest.raises(ValueError, match=r'have a single pixel.*--image-size'):
            FT(zoo.Tiny(channels, strides), teacher)


# Ranks

SHARES = [[range(3), range(6, 8)], [range(3, 6)]]  # one batch more on rank 0


def channels_last(pairs):
    """As a student's and a teacher's maps are under --channels-last, and with them the gradients of convolutions."""
    def looks():
        for s, t in pairs():
            yield tuple(x._replace(maps=[f.to(memory_format=torch.channels_last) for f in x.maps]) for x in (s, t))
    return looks


def rank(number, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=number, world_size=world)
    torch.manual_seed(0)
    method = FT(*zoo.make('narrower'), paraphraser_epochs=3)
    method.start_epoch(1, channels_last(some_pairs(batches_of(SHARES[number]))))
    torch.save([method.state_dict(), [row['mse'] for row in method.report]], f'{folder}/{number}')
    for name in HERE:
        student, teacher = zoo.make('later head')
        task = Distillation(student, teacher, {name: DISTILLERS[name](student, teacher)}, ce_weight=1.0)
        parallel = DistributedDataParallel(task.train())
        for seed in range(2):  # the second raises where a parameter was without gradient in the first
            sum(parallel(zoo.make_batch(seed=seed))[1].values()).backward()
    dist.destroy_process_group()


def test_two_ranks(tmp_path):
    """The paraphraser is that of one process, and no method leaves DDP waiting for a gradient."""
    torch.manual_seed(0)
    alone = FT(*zoo.make('narrower'), paraphraser_epochs=3)
    alone.start_epoch(1, some_pairs(batches_of([range(6), range(6, 8)])))
    torch.multiprocessing.spawn(rank, (2, str(tmp_path)), nprocs=2)
    (first, errors), (second, _) = (torch.load(tmp_path / str(number), weights_only=True) for number in range(2))
    assert_same(first, second)
    assert errors == pytest.approx([row['mse'] for row in alone.report], rel=1e-5)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6)
