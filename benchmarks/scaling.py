"""A training step of MGD under DistributedDataParallel: the same global batch on more and more ranks."""
import json
import os
import time
from statistics import median

import torch

from distillers import Distillation
from utils import distributed
from utils.args import base_parser

from .harness import Case, Limit, Row, Settings, Variant, in_its_own_process
from .mgd_step import arguments, ingredients, training_step

STEPS = 8


def scaling(settings: Settings, ranks=(1, 2), steps=STEPS, **sizes) -> Case:
    """Wall-clock time, so that the machine has to be quiet; a rank per core or GPU. Norms see their rank's share."""
    there = torch.cuda.device_count() if settings.device.type == 'cuda' else os.cpu_count() // settings.threads
    sizes = {'teacher': 'resnet50', 'student': 'mobilenet_v1', 'size': 112, 'batch': settings.batch(16, 256)} | sizes
    enough = [n for n in ranks if n <= there]
    given = settings.device.type, settings.threads, steps, sizes
    variants = {named(n): Variant(in_its_own_process(__name__, n, *given)) for n in enough}
    rows = [Row(named(n), named(1), None, tolerance=0.1) for n in enough[1:]]
    skipped = tuple(f'{named(n)}: {there} fit on this machine' for n in ranks if n > there)
    return Case(variants, rows, measures=True, limit=lambda: Limit('as many times as there are ranks'), skipped=skipped)


def named(ranks: int) -> str:
    return f'{ranks} rank' + 's' * (ranks > 1)


def main(given: str):
    number, device, threads, steps, sizes = json.loads(given)
    args = base_parser('').parse_args(['--dummy', '--multiprocessing-distributed', '--procs-per-node', str(number)])
    args.no_accel, args.threads, args.steps, args.sizes = device == 'cpu', threads, steps, sizes
    distributed.launch(worker, args)


def worker(args, device):
    torch.set_num_threads(args.threads)
    student, teacher, method, batch = ingredients(Settings(device, args.threads), **args.sizes)
    mine = slice(distributed.rank(), None, distributed.world())
    batch = batch._replace(**{name: getattr(batch, name)[mine] for name in ('images', 'target', 'index', 'bad')})
    task = distributed.wrap(Distillation(student, teacher, {'mgd': method}), device, args)
    step, seconds, losses = training_step(task, batch, arguments()), [], []
    for _ in range(args.steps):
        distributed.agree(0)
        start = time.perf_counter()
        losses.append(step()['loss'].item())
        distributed.agree(0)
        seconds.append(time.perf_counter() - start)
    loss = sum(distributed.gather(losses[0])) / distributed.world()
    distributed.say(json.dumps([1e3 * median(seconds[1:]), loss]))
