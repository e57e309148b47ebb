"""A whole training step of MGD on one batch, and what MGD adds to it."""
from functools import partial
from types import SimpleNamespace

import torch

from distillers import Distillation
from distillers.lean import LeanTeacher
from distillers.mgd import MGD
from models import create_model
from utils.data import Batch
from utils.optim import make_optimizer
from utils.setup import compiled, place, precision

from . import peers
from .harness import Case, Limit, Row, Settings, Variant, copy_rate, products
from .plain import plain_step

PEER_BF16 = f'{peers.MGD} bf16'  # as it is, under autocast


def sizes_for(settings: Settings, given: dict) -> dict:
    return {'teacher': 'resnet50', 'student': 'mobilenet_v1', 'size': 224, 'batch': settings.batch(8, 128)} | given


def ingredients(settings: Settings, teacher: str, student: str, size: int, batch: int):
    """Networks, MGD and a batch, at every call the same. The flow is drawn, for its cost does not depend on it."""
    torch.manual_seed(0)
    device = settings.device
    teacher, student = create_model(teacher).to(device), create_model(student).to(device)
    images = torch.randn(batch, 3, size, size).to(device)
    data = Batch(images, torch.randint(1000, (batch,)).to(device), torch.arange(batch), torch.full((batch,), -1))
    settle(teacher, images)
    method = MGD(student, teacher.eval().requires_grad_(False)).to(device)
    for stage in method.stages:
        drawn = torch.randperm(stage.margins.numel())[:stage.flow.numel()]
        stage.flow.copy_(drawn.view_as(stage.flow).sort(0).values)
    return student, teacher, method, data


@torch.no_grad()
def settle(network, images):
    """Give its norms the statistics of these images, so that its features are of a usual size."""
    norms = [(module, module.momentum) for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm, _ in norms:
        norm.momentum = None
    network(images)
    for norm, momentum in norms:
        norm.momentum = momentum


def our_step(settings: Settings, sizes: dict, **how):
    return training_step(*our_task(settings, sizes, **how))


def our_task(settings: Settings, sizes: dict, channels_last=False, amp='off', fold=False, compile=False, distil=True):
    """What training_step is made of."""
    student, teacher, method, batch = ingredients(settings, **sizes)
    args = arguments(channels_last, amp, fold, compile)
    student, teacher = (place(network, settings.device, args) for network in (student, teacher))
    if channels_last:
        batch = batch._replace(images=batch.images.to(memory_format=torch.channels_last))
    task = compiled(Distillation(student, teacher, {'mgd': method} if distil else {}), args)
    if fold:
        task.stand_in = LeanTeacher(task, teacher, settings.device, args)
    return task, batch, args


def arguments(channels_last=False, amp='off', fold=False, compile=False) -> SimpleNamespace:
    return SimpleNamespace(channels_last=channels_last, compile=compile and 'default', amp=amp, fold_teacher=fold,
                           teacher_amp=None, fast=False, no_bias_decay=False, optimizer='sgd', lr=1e-4, momentum=0.9,
                           nesterov=False, weight_decay=1e-4, gpu=0)


def training_step(task: Distillation, batch: Batch, args):
    """As utils/learner.py does it, without its guard and without what is counted."""
    optimizer = make_optimizer(task, args)

    def run():
        with precision(batch.images.device, args.amp):
            _, losses = task(batch)
        total = sum(losses.values())
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {'loss': total}
    return run


def builders(settings: Settings, sizes: dict) -> dict:
    """name: (function that makes a step, precision, whether it is not ours)."""
    steps = {
        'contiguous': (lambda: our_step(settings, sizes), 'fp32'),
        'channels_last': (lambda: our_step(settings, sizes, channels_last=True), 'fp32'),
        'folded': (lambda: our_step(settings, sizes, channels_last=True, fold=True), 'fp32'),
        'compiled': (lambda: our_step(settings, sizes, channels_last=True, fold=True, compile=True), 'fp32'),
        'bf16': (lambda: our_step(settings, sizes, channels_last=True, amp='bf16'), 'bf16'),
        'bf16 folded': (lambda: our_step(settings, sizes, channels_last=True, amp='bf16', fold=True), 'bf16'),
        'bf16 compiled': (lambda: our_step(settings, sizes, channels_last=True, amp='bf16', fold=True, compile=True),
                          'bf16'),
    }
    others = {'plain': (lambda: plain_step(*ingredients(settings, **sizes)), 'fp32')}
    if peers.available(settings):
        peer_step = partial(peers.mgd_step, settings)
        others[peers.MGD] = lambda: peer_step(*ingredients(settings, **sizes)), 'fp32'
        others[PEER_BF16] = lambda: peer_step(*ingredients(settings, **sizes), amp='bf16'), 'bf16'
    return ({name: (*step, False) for name, step in steps.items()} |
            {name: (*step, True) for name, step in others.items()})


def mgd_step(settings: Settings, **sizes) -> Case:
    rows = [Row('contiguous', 'plain', 1.3), Row('channels_last', 'plain', 1.6, tolerance=1e-4),
            Row('bf16 folded', 'plain', 2.8, tolerance=2e-2),
            Row('folded', peers.MGD, 1.6, tolerance=1e-4), Row('compiled', peers.MGD, 1.7, tolerance=1e-4),
            Row('bf16 folded', peers.MGD, 3.0, tolerance=2e-2)]
    if settings.device.type == 'cuda':  # on a CPU, compiling takes too long for what it gives
        rows += [Row(name, 'plain', None, tolerance=1e-4) for name in ('folded', 'compiled')]
        rows += [Row('bf16', 'plain', None, tolerance=2e-2), Row('bf16 compiled', 'plain', 2.8, tolerance=2e-2),
                 Row('bf16 compiled', peers.MGD, 3.0, tolerance=2e-2)]
        rows += [Row(name, PEER_BF16, 1.5, tolerance=4e-2) for name in ('bf16 folded', 'bf16 compiled')]
    asked = {name for row in rows for name in (row.variant, row.baseline)}
    made = builders(settings, sizes_for(settings, sizes))
    variants = {name: Variant(build(), kind, theirs=theirs)
                for name, (build, kind, theirs) in made.items() if name in asked}
    return Case(variants, rows, limit=lambda: products(variants['folded'].run, variants, settings.device),
                skipped=peers.trouble(settings))


def mgd_overhead(settings: Settings, **sizes) -> Case:
    """Without it, both networks still run, as they would for any method."""
    sizes, variants, rows = sizes_for(settings, sizes), {}, []
    for kind, amp, goal in (('fp32', 'off', 0.11), ('bf16', 'bf16', 0.30)):
        for compile in (False, True)[:1 + (settings.device.type == 'cuda')]:  # on a CPU it takes too long
            way = 'compiled ' * compile
            for distil in (False, True):
                run = our_step(settings, sizes, channels_last=True, amp=amp, compile=compile, distil=distil)
                variants[f'{kind} {way}{"with" if distil else "without"}'] = Variant(run, kind)
            rows.append(Row(f'{kind} {way}with', f'{kind} {way}without', 0.10 if compile else goal, 'overhead',
                            tolerance=float('inf')))
    def limit():
        student, teacher, method, batch = ingredients(settings, **sizes)
        with torch.no_grad():
            shown = [network(batch.images, features=True).preact for network in (student, teacher)]
        s, t = (sum(maps[i].numel() for i in of) for maps, of in zip(shown, zip(*method.pairing)))
        ms = 4 * (4 * s + t) / copy_rate(settings.device)
        return Limit(f"MGD's maps in fp32 (the teacher's read once, the student's there and back), at the rate of a "
                     f'large copy: {ms:.3g} ms')
    return Case(variants, rows, limit=limit)
