"""A training step of KD between CIFAR's networks, with a live teacher and with a cached one."""
from types import SimpleNamespace

import torch

from distillers import Distillation
from distillers.cache import TeacherCache
from distillers.kd import KD
from models import create_model
from utils.data import Batch, Dummy, Images, PlainView, Prepare, ResidentLoader, TrainData
from utils.order import EvalOrder
from utils.resident import VIEWS, Resident
from utils.setup import place

from .harness import Case, Row, Settings, Variant
from .mgd_step import settle, training_step
from .plain import plain_kd_step

SIZES = {'teacher': 'resnet32x4', 'student': 'resnet8x4', 'batch': 64, 'images': 256}


def ingredients(settings: Settings, args, teacher: str, student: str, batch: int, images: int):
    """Networks, the data that a batch is from, and the batch before Prepare, at every call the same."""
    torch.manual_seed(0)
    teacher, student = (create_model(arch, 100).to(settings.device) for arch in (teacher, student))
    source = Dummy(images, 100, 32)
    train = TrainData(ResidentLoader(Images(source, PlainView(32)), EvalOrder(range(images), batch, 0, 1),
                                     Resident(source, settings.device)))
    index, view = torch.randperm(images)[:batch], torch.randint(VIEWS, (batch,))
    there, resident = index.to(settings.device), train.resident(settings.device)
    data = Batch(resident.views(there, view.to(settings.device)), resident.targets[there], index, None, view=view)
    settle(teacher, Prepare(args, settings.device)(data).images)
    return student, teacher.eval().requires_grad_(False), train, data


def options(channels_last: bool, amp: str) -> SimpleNamespace:
    return SimpleNamespace(channels_last=channels_last, compile=False, amp=amp, no_bias_decay=False, optimizer='sgd',
                           lr=0.01, momentum=0.9, nesterov=False, weight_decay=5e-4, dataset='cifar100', mixup=0,
                           cutmix=0, cache_dir=None)


def our_step(settings: Settings, sizes: dict, amp='off', cached=False):
    args = options(True, amp)
    student, teacher, train, batch = ingredients(settings, args, **sizes)
    student, teacher = (place(network, settings.device, args) for network in (student, teacher))
    task, prepare = Distillation(student, teacher, {'kd': KD(student, teacher)}), Prepare(args, settings.device)
    if cached:
        task.cache = TeacherCache(teacher, 'teacher', task.read_of_teacher(), train, prepare, settings.device, args)
        prepare = task.cache.prepare
    return training_step(task, batch, args, prepare)


def cifar_kd(settings: Settings, **sizes) -> Case:
    """Of the cached, the first round, which does not count, lets the teacher fill in what the others look up."""
    sizes = SIZES | sizes
    args = options(False, 'off')
    student, teacher, _, batch = ingredients(settings, args, **sizes)
    variants = {
        'plain': Variant(plain_kd_step(student, teacher, Prepare(args, settings.device)(batch))),
        'live': Variant(our_step(settings, sizes)),
        'bf16 live': Variant(our_step(settings, sizes, 'bf16'), 'bf16'),
        'cached': Variant(our_step(settings, sizes, cached=True)),
        'bf16 cached': Variant(our_step(settings, sizes, 'bf16', cached=True), 'bf16'),
    }
    rows = [Row('live', 'plain', 1.1, tolerance=1e-4), Row('bf16 live', 'plain', 2.0, tolerance=2e-2),
            Row('cached', 'plain', 2.2, tolerance=1e-3), Row('bf16 cached', 'plain', 5.0, tolerance=2e-2)]
    return Case(variants, rows)
