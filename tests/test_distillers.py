"""What all methods share: Distillation, flags from signatures, probing; and KD."""
import argparse
import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
import zoo
from conftest import assert_same
from torch import nn
from torch.nn.parallel.scatter_gather import gather

from distillers import DISTILLERS, Distillation, Distiller, add_flags, drop_foreign, from_flags
from distillers.base import evaluating, probe
from distillers.flags import hyper_parameters
from distillers.kd import KD
from distillers.mgd import MGD
from models import Features, create_model
from utils.data import Batch


@pytest.fixture(scope='module')
def networks():
    """Student and teacher."""
    torch.manual_seed(0)
    return create_model('shufflenet_v2_x0_5', 10), create_model('mobilenet_v1', 10)


def make_batch(seed=0, n=2):
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 3, 64, 64, generator=generator), torch.randint(10, (n,), generator=generator),
                 torch.arange(n), torch.full((n,), -1))


def features(logits):
    return Features(logits, None, None, [], [])


class Recorder(Distiller):
    """Notes what it is given.

    depth: a number
    mirror: a switch
    scales: several numbers
    """

    def __init__(self, student, teacher, *, depth=3, mirror=False, scales: tuple[float, ...] = (1.0,)):
        super().__init__()
        self.hyper, self.calls = (depth, mirror, scales), []

    def forward(self, s, t, batch):
        self.calls.append((s, t, batch))
        return {'recorder_first': s.pooled.sum(), 'recorder_second': t.pooled.sum()}

    def start_epoch(self, epoch, pairs):
        self.calls.append((epoch, list(pairs())))


# KD

def slow_kd(z_s, z_t, T):
    total = 0.0
    for row_s, row_t in zip(z_s.tolist(), z_t.tolist()):
        p_s, p_t = ([math.exp(z / T) / sum(math.exp(other / T) for other in row) for z in row]
                    for row in (row_s, row_t))
        total += sum(q * math.log(q / p) for p, q in zip(p_s, p_t))
    return T * T * total / len(z_s)


@pytest.mark.parametrize('temperature, weight', [(4.0, 0.9), (1.5, 1.0), (1.0, 0.5)])
def test_kd_is_the_formula(temperature, weight):
    z_s, z_t = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    loss = KD(None, None, temperature=temperature, weight=weight)(features(z_s), features(z_t), None)
    assert loss['kd'].item() == pytest.approx(weight * slow_kd(z_s, z_t, temperature), rel=1e-5)


def test_kd_gradient_is_the_difference_of_the_predictions():
    z_s, z_t = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    z_s.requires_grad_()
    KD(None, None)(features(z_s), features(z_t), None)['kd'].backward()
    expected = 0.9 * 4 * ((z_s / 4).softmax(1) - (z_t / 4).softmax(1)) / 5
    torch.testing.assert_close(z_s.grad, expected.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_kd_of_extreme_logits_is_finite(dtype):
    z_s = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    z_t = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype)
    loss = KD(None, None)(features(z_s), features(z_t), None)['kd']
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and loss > 0
    assert z_s.grad.isfinite().all() and z_s.grad.abs().max() > 0


def test_kd_of_equal_logits_is_zero():
    z = torch.randn(4, 10)
    assert KD(None, None)(features(z), features(z.clone()), None)['kd'].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('values', [{'weight': 0.0}, {'temperature': 0.0}, {'temperature': -1.0}])
def test_a_method_that_would_do_nothing_is_refused(values):
    with pytest.raises(ValueError, match=f'{next(iter(values))} is .* above 0'):
        KD(None, None, **values)


@pytest.mark.parametrize('name, values, complaint', [
    ('kd', {'weight': float('inf')}, 'weight is inf, but has to be above 0, and finite'),
    ('kd', {'temperature': float('nan')}, 'temperature is nan'),
    ('dkd', {'alpha': -0.5}, 'alpha is -0.5, but has to be 0 or more'),
    ('dist', {'gamma': float('inf')}, 'gamma is inf'),
    ('rkd', {'distance': 0.0, 'angle': 0.0}, 'distance and angle are 0: the method would do nothing'),
    ('mrkd', {'kendall': -1.0}, 'kendall is -1'),
    ('srd', {'feature_weight': -1.0}, 'feature_weight is -1'),
    ('srdwithdist', {'alpha': float('nan')}, 'alpha is nan'),
    ('at', {'p': float('nan')}, 'p is nan'),
    ('ft', {'k': float('inf')}, 'k is inf'),
    ('mgd', {'loss_factor': float('inf')}, 'loss_factor is inf'),
    ('mgd', {'stage_factors': (0.0, 0.0, 0.0)}, 'stage_factors 0.0 0.0 0.0: each has to be 0 or more, one above'),
    ('mgd', {'stage_factors': (1.0, -1.0, 1.0)}, 'stage_factors 1.0 -1.0 1.0'),
    ('mgd', {'norm': 'gn'}, 'norm gn has 32 groups of channels, a stage of the student 8 channels'),
])
def test_factors_that_turn_a_method_off_or_around_are_refused(name, values, complaint):
    with pytest.raises(ValueError, match=f'^{re.escape(complaint)}'):
        DISTILLERS[name](*zoo.make('same'), **values)


# Distillation

def test_teacher_is_a_guest(networks):
    student, teacher = networks
    task = Distillation(student, teacher.train(), {'kd': KD(student, teacher)})
    task.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert {id(p) for p in task.parameters()} == {id(p) for p in student.parameters()}
    assert task.state_dict().keys() == {f'student.{key}' for key in student.state_dict()}
    assert task.teacher is teacher and teacher not in set(task.modules())


def test_losses_merge_and_logits_are_those_of_the_student_alone(networks):
    student, teacher = copy.deepcopy(networks[0]).train(), networks[1]
    alone, batch = copy.deepcopy(student), make_batch()
    recorder = Recorder(student, teacher)
    task = Distillation(student, teacher, {'kd': KD(student, teacher), 'recorder': recorder}, label_smoothing=0.1)
    logits, losses = task(batch)

    expected = alone(batch.images)
    assert torch.equal(logits, expected)
    assert_same(student.state_dict(), alone.state_dict())
    assert list(losses) == ['ce', 'kd', 'recorder_first', 'recorder_second']
    assert losses['ce'].item() == F.cross_entropy(expected, batch.target, label_smoothing=0.1).item()
    with torch.no_grad():
        kd = KD(None, None)(features(expected), features(teacher(batch.images)), batch)
    assert losses['kd'].item() == kd['kd'].item()

    s, t, given = recorder.calls.pop()
    assert given is batch and s.logits is logits and s.logits.requires_grad and not t.pooled.requires_grad


def test_targets_may_be_shares_of_the_classes(networks):
    batch = make_batch()
    task = Distillation(*networks, {'kd': KD(*networks)}).eval()
    shares = F.one_hot(batch.target, 10).float()
    ce = [task(b)[1]['ce'].item() for b in (batch, batch._replace(target=shares))]
    assert ce[0] == pytest.approx(ce[1], rel=1e-6)


def test_training_reaches_everything_but_the_teacher(networks):
    student, teacher = copy.deepcopy(networks)
    task = Distillation(student, teacher, from_flags(DISTILLERS, ['kd', 'mgd'], parse([]), student, teacher))
    batch = make_batch(n=4)
    task.start_epoch(1, lambda: [batch])
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-4)
    task.train()
    for _ in range(3):
        optimizer.zero_grad()
        sum(task(batch)[1].values()).backward()
        optimizer.step()
    assert_same(teacher.state_dict(), before)
    assert all(p.grad is None for p in teacher.parameters())
    assert [name for name, p in task.named_parameters() if not p.grad.any()] == []


@pytest.mark.parametrize('names, unreached', [
    (['fitnet'], 'stage3, stage4, conv5, fc'), (['ab', 'crd'], 'fc'), (['kd'], '')])
def test_without_labels_weight_decay_leaves_alone_what_no_method_reaches(networks, names, unreached):
    student, teacher = copy.deepcopy(networks)
    methods = from_flags(DISTILLERS, names, parse(['--fitnet-stage', '1']), student, teacher)
    task = Distillation(student, teacher, methods, ce_weight=0)
    task.know(torch.arange(4) % 2)
    before = copy.deepcopy(task.state_dict())
    frozen = task.freeze_unreached()
    assert_same(task.state_dict(), before)  # running statistics and memories, too
    parts = unreached.split(', ') if unreached else []
    expected = {name for name, _ in student.named_parameters() if name.split('.')[0] in parts}
    assert {name for name, p in student.named_parameters() if not p.requires_grad} == expected
    assert frozen == sum(p.numel() for name, p in student.named_parameters() if name in expected)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    task.train()
    batch = make_batch(n=4)
    sum(task(batch)[1].values()).backward()
    optimizer.step()
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[f'student.{name}'])}
    assert not moved & expected and len(moved | expected) == len([*student.parameters()])


def test_student_may_be_wrapped(networks):
    student, teacher = networks
    task = Distillation(student, teacher, {'mgd': MGD(student, teacher)}).eval()
    expected = task(make_batch())
    task.student = nn.DataParallel(student)
    logits, losses = task(make_batch())
    assert torch.equal(logits, expected[0]) and losses['mgd'].item() == expected[1]['mgd'].item()


def test_features_of_several_gpus_are_those_of_the_whole_batch(networks, monkeypatch):
    student, images = networks[0].eval(), make_batch(n=3).images
    monkeypatch.setattr('torch.nn.parallel._functions.Gather.apply', lambda device, dim, *parts: torch.cat(parts, dim))
    gathered = gather([student(part, features=True) for part in images.split([2, 1])], 'cpu')
    whole = student(images, features=True)
    assert type(gathered) is Features and type(gathered.maps) is list
    torch.testing.assert_close(gathered, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('names, asked, expected', [
    (['kd'], None, 0.1), (['mgd'], None, 1.0), (['mgd', 'kd'], None, 1.0), (['kd'], 0.5, 0.5), (['mgd', 'kd'], 0.0, 0),
])
def test_weight_of_the_cross_entropy(networks, names, asked, expected):
    task = Distillation(*networks, from_flags(DISTILLERS, names, parse([]), *networks), ce_weight=asked).eval()
    batch = make_batch()
    logits, losses = task(batch)
    assert task.ce_weight == expected
    assert losses['ce'].item() == pytest.approx(expected * F.cross_entropy(logits, batch.target).item(), rel=1e-6)


def test_ranks_look_with_the_statistics_of_the_first(networks, monkeypatch):
    """With --ema they have met no others since the epoch began; a resumed run has those of the checkpoint."""
    student, teacher = networks
    synced, recorder = [], Recorder(student, teacher)
    monkeypatch.setattr('utils.distributed.sync_buffers', lambda network: synced.append((network, len(recorder.calls))))
    Distillation(student, teacher, {'recorder': recorder}).start_epoch(1, lambda: [make_batch()])
    assert synced == [(student, 0)]


def test_pairs_are_of_eval_mode_and_without_gradient(networks):
    student, teacher = copy.deepcopy(networks[0]).train(), networks[1]
    student.conv1.eval()  # a frozen part stays as it is
    modes, state = [m.training for m in student.modules()], copy.deepcopy(student.state_dict())
    recorder = Recorder(student, teacher)
    Distillation(student, teacher, {'recorder': recorder}).start_epoch(7, lambda: map(make_batch, range(2)))

    (epoch, pairs), = recorder.calls
    assert epoch == 7 and len(pairs) == 2 and torch.is_grad_enabled()
    assert [m.training for m in student.modules()] == modes
    assert_same(student.state_dict(), state)
    with evaluating(student):
        for seed, (s, t) in enumerate(pairs):
            assert not s.logits.requires_grad and torch.equal(s.logits, student(make_batch(seed).images))
            assert torch.equal(t.logits, teacher(make_batch(seed).images))


def test_what_a_method_cannot_begin_with_is_one_line(networks, capsys):
    class Picky(Recorder):
        def start_epoch(self, epoch, pairs):
            raise ValueError('there is nothing to see')
    with pytest.raises(SystemExit) as stop:
        Distillation(*networks, {'picky': Picky(*networks)}).start_epoch(1, list)
    assert stop.value.code == 1 and capsys.readouterr().err == 'error: picky: there is nothing to see\n'


def test_probe_leaves_no_trace(networks):
    student = copy.deepcopy(networks[0]).train()
    student.stage2.eval()
    modes, state = [m.training for m in student.modules()], copy.deepcopy(student.state_dict())
    random = torch.random.get_rng_state()
    shown = probe(student)
    assert [x.shape[1] for x in shown.preact] == student.feature_channels and not shown.logits.requires_grad
    assert [m.training for m in student.modules()] == modes
    assert_same(student.state_dict(), state)
    assert torch.equal(torch.random.get_rng_state(), random)


class Peer(Distiller):
    """Trains both networks on a sum of logits."""

    trains_teacher = True

    def forward(self, s, t, batch):
        return {'peer': (s.logits - t.logits).square().mean()}


def test_a_teacher_may_be_trained_by_the_method_that_says_so_and_by_no_other(networks):
    student, teacher = copy.deepcopy(networks)
    recorder = Recorder(student, teacher)
    task = Distillation(student, teacher, {'peer': Peer(), 'recorder': recorder}).train()
    losses = task(make_batch(n=4))[1]
    assert teacher.training and {id(p) for p in teacher.parameters()} <= {id(p) for p in task.parameters()}
    assert not any(x.requires_grad for x in (recorder.calls[0][1].logits, *recorder.calls[0][1].maps))
    losses['peer'].backward()
    assert all(p.grad.isfinite().all() for p in teacher.parameters())
    before = copy.deepcopy(teacher.state_dict())
    task.start_epoch(1, lambda: [make_batch()])  # looking at it leaves its statistics alone
    assert_same(teacher.state_dict(), before)


def test_the_teachers_norms_may_go_by_the_batch_and_learn_nothing(networks):
    student, teacher = copy.deepcopy(networks)
    recorder, batch = Recorder(student, teacher), make_batch(n=4)
    recorder.batch_statistics = True
    task, before = Distillation(student, teacher, {'recorder': recorder}), copy.deepcopy(teacher.state_dict())
    task(batch)
    assert_same(teacher.state_dict(), before)
    assert not any(m.training for m in teacher.modules())
    seen, plain = recorder.calls[0][1].logits, teacher(batch.images)
    assert torch.equal(seen, teacher.train()(batch.images)) and not torch.allclose(seen, plain)


class Doubled(Distiller):
    """The student predicts through it."""

    def adapt(self, s):
        return s._replace(logits=2 * s.logits)

    def forward(self, s, t, batch):
        return {'doubled': s.logits.sum()}


def test_a_method_may_stand_between_student_and_prediction(networks):
    student, teacher = networks
    task, batch = Distillation(student, teacher, {'doubled': Doubled()}).eval(), make_batch()
    logits, losses = task(batch)
    assert torch.equal(logits, 2 * student(batch.images)) and losses['doubled'].item() == logits.sum().item()
    assert losses['ce'].item() == F.cross_entropy(logits, batch.target).item()
    assert torch.equal(task.shipped()(batch.images), logits)
    assert Distillation(student, teacher, {'kd': KD(student, teacher)}).shipped() is student


# Flags

def parse(words, table=DISTILLERS):
    parser = argparse.ArgumentParser()
    add_flags(parser, table)
    return parser.parse_args(words)


def test_a_loss_has_the_name_of_its_method(networks):
    """Else it could take the place of another's, or pass for the labels'."""
    for name, key in (('recorder', 'kd'), ('recorder', 'ce'), ('kd', 'kdsvd')):
        method = Recorder(*networks)
        method.forward = lambda s, t, batch, key=key: {key: s.pooled.sum()}
        with pytest.raises(ValueError, match=f'^{name} calls a loss {key}: its losses are {name}, or {name}_'):
            Distillation(*networks, {name: method})(make_batch())


def test_a_method_whose_flags_cannot_be_made_says_why():
    class Undocumented(Distiller):
        """Says nothing of its weight."""

        def __init__(self, student, teacher, *, weight=1.0):
            super().__init__()

    class Untyped(Distiller):
        """Too little.

        weight: None says nothing of the type
        """

        def __init__(self, student, teacher, *, weight=None):
            super().__init__()

    class Several(Distiller):
        """Too little.

        weight: a list says nothing of what is in it
        """

        def __init__(self, student, teacher, *, weight=(1.0, 2.0)):
            super().__init__()

    for method, complaint in ((Undocumented, 'no line "weight: ..."'), (Untyped, 'weight is no number'),
                              (Several, 'weight is no number')):
        with pytest.raises(ValueError, match=f'{method.__name__}: .*{complaint}'):
            parse([], {'it': method})


def test_a_flag_may_speak_of_percent(capsys):
    class Percent(Distiller):
        """Some.

        share: 50 % of them
        """

        def __init__(self, student, teacher, *, share=50):
            super().__init__()

    with pytest.raises(SystemExit):
        parse(['--help'], {'it': Percent})
    assert '50 % of them' in capsys.readouterr().out


@pytest.mark.parametrize('method', [*DISTILLERS.values(), Recorder])
def test_every_hyper_parameter_has_a_default_and_a_line_of_documentation(method):
    for name, (parameter, text) in hyper_parameters(method).items():  # a KeyError where the line is missing
        assert parameter.default is not parameter.empty and text, name


def test_flags_give_the_defaults_of_the_signature():
    for name, method in DISTILLERS.items():
        built = from_flags(DISTILLERS, [name], parse([]), *zoo.make('same'))[name]
        assert type(built) is method
        for key, (parameter, _) in hyper_parameters(method).items():
            assert getattr(parse([]), f'{name}_{key}') == parameter.default


def test_flags_reach_the_method(networks):
    args = parse(['--kd-temperature', '1.5', '--kd-weight', '1', '--mgd-reducer', 'sp', '--mgd-update-freq', '2'])
    built = from_flags(DISTILLERS, ['mgd', 'kd'], args, *networks)
    assert list(built) == ['mgd', 'kd']
    assert (built['kd'].temperature, built['kd'].weight, built['mgd'].update_freq) == (1.5, 1.0, 2)


@pytest.mark.parametrize('words, hyper', [
    ([], (3, False, (1.0,))),
    (['--x-mirror', '--x-depth', '5'], (5, True, (1.0,))),
    (['--x-mirror', '1', '--x-scales', '1', '0.5'], (3, True, [1.0, 0.5])),
    (['--x-mirror', '0'], (3, False, (1.0,))),
])
def test_kinds_of_flags(words, hyper):
    table = {'x': Recorder}
    assert from_flags(table, ['x'], parse(words, table), None, None)['x'].hyper == hyper


@pytest.mark.parametrize('words', [['--mgd-reducer', 'max'], ['--kd-weight', 'a'], ['--mgd-update-freq', '1.5']])
def test_wrong_flags_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(words)
    assert words[0] in capsys.readouterr().err


def test_flags_of_methods_that_are_not_asked_for_are_found():
    words = ['--kd-weight', '2', '--mgd-update-freq', '3', '--mgd-reducer', 'amp']
    args = parse(words)
    assert drop_foreign(DISTILLERS, ['kd'], args) == ['--mgd-update-freq']  # a default changes nothing
    assert vars(args) == {'kd_temperature': 4.0, 'kd_weight': 2.0}
    assert drop_foreign(DISTILLERS, ['kd', 'mgd'], parse(words)) == []


def test_help_tells_of_each_method(capsys):
    with pytest.raises(SystemExit):
        parse(['--help'])
    text = capsys.readouterr().out
    assert '--distiller mgd' in text and '{amp,sp,rd,sm}' in text and 'T, of both softmaxes' in text
