"""What training costs, in time and memory, measured with the training loop itself on one batch. For --inspect."""
import io
import os
import sys
from contextlib import redirect_stdout, suppress
from itertools import islice, pairwise
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import DataLoader

from .closely import now
from .data import AT_ONCE
from .engine import train_one_epoch
from .graph import WARM_UP
from .learner import Learner
from .meters import percentages
from .optim import total_epochs
from .order import TrainOrder

UPDATES = 4  # of a measurement, behind those in which a graph is recorded
TINY, PATIENCE = 8, 20.0  # on a CPU: images of a measurement, where that of a batch would take more seconds
STATUS = Path('/proc/self/status')


class Again:
    """A batch, some times over, in place of an epoch."""

    def __init__(self, batch, images, device, updates):
        n = len(batch.target)
        self.batch, self.images, self.device, self.times = batch, images, device, []
        self.order = TrainOrder(updates * n, n, 1, 0, 0, 1)

    def updates(self, epoch, start):
        for end, _ in self.order.plan():
            self.times.append(now(self.device))
            yield end, [self.batch]

    def report_bad(self, batches):
        return 0


def loading(train, args, device) -> tuple:
    """A batch, and the seconds from batch to batch where nobody keeps the loader waiting."""
    order = train.order
    ahead = max(args.workers if isinstance(train.loader, DataLoader) else AT_ONCE // order.batch, 1)
    whole = order.length // order.batch
    wanted = max(min(3 * ahead, whole), 1)
    order.at(0, max(whole - wanted, 0) * order.batch)
    times, first = [now(device)], None
    for batch in islice(train.loader, wanted):
        times.append(now(device))
        first = first or batch
        if times[-1] - times[0] > PATIENCE / 2:
            break
    # The first ones say nothing: all workers, or the device, made them at the same time.
    warm = times[ahead if len(times) > ahead + 1 else 0:]
    return first, (warm[-1] - warm[0]) / (len(warm) - 1)


def step(batch, task, images, prepare, optimizer, scaler, ema, run, device, args) -> dict[str, float]:
    """Seconds of the parts of an update, by the training loop itself."""
    again = Again(batch, images, device, UPDATES + (WARM_UP + 1) * args.cuda_graph)
    run.progress |= {'epoch': min(run.progress['epoch'], total_epochs(args) - 1), 'sample': 0, 'sums': {}}
    with redirect_stdout(io.StringIO()):
        train_one_epoch(Learner(task, optimizer, scaler, device, args), again, prepare, ema, run, device, args)
    parts = percentages(run.progress['sums'])['update']
    whole = median(b - a for a, b in pairwise([*again.times[-2:], now(device)]))  # behind the one looked at closely
    # The parts are of a single update. Where they add up to more than the others took, the machine was busy with
    # something else, and they are scaled to these.
    slower = max(sum(parts.values()) / whole, 1)
    parts = {name: seconds / slower for name, seconds in parts.items()}
    return parts | {'rest': max(whole - sum(parts.values()), 0.0), 'step': whole}


def measure(batch, how, device) -> dict[str, float]:
    """step() of a batch or, where this takes too long, of some of its images; and the peak of memory with them."""
    forget_peak(device)
    images = len(batch.target)
    if device.type == 'cpu' and images > TINY:
        cost, times = step(cut(batch, TINY), *how), images / TINY
        if cost['step'] * times * UPDATES > PATIENCE:
            scaled = {name: value * (times if name != 'rest' else 1) for name, value in cost.items() if name != 'step'}
            return scaled | {'step': sum(scaled.values()), 'images': TINY, 'peak': peak(device)}
    return step(batch, *how) | {'images': images, 'peak': peak(device)}


def preparation(distillation, train, prepare, pairs: float, n: int, load: float, device) -> dict[str, float]:
    """Seconds of what methods do with pairs of images before the first and the next epoch, scaled from a few.

    load: seconds per image of a loader at work; these few wait for one that begins.
    """
    some, seconds = min(n, TINY) if device.type == 'cpu' else n, []
    for epoch in (1, 2):
        looks, began = [], now(device)

        def look():
            before = now(device)
            found = [*train.sample(0, some)]
            looks.append(now(device) - before)  # noqa: B023
            return map(prepare, found)
        news = distillation.start_epoch(epoch, look)
        if news is None:
            sys.exit('error: stopped by a signal')
        fixed = sum(row.get('seconds', 0.0) for rows in news.values() for row in rows)
        each = (now(device) - began - fixed - sum(looks)) / some + load * len(looks)
        seconds.append(fixed + pairs * each if looks else 0.0)
    return dict(zip(('first', 'each'), seconds))


def cut(batch, n: int):
    return batch._replace(**{name: value[:n] for name, value in batch._asdict().items()
                             if isinstance(value, torch.Tensor) and value.ndim})


def forget_peak(device):
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # where the system has no such file, the peak is that of the whole process
            (STATUS.parent / 'clear_refs').write_text('5')


def peak(device) -> int:
    """Bytes, on a CPU those of the process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return status('VmHWM')


def status(key: str) -> int:
    """Bytes of this process, where the system tells, else 0. Not getrusage: a child inherits its peak."""
    told = STATUS.read_text().partition(f'{key}:')[2].split() if STATUS.exists() else []
    return 1024 * int(told[0]) if told else 0


def memory(device) -> int:
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
