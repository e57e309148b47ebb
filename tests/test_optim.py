"""Learning rate, optimizers, and the guard in front of them."""
import copy
import io
import math
import re
import sys

import conftest
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import make_batch

from utils import distributed, meters
from utils.guard import Guard
from utils.learner import Learner
from utils.meters import Display, Meter, hits
from utils.optim import learning_rate, make_ema, make_optimizer, total_epochs
from utils.run import Run


def arguments(*flags):
    return conftest.arguments('--dummy', *flags)


def scheduled(args, epochs, *make):
    """The rates a scheduler of torch gives, epoch by epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], args.lr)
    schedule = make[0](optimizer, *make[1:])
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    return rates


def test_step_schedule_is_pytorch_examples():
    args = arguments('--epochs', '100')
    expected = scheduled(args, 100, torch.optim.lr_scheduler.StepLR, 30, 0.1)
    assert [learning_rate(e, args) for e in range(100)] == pytest.approx(expected)
    assert learning_rate(29.999, args) == 0.1 and learning_rate(30.0, args) == pytest.approx(0.01)


def test_mgd_warmup_grows_by_epochs_and_shifts_the_drops():
    args = arguments('--epochs', '120', '--lr-drop-epochs', '31', '61', '81', '--warmup', '1')
    assert total_epochs(args) == 130
    rates = [learning_rate(e, args) for e in range(130)]
    assert rates[:12] == pytest.approx([0.1 * (0.1 + 0.09 * e) for e in range(10)] + [0.1, 0.1])
    assert learning_rate(3.7, args) == rates[3]
    drops = [e for e in range(1, 130) if rates[e] < rates[e - 1]]
    assert drops == [41, 71, 91]
    fine = arguments('--warmup', '--warmup-by', 'iteration')
    assert learning_rate(3.7, fine) == pytest.approx(0.1 * (0.1 + 0.09 * 3.7))


def test_cosine_and_the_others():
    args = arguments('--epochs', '50', '--schedule', 'cosine')
    expected = scheduled(args, 50, torch.optim.lr_scheduler.CosineAnnealingLR, 50)
    assert [learning_rate(e, args) for e in range(50)] == pytest.approx(expected)
    assert learning_rate(25, arguments('--epochs', '50', '--schedule', 'linear')) == pytest.approx(0.05)
    assert learning_rate(49, arguments('--epochs', '50', '--schedule', 'constant')) == 0.1


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_no_bias_decay_spares_biases_and_norms():
    model = net()
    optimizer = make_optimizer(model, arguments('--no-bias-decay', '--wd', '0.5'))
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        '0.weight': 0.5, '0.bias': 0, '1.weight': 0, '1.bias': 0, '2.weight': 0.5, '2.bias': 0}


@pytest.mark.parametrize('flags, reference', [
    ((), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-4)),
    (('--nesterov',), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)),
    (('--optimizer', 'adamw'), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=1e-4)),
])
def test_updates_are_torchs_and_a_bad_one_does_not_happen(flags, reference):
    """Four updates, the first and third with a gradient that isn't finite: only the good two count.

    The first is the dangerous one: fused SGD would go on from a momentum buffer it never filled.
    """
    ours, theirs = net(), net()
    optimizer, plain = make_optimizer(ours, arguments(*flags)), reference(theirs.parameters())
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    for step, bad in enumerate([True, False, True, False]):
        before = copy.deepcopy(ours.state_dict())
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        for model in (ours, theirs):
            nn.functional.cross_entropy(model(x), torch.arange(8) % 2).backward()
        if bad:
            next(ours.parameters()).grad[0, 0] = float('inf')
        else:
            plain.step()
        Guard(torch.device('cpu')).update(optimizer, scaler)
        plain.zero_grad()
        for name, p in ours.named_parameters():
            assert not bad or torch.equal(p, before[name])
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'dot'])
def test_an_optimizer_goes_on_in_another_layout_of_the_weights(name, capsys):
    """--resume PATH --channels-last: fused steps take all there is of a weight for laid out as it is."""
    def made(layout):
        torch.manual_seed(0)
        network = nn.Conv2d(3, 4, 3).to(memory_format=layout)
        return network, make_optimizer(network, arguments('--optimizer', name))

    def step(network, optimizer):
        losses = [network(torch.ones(1, 3, 4, 4)).square().mean(), network(torch.eye(4).expand(1, 3, 4, 4)).mean()]
        if name == 'dot':
            optimizer.split(*losses)
        sum(losses).backward()
        Guard(torch.device('cpu')).update(optimizer, torch.amp.GradScaler('cpu', enabled=False))

    network, optimizer = made(torch.contiguous_format)
    step(network, optimizer)
    saved = {'model': network.state_dict(), 'optimizer': optimizer.state_dict(), 'facts': {},
             'progress': {'epoch': 1, 'sample': 0}}
    run, (other, resumed) = object.__new__(Run), made(torch.channels_last)
    run.saved, run.facts, run.origin = copy.deepcopy(saved), {}, 'checkpoint.pth'
    run.restore(model=other, optimizer=resumed)
    for pair in (network, optimizer), (other, resumed):
        step(*pair)
    assert other.weight.stride() != network.weight.stride()
    torch.testing.assert_close(other.state_dict(), network.state_dict())


@pytest.mark.parametrize('amp', [False, True])
def test_a_loss_that_is_not_finite_stops_this_and_every_later_update(amp):
    model, guard = net(), Guard(torch.device('cpu'))
    optimizer = make_optimizer(model, arguments())
    scaler = torch.amp.GradScaler('cpu', enabled=amp)
    before = copy.deepcopy(list(model.parameters()))
    for factor in (float('inf'), 1.0, 1.0):
        loss = model(torch.ones(4, 3)).sum() * 0.01 + (0.0 if factor == 1 else factor)
        scaler.scale(guard.loss(loss)).backward()  # the gradient of loss + inf is finite: the guard has to spoil it
        guard.update(optimizer, scaler)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))
    assert guard.one.isnan()


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'dot'])
@pytest.mark.parametrize('amp', ['off', 'fp16'])
def test_a_run_that_goes_on_is_as_if_the_broken_update_had_not_been(name, amp):
    """Weights, momentum, and statistics of norms, which have met it in the forward pass."""
    if name == 'dot' and amp == 'fp16':
        pytest.skip('refused')

    class Task(nn.Sequential):
        def forward(self, batch):
            logits = super().forward(batch.images)
            return logits, {'ce': logits.square().mean(), 'kd': logits.abs().mean()}

    def trained(*factors):
        torch.manual_seed(0)
        task = Task(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
        args = arguments('--optimizer', name, '--lr', '0.1', '--max-broken-updates', '2')
        scaler = torch.amp.GradScaler('cpu', enabled=amp == 'fp16', init_scale=4.0)
        learner = Learner(task, make_optimizer(task, args), scaler, torch.device('cpu'), args)
        for factor in factors:
            learner.guard.begin()
            for n in (1, 2):  # the first batch of an update breaks it
                images = torch.randn(8, 3, generator=torch.Generator().manual_seed(n)) * (factor if n == 1 else 1)
                learner.learn(make_batch(8)._replace(images=images, weight=0.5))
            norm = learner.step()
            assert norm.isfinite() == math.isfinite(factor)
        return {'weights': task.state_dict(), 'optimizer': learner.optimizer.state_dict()}

    nan, inf = float('nan'), float('inf')
    torch.testing.assert_close(trained(nan, 1.0, nan, inf, 2.0), trained(1.0, 2.0), rtol=0, atol=0)


def test_the_guard_changes_no_bit_of_a_good_step():
    a, b = net(), net()
    for model, wrap in ((a, lambda x: x), (b, Guard(torch.device('cpu')).loss)):
        wrap(model(torch.ones(4, 3)).square().mean()).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters()))


def test_clipping():
    model, guard = net(), Guard(torch.device('cpu'))
    optimizer = make_optimizer(model, arguments('--lr', '1', '--wd', '0', '--momentum', '0'))
    before = copy.deepcopy(list(model.parameters()))
    (model(torch.randn(4, 3)).square().sum() * 100).backward()
    norm = guard.update(optimizer, torch.amp.GradScaler('cpu', enabled=False), clip=0.5)
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before)]).norm()
    assert norm > 0.5 and moved.item() == pytest.approx(0.5, rel=1e-4)


def test_the_meter_keeps_no_memory_that_is_shared():
    """Each batch of a loader process would be an open file, of which a process may have a thousand."""
    meter, batch = Meter({}), make_batch(2)
    batch.index.share_memory_()
    meter.add(batch, ['loss'], torch.ones(1))
    (_, index, n), = meter.batches
    assert torch.equal(index, batch.index) and not index.is_shared() and n == 2


def test_troubles_are_reported_from_the_first_on():
    meter, batch, names = Meter({}), make_batch(2), ['top1', 'top5', 'loss', 'loss/ce', 'loss/kd']
    for update, (ce, kd, norm) in enumerate([(1., 1., 1.), (1., float('nan'), float('nan')), (float('inf'), 1., 1.)]):
        values = torch.tensor([1, 2, ce + kd, ce, kd])
        meter.add(batch._replace(index=batch.index + 10 * update), names, values)
        meter.add_norm(torch.tensor(norm))
    meter.add(batch._replace(index=batch.index + 30), names, torch.tensor([1, 2, 2., 1., 1.]))
    meter.add_balance(torch.ones(3))
    meter.add_norm(torch.tensor(float('inf')))
    in_fp16, troubles = copy.deepcopy(meter).read(watch_norms=False), meter.read(watch_norms=True)
    assert troubles[0] == {'what': 'loss kd', 'value': 'nan', 'updates_ago': 2, 'samples': [10, 11],
                           'losses': {'ce': '1.0', 'kd': 'nan'}}
    assert [(t['what'], t['updates_ago']) for t in troubles[1:]] == [('loss ce', 1), ('gradient norm', 0)]
    assert in_fp16 == troubles[:2]
    # what was left out is not counted
    assert meter.sums == {'n': 2, 'top1': 1, 'top5': 2, 'loss': 4, 'loss/ce': 2, 'loss/kd': 2, 'time/n': 4}


@pytest.mark.parametrize('classes', [3, 5, 12])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_hits_go_by_the_order_of_argmax(classes, dtype):
    """Half of these logits have an equal one in their row."""
    logits = torch.randint(8, (200, classes), generator=torch.Generator().manual_seed(0)).to(dtype)
    target = torch.arange(200) % classes
    ranked = [sorted(range(classes), key=lambda c: (-row[c], c)) for row in logits.tolist()]
    first, five = (sum(t in best[:n] for best, t in zip(ranked, target.tolist())) for n in (1, 5))
    assert hits(logits, target).tolist() == [first, five] == [(logits.argmax(1) == target).sum().item(), five]
    assert torch.equal(hits(logits, target), hits(logits, F.one_hot(target, classes) * 0.9))


def test_what_is_no_number_is_no_hit():
    nan, target = float('nan'), torch.tensor([0, 0, 1])
    assert hits(torch.tensor([[nan, 1., 2.], [3., nan, 1.], [nan] * 3]), target).tolist() == [0, 1]


def test_average_of_the_weights():
    model = net()
    ema = make_ema(model, arguments('--ema', '0.9'))
    assert make_ema(model, arguments()) is None
    expected = [p.detach().clone() for p in model.parameters()]
    for update in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        ema.update_parameters(model)
        share = 0.1 if update else 1.0  # the average starts at the first weights it is shown
        expected = [(1 - share) * e + share * p.detach() for e, p in zip(expected, model.parameters())]
    assert all(torch.allclose(a, b) for a, b in zip(ema.module.parameters(), expected))


def test_average_of_the_statistics():
    model = nn.BatchNorm2d(2)
    ema, first = make_ema(model, arguments('--ema', '0.9')), torch.tensor([1.0, 2.0])
    for update in range(3):
        model.running_mean = first + update
        model.num_batches_tracked.fill_(7 + update)
        ema.update_parameters(model)
    assert torch.allclose(ema.module.running_mean, first + 0.9 * 0.1 + 0.2)
    assert ema.module.num_batches_tracked == 9 and ema.n_averaged == 3  # a count is nothing to average


def test_a_mask_is_nothing_to_average():
    model = nn.Linear(2, 2)
    model.register_buffer('mask', torch.tensor([0.0, -math.inf]))
    ema = make_ema(model, arguments('--ema', '0.9'))
    for _ in range(3):
        ema.update_parameters(model)
    assert torch.equal(ema.module.mask, model.mask)


def test_speed_and_time_left_are_those_behind_the_first_update(monkeypatch, capsys):
    moments = iter([0.0, 100.0, 100.0, 102.0])  # begun; after the first update, twice as it is shown; after the second
    monkeypatch.setattr(meters.time, 'monotonic', lambda: next(moments))
    display = Display('Epoch 0', updates=3, samples_left=30)
    display.waited = 50.0
    display.count(10)
    display.show({'n': 10}, 0.1, 1)
    display.waited += 1.0
    display.count(10)
    display.show({'n': 20}, 0.1, 2)
    first, second = capsys.readouterr().out.splitlines()
    assert '0.1 img/s  wait 50%' in first and 'ETA 0:03:20' in first
    assert '5.0 img/s  wait 50%' in second and 'ETA 0:00:02' in second


def test_on_a_terminal_a_message_takes_the_place_of_the_line_that_is_rewritten(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stdout', terminal)
    display = Display('Epoch 0', updates=2, samples_left=8)
    for update in (1, 2):
        display.count(4)
        display.show({'n': 4 * update}, 0.1, update)
        distributed.say(f'note {update}')
    screen, column = [''], 0
    for part in re.split(r'(\n|\r|\033\[K)', terminal.getvalue()):
        if part == '\n':
            screen.append('')
        elif part == '\033[K':
            screen[-1] = screen[-1][:column]
        elif part != '\r':
            screen[-1] = screen[-1][:column] + part + screen[-1][column + len(part):]
            column += len(part)
        if part in ('\n', '\r'):
            column = 0
    assert [line[:13] for line in screen] == ['note 1', 'Epoch 0 [2/2]', 'note 2', '']
