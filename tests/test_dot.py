"""DOT against its formula, one number per parameter."""
import copy

import pytest
import torch
from test_optim import arguments
from torch import nn
from zoo import make_batch

from utils.dot import DOT
from utils.guard import Guard
from utils.learner import Learner
from utils.optim import make_optimizer

LR, MU, DELTA, DECAY = 0.02, 0.9, 0.075, 0.01


class Toy(nn.Module):
    """Both losses reach a, the labels' alone b, the distillation's alone c."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor([value])) for value in (1.5, -0.7, 0.4))

    def forward(self, x):
        return (self.a * self.b - x).square().sum(), (self.a + self.c * x).square().sum()


def train(model, optimizer, inputs, bad=()):
    guard = Guard(torch.device('cpu'))
    for step, batches in enumerate(inputs):
        for x in batches:
            ce, kd = model(torch.tensor(x))
            optimizer.split(ce / len(batches), kd / len(batches))
            ((ce + kd) / len(batches)).backward()
        if step in bad:
            model.a.grad.fill_(float('nan'))
            guard.update(optimizer, torch.amp.GradScaler('cpu', enabled=False))
            guard.one.fill_(1)
        else:
            guard.update(optimizer, torch.amp.GradScaler('cpu', enabled=False))
    return [p.item() for p in model.parameters()]


def by_hand(inputs, bad=()):
    a, b, c = 1.5, -0.7, 0.4
    va_ce = va_kd = vb = vc = 0.0
    for step, batches in enumerate(inputs):
        if step in bad:
            continue
        n = len(batches)
        ga_ce = sum(2 * (a * b - x) * b for x in batches) / n
        gb = sum(2 * (a * b - x) * a for x in batches) / n
        ga_kd = sum(2 * (a + c * x) for x in batches) / n
        gc = sum(2 * (a + c * x) * x for x in batches) / n
        va_ce = (MU - DELTA) * va_ce + ga_ce + DECAY * a
        va_kd = (MU + DELTA) * va_kd + ga_kd
        vb = MU * vb + gb + DECAY * b
        vc = MU * vc + gc + DECAY * c
        a, b, c = a - LR * (va_ce + va_kd), b - LR * vb, c - LR * vc
    return [a, b, c]


@pytest.mark.parametrize('inputs, bad', [
    ([[0.3], [-0.2], [0.9], [0.1]], ()), ([[0.3, 0.5], [-0.2, 0.7]], ()), ([[0.3], [0.4], [-0.2], [0.9]], (0, 2)),
], ids=['plain', 'accumulated', 'left out'])
def test_updates_are_those_of_the_formula(inputs, bad):
    model = Toy()
    got = train(model, DOT(model.parameters(), LR, MU, DELTA, DECAY), inputs, bad)
    assert got == pytest.approx(by_hand(inputs, bad), rel=1e-5)


def test_state_comes_back():
    inputs = [[0.3], [-0.2], [0.9], [0.1]]
    whole, part = Toy(), Toy()
    train(whole, DOT(whole.parameters(), LR, MU, DELTA, DECAY), inputs)
    optimizer = DOT(part.parameters(), LR, MU, DELTA, DECAY)
    train(part, optimizer, inputs[:2])
    rest = copy.deepcopy(part)
    again = DOT(rest.parameters(), LR, MU, DELTA, DECAY)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(rest, again, inputs[2:])
    assert [p.item() for p in rest.parameters()] == [p.item() for p in whole.parameters()]


def test_without_a_difference_it_is_sgd():
    model, plain = Toy(), Toy()
    optimizer = make_optimizer(model, arguments('--optimizer', 'dot', '--dot-delta', '0'))
    sgd = make_optimizer(plain, arguments())
    assert isinstance(optimizer, DOT)
    train(model, optimizer, [[0.1], [0.2], [0.3]])
    for x in (0.1, 0.2, 0.3):
        sum(plain(torch.tensor(x))).backward()
        Guard(torch.device('cpu')).update(sgd, torch.amp.GradScaler('cpu', enabled=False))
    for p, q in zip(model.parameters(), plain.parameters()):
        assert p.item() == pytest.approx(q.item(), rel=1e-5)


@pytest.mark.parametrize('flags', [('--amp', 'fp16'), ('--clip-grad', '1')])
def test_what_would_mix_the_gradients_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        arguments('--optimizer', 'dot', *flags)
    assert '--optimizer dot' in capsys.readouterr().err


def test_a_parameter_that_no_loss_reaches_stays():
    model, plain = Toy(), Toy()
    model.unused = nn.Parameter(torch.tensor([3.0]))
    *others, unused = train(model, DOT(model.parameters(), LR, MU, DELTA, DECAY), [[[0.3]], [[0.9]]])
    assert unused == 3
    assert others == train(plain, DOT(plain.parameters(), LR, MU, DELTA, DECAY), [[[0.3]], [[0.9]]])


class Task(Toy):
    def forward(self, batch):
        ce, kd = super().forward(batch.images)
        return torch.zeros(1, 5), {'ce': ce, 'kd': kd}


def test_a_learner_tells_labels_from_distillation():
    task, inputs = Task(), [[0.3], [-0.2], [0.9], [0.1]]
    learner = Learner(task, DOT(task.parameters(), LR, MU, DELTA, DECAY),
                      torch.amp.GradScaler('cpu', enabled=False), torch.device('cpu'), arguments())
    for x, in inputs:
        learner.learn(make_batch(1)._replace(images=torch.tensor(x)))
        learner.step()
    assert [p.item() for p in task.parameters()] == pytest.approx(by_hand(inputs), rel=1e-5)
