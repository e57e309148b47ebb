"""The copy of the teacher that trains the student."""
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import Tiny, make, make_batch

from distillers import DISTILLERS, Distillation
from distillers.at import AT
from distillers.dml import DML
from distillers.lean import LeanTeacher, folded, lean_teacher
from distillers.mgd import MGD
from distillers.reviewkd import ReviewKD
from models import Features, create_model
from utils import distributed
from utils.distributed import does_more


def norms(network) -> int:
    return sum(isinstance(module, _BatchNorm) for module in network.modules())


def settled(network):
    """With norms that do something."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            for values, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                                      (module.running_mean, -0.2, 0.2), (module.running_var, 0.3, 2)):
                nn.init.uniform_(values, low, high)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize('arch, left', [('resnet50', 0), ('mobilenet_v2', 0), ('shufflenet_v1', 0), ('cifar_vgg8', 0),
                                        ('wrn_16_2', 6)])  # half of WRN's norms come before their convolution
def test_the_same_features_without_norms(arch, left):
    torch.manual_seed(0)
    teacher = settled(create_model(arch, 10))
    teacher.image_size = 32
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    lean, images = folded(teacher), torch.randn(3, 3, 32, 32)
    assert norms(lean) == left and norms(teacher) > left
    for wanted, got in zip(teacher(images, features=True), lean(images, features=True)):
        for x, y in zip(*(x if isinstance(x, list) else [x] for x in (wanted, got))):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * x.abs().max().item())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


class WithActivation(nn.BatchNorm2d):
    """As timm's: more than a norm, and so it stays."""

    def forward(self, x):
        return super().forward(x).clamp(0, 2)


def test_norms_that_do_more_stay(monkeypatch):
    torch.manual_seed(0)
    teacher = Tiny((4, 4), (1, 1))
    teacher.norms[0] = WithActivation(4)
    teacher, images = settled(teacher), torch.randn(3, 3, 16, 16)
    lean = folded(teacher)
    assert type(lean.norms[0]) is WithActivation and norms(lean) == 1
    torch.testing.assert_close(lean(images), teacher(images), rtol=1e-4, atol=1e-5)
    assert does_more(teacher) == 'WithActivation' and not does_more(Tiny((4, 4), (1, 1)))
    args = SimpleNamespace(sync_bn=True)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(distributed.dist, 'is_initialized', lambda: True)
        patch.setattr(distributed, 'stop', sys.exit)
        distributed.wrap(teacher, torch.device('cuda'), args)
    assert not does_more(nn.SyncBatchNorm.convert_sync_batchnorm(Tiny((4, 4), (1, 1))))


class Seen(Tiny):
    """Its first convolution is seen with and without its norm, the second runs twice."""

    def __init__(self):
        super().__init__((4, 4), (1, 1))
        self.residual = True

    def forward(self, x, features=False):
        x = self.convs[0](self.stem(x))
        y = self.norms[0](x) + x * self.residual
        y = self.norms[1](self.convs[1](self.convs[1](y)))
        pooled = y.mean((2, 3))
        logits = self.classifier(pooled)
        return Features(logits, pooled, y, [y], [y]) if features else logits


def test_a_convolution_that_others_use_is_not_folded():
    torch.manual_seed(0)
    network = settled(Seen())
    with pytest.raises(ValueError, match='shows other'):
        folded(network)
    network.residual = False
    assert norms(folded(network)) == 1


def test_it_is_compared_in_full_float32(monkeypatch):
    """In TF32 the features of many a teacher would differ by more than is allowed."""
    rounded = []
    teacher, forward = settled(create_model('resnet8', 10)), torch.nn.Conv2d.forward

    def watched(*args):
        rounded.append(torch.backends.cudnn.allow_tf32)
        return forward(*args)
    monkeypatch.setattr(torch.nn.Conv2d, 'forward', watched)
    folded(teacher)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in teacher.modules())
    assert rounded[-2 * convolutions:] == [False] * 2 * convolutions and torch.backends.cudnn.allow_tf32


def lean_args(**more):
    return SimpleNamespace(**{'fold_teacher': True, 'fast': False, 'teacher_amp': None, 'amp': 'off',
                              'channels_last': False, 'compile': False} | more)


def losses(args, steps=8):
    """Of a student that trains under the teacher, or under its copy."""
    student, teacher = make('narrower')
    task = Distillation(student, teacher, {'mgd': MGD(student, teacher, loss_factor=1e3)})
    if args:
        task.stand_in = LeanTeacher(task, teacher, torch.device('cpu'), args)
    optimizer, batch, curve = torch.optim.SGD(task.parameters(), 0.05), make_batch(), []
    for _ in range(steps):
        loss = sum(task(batch)[1].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def test_a_student_learns_the_same_from_it():
    exact = losses(None)
    assert exact[-1] < 0.9 * exact[0]
    assert losses(lean_args()) == pytest.approx(exact, rel=1e-4)
    assert losses(lean_args(fold_teacher=False, teacher_amp='off')) == exact
    rounded = losses(lean_args(teacher_amp='bf16'))
    assert rounded == pytest.approx(exact, rel=0.03) and rounded != exact


def test_fast_does_without_what_cannot_be_folded(capsys):
    student, teacher = make('same')
    seen, task = settled(Seen()), Distillation(student, teacher, {})
    seen.image_size = 16
    lean = LeanTeacher(task, seen, torch.device('cpu'), lean_args(fold_teacher=None, fast=True))
    assert norms(lean.network) == norms(seen) and 'fold' not in capsys.readouterr().out
    with pytest.raises(ValueError, match='--fold-teacher'):
        LeanTeacher(task, seen, torch.device('cpu'), lean_args(fold_teacher=True, fast=True))


@pytest.mark.parametrize('asked, folds', [(None, True), (True, True), (False, False)])
def test_fast_folds_where_nothing_else_is_said(asked, folds):
    student, teacher = make('same')
    task = Distillation(student, settled(teacher), {})
    lean = lean_teacher(task, teacher, torch.device('cpu'), lean_args(fold_teacher=asked, fast=True))
    assert (lean is not None and norms(lean.network) < norms(teacher)) == folds


def test_weights_are_held_in_the_precision_they_are_used_in():
    student, teacher = make('narrower')
    task = Distillation(student, teacher, {})
    lean = LeanTeacher(task, teacher, torch.device('cpu'), lean_args(amp='bf16', fold_teacher=False))
    weights = lean.network.state_dict()
    assert {weights[name].dtype for name in weights if 'conv' in name or 'classifier' in name} == {torch.bfloat16}
    assert {weights[name].dtype for name in weights if 'running' in name} == {torch.float32}
    assert next(teacher.parameters()).dtype == torch.float32
    assert lean(make_batch()).maps[0].dtype == torch.bfloat16


@pytest.mark.parametrize('name, how', [('dml', {}), ('ofd', {'teacher_bn': 'batch'})])
def test_a_teacher_that_does_not_stand_still_is_refused(name, how):
    student, teacher = make('narrower')
    task = Distillation(student, teacher, {name: DISTILLERS[name](student, teacher, **how)})
    with pytest.raises(ValueError, match='stand still'):
        LeanTeacher(task, teacher, torch.device('cpu'), lean_args())


def test_from_the_command_line(distill, images, tmp_path):
    pair = [images, '--image-size', 32, '--teacher-arch', 'resnet14', '--epochs', 1, '--distiller', 'kd', 'mgd']
    torch.save(create_model('resnet14', 3).state_dict(), tmp_path / 'teacher.pth')
    pair += ['--teacher-resume', tmp_path / 'teacher.pth']
    exact = distill(*pair, '--output', tmp_path / 'exact')
    lean = distill(*pair, '--output', tmp_path / 'lean', '--fold-teacher', '--teacher-amp', 'bf16')
    assert (exact.code, lean.code) == (0, 0), lean.err
    one, other = (run.json('start.json')['scores']['teacher'] for run in (exact, lean))
    assert one == other  # the teacher itself is what is scored
    one, other = (run.log()[0]['train']['losses'] for run in (exact, lean))
    assert other['kd'] == pytest.approx(one['kd'], rel=0.1) and other['kd'] != one['kd']
    saved = lean.weights('checkpoint.pth')
    assert saved['model'].keys() == create_model('resnet8', 3).state_dict().keys()  # nothing of the teacher
    assert all(name.startswith('mgd.') for name in saved['distillers'])
    cached = ['--dummy', '--dataset', 'cifar10', '--distiller', 'kd', '--cache-teacher', 'lazy']
    refused = distill(*cached, '--fold-teacher')
    assert refused.code == 2 and '--fold-teacher' in refused.err


@pytest.mark.parametrize('methods, left', [({'mgd': MGD}, ['preact']), ({'mgd': MGD, 'at': AT}, ['preact', 'maps']),
                                           ({'mgd': MGD, 'reviewkd': ReviewKD}, ['preact']),
                                           ({'at': AT, 'dml': DML}, ['preact', 'maps'])])
def test_maps_that_no_method_reads_are_let_go(methods, left):
    student, teacher = make('narrower')
    task = Distillation(student, teacher, {name: method(student, teacher) for name, method in methods.items()})
    seen = []
    next(iter(task.distillers.values())).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    task(make_batch())
    assert [name for name in ('preact', 'maps') if getattr(seen[0], name)] == left
