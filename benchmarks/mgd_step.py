"""A whole training step of MGD on one batch, and what MGD adds to it."""
from types import SimpleNamespace

import torch

from distillers import Distillation
from distillers.mgd import MGD
from models import create_model
from utils.data import Batch
from utils.engine import precision
from utils.optim import make_optimizer
from utils.setup import place

from . import peers
from .harness import Case, Row, Settings, Variant
from .plain import plain_step

SIZES = {'teacher': 'resnet50', 'student': 'mobilenet_v1', 'size': 224, 'batch': 8}


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
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    network(images)


def our_step(settings: Settings, sizes: dict, channels_last=False, amp='off', distil=True):
    student, teacher, method, batch = ingredients(settings, **sizes)
    args = arguments(channels_last, amp)
    student, teacher = (place(network, settings.device, args) for network in (student, teacher))
    if channels_last:
        batch = batch._replace(images=batch.images.to(memory_format=torch.channels_last))
    return training_step(Distillation(student, teacher, {'mgd': method} if distil else {}), batch, args)


def arguments(channels_last=False, amp='off') -> SimpleNamespace:
    return SimpleNamespace(channels_last=channels_last, compile=False, amp=amp, no_bias_decay=False, optimizer='sgd',
                           lr=1e-4, momentum=0.9, nesterov=False, weight_decay=1e-4)


def training_step(task: Distillation, batch: Batch, args, prepare=lambda batch: batch):
    """As utils/engine.py does it."""
    optimizer = make_optimizer(task, args)

    def run():
        ready = prepare(batch)
        with precision(batch.images.device, args):
            _, losses = task(ready)
        total = sum(losses.values())
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {'loss': total}
    return run


def builders(settings: Settings, sizes: dict) -> dict:
    """name: (function that makes a step, precision)."""
    steps = {
        'plain': (lambda: plain_step(*ingredients(settings, **sizes)), 'fp32'),
        'contiguous': (lambda: our_step(settings, sizes), 'fp32'),
        'channels_last': (lambda: our_step(settings, sizes, channels_last=True), 'fp32'),
        'bf16 channels_last': (lambda: our_step(settings, sizes, channels_last=True, amp='bf16'), 'bf16'),
    }
    if settings.peers and not peers.trouble(settings):
        steps[peers.MGD] = lambda: peers.mgd_step(settings, *ingredients(settings, **sizes)), 'fp32'
    return steps


def mgd_step(settings: Settings, **sizes) -> Case:
    steps = builders(settings, SIZES | sizes)
    variants = {name: Variant(build(), kind) for name, (build, kind) in steps.items()}
    rows = [Row('contiguous', 'plain', 1.3), Row('channels_last', 'plain', 1.6, tolerance=1e-4),
            Row('bf16 channels_last', 'plain', 2.8, tolerance=2e-2),
            Row('channels_last', peers.MGD, 1.7, tolerance=1e-4),
            Row('bf16 channels_last', peers.MGD, 3.0, tolerance=2e-2)]
    return Case(variants, rows, skipped=peers.trouble(settings))


def mgd_overhead(settings: Settings, **sizes) -> Case:
    """Without it, both networks still run, as they would for any method."""
    sizes = SIZES | sizes
    variants, rows = {}, []
    for name, amp, goal in (('fp32', 'off', 0.11), ('bf16', 'bf16', 0.30)):
        for distil in (True, False):
            run = our_step(settings, sizes, channels_last=True, amp=amp, distil=distil)
            variants[f'{name} {"with" if distil else "without"}'] = Variant(run, name)
        rows.append(Row(f'{name} with', f'{name} without', goal, 'overhead', tolerance=float('inf')))
    return Case(variants, rows)
