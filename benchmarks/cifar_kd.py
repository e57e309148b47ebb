"""A training step of KD between CIFAR's networks, with a live teacher and with a cached one."""
from functools import partial
from types import SimpleNamespace

import torch

from distillers import Distillation
from distillers.cache import TeacherCache
from distillers.kd import KD
from distillers.lean import LeanTeacher
from models import create_model
from utils.data import Batch, Images, Prepare, ResidentLoader, TrainData
from utils.learner import Learner
from utils.optim import make_optimizer
from utils.order import EvalOrder
from utils.resident import VIEWS, Resident
from utils.setup import compiled, place
from utils.sources import Dummy
from utils.views import PlainView

from . import peers
from .harness import Case, Limit, Row, Settings, Variant, products
from .mgd_step import arguments, settle, training_step
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
    if settings.device.type == 'cuda':
        index, view = index.pin_memory(), view.pin_memory()  # as in ResidentLoader
    there, resident = index.to(settings.device), train.resident(settings.device)
    data = Batch(resident.views(there, view.to(settings.device)), resident.targets[there], index, None, view=view)
    settle(teacher, Prepare(args, settings.device)(data).images)
    return student, teacher.eval().requires_grad_(False), train, data


def options(channels_last: bool, amp: str, compile=False) -> SimpleNamespace:
    return SimpleNamespace(**vars(arguments(channels_last, amp, fold=True, compile=compile)) | {
        'lr': 0.01, 'weight_decay': 5e-4, 'dataset': 'cifar100', 'mean': None, 'std': None, 'mixup': 0, 'cutmix': 0,
        'cache_dir': None, 'cuda_graph': True, 'clip_grad': None, 'max_broken_updates': 0})


def our_step(settings: Settings, sizes: dict, amp='off', cached=False, graph=False, compile=False):
    args = options(True, amp, compile)
    student, teacher, train, batch = ingredients(settings, args, **sizes)
    student, teacher = (place(network, settings.device, args) for network in (student, teacher))
    task = compiled(Distillation(student, teacher, {'kd': KD(student, teacher)}), args)
    prepare = Prepare(args, settings.device)
    if cached:
        task.stand_in = TeacherCache(teacher, 'teacher', task.read_of_teacher(), train, prepare, settings.device, args)
        prepare = task.stand_in.prepare
    else:
        task.stand_in = LeanTeacher(task, teacher, settings.device, args)
    batch = prepare(batch)  # as it comes from a loader, normalised with others and seen by the teacher
    if not graph:
        return training_step(task, batch, args)
    task.stream = None if cached else torch.cuda.Stream()
    scaler = torch.amp.GradScaler(enabled=False)
    learner = Learner(task.train(), make_optimizer(task, args), scaler, settings.device, args)

    def run():
        values, _ = learner.graph(batch)
        return {'loss': values[learner.names.index('loss')]}
    return run


def peer_steps(settings: Settings, sizes: dict) -> dict:
    makers = {peers.MDISTILLER: partial(peers.mdistiller_kd, names=(sizes['student'], sizes['teacher'])),
              peers.TORCHDISTILL: peers.torchdistill_kd}
    steps = {}
    for name, make in makers.items():
        if peers.available(settings, name):
            args = options(False, 'off')
            student, teacher, _, batch = ingredients(settings, args, **sizes)
            step = make(settings, student, teacher, batch=Prepare(args, settings.device)(batch))
            steps[name] = Variant(step, theirs=True)
    return steps


def cifar_kd(settings: Settings, **sizes) -> Case:
    """All are given the same prepared batch."""
    sizes = SIZES | sizes
    args = options(False, 'off')
    student, teacher, _, batch = ingredients(settings, args, **sizes)
    variants = {
        'plain': Variant(plain_kd_step(student, teacher, Prepare(args, settings.device)(batch)), theirs=True),
        'live': Variant(our_step(settings, sizes)),
        'bf16 live': Variant(our_step(settings, sizes, 'bf16'), 'bf16'),
        'cached': Variant(our_step(settings, sizes, cached=True)),
        'bf16 cached': Variant(our_step(settings, sizes, 'bf16', cached=True), 'bf16'),
    } | peer_steps(settings, sizes)
    goals = {'plain': (1.1, 2.0, 2.2, 5.0), peers.MDISTILLER: (1.2, 2.5, 2.2, 7.0),
             peers.TORCHDISTILL: (1.2, 2.5, 2.2, 7.0)}
    tolerances = {'live': 1e-4, 'bf16 live': 2e-2, 'cached': 1e-3, 'bf16 cached': 2e-2}
    if settings.device.type == 'cuda':  # steps so short that launching their kernels takes longer: as one graph
        for compile in (False, True):
            for cached in (False, True):
                name = f'bf16 graph{" compiled" * compile}{" cached" * cached}'
                variants[name] = Variant(our_step(settings, sizes, 'bf16', cached, graph=True, compile=compile), 'bf16')
                tolerances[name] = 2e-2
        goals = {baseline: (*aims, 4.0, 10.0, 4.0, 10.0) for baseline, aims in goals.items()}
    rows = [Row(variant, baseline, goal, tolerance=tolerance) for baseline, aims in goals.items()
            for (variant, tolerance), goal in zip(tolerances.items(), aims)]

    def limit():
        live, cached = (products(variants[name].run, {k: variants[k] for k in tolerances if ('cached' in k) == kept},
                                 settings.device) for name, kept in (('live', False), ('cached', True)))
        return Limit(f'{live.what}; cached {cached.what.partition(" of")[0]}', {**live.least, **cached.least})
    return Case(variants, rows, limit=limit, skipped=peers.trouble(settings, peers.MDISTILLER, peers.TORCHDISTILL))
