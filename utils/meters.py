"""What is counted while a network trains. Numbers stay on the device until a line is printed or a file is written."""
import math
import shutil
import sys
import time
from collections import defaultdict
from datetime import timedelta

import torch

from . import distributed

# Sums that are told as means over updates. time/: seconds, and those without data; update/: seconds of its parts;
# balance/: norms of the gradients of labels and of distillation, and the cosine between them
KINDS = ('time/', 'update/', 'balance/')


def hits(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How many of a batch are right at the first guess, and within five (or as many as there are classes).

    By argmax's order, so that guesses and hits agree: of equal logits the first, and what is no number before all.
    """
    target = target.argmax(1, keepdim=True) if target.ndim == 2 else target[:, None]
    own, classes = logits.gather(1, target), torch.arange(logits.shape[1], device=logits.device)
    before = ~(logits <= own) | (logits == own) & (classes < target)
    place = before.sum(1)
    return torch.stack([(place < guesses).sum() for guesses in (1, min(5, logits.shape[1]))])


def percentages(sums: dict) -> dict:
    """Sums of an epoch as the records have them: means, and percent right."""
    n = max(sums.get('n', 0), 1)
    record = {'loss': sums.get('loss', 0.0) / n}
    for k in ('top1', 'top5'):
        record[k] = 100 * sums.get(k, 0) / n
    parts = {k.removeprefix('loss/'): v / n for k, v in sums.items() if k.startswith('loss/')}
    if parts:  # each in full, and as a share of their sum
        record['losses'] = parts
        record['shares'] = {k: v / record['loss'] if record['loss'] else 0.0 for k, v in parts.items()}
    for kind in KINDS:
        parts = {k.partition('/')[2]: v for k, v in sums.items() if k.startswith(kind)}
        if number := parts.pop('n', 0):
            record[kind[:-1]] = {k: v / number for k, v in parts.items()}
    return record


class Meter:
    """The sums of an epoch: n, top1, top5, loss, loss/NAME of every part, and KIND/n, KIND/NAME of what KINDS names."""

    def __init__(self, before: dict):
        self.before = before  # of all ranks, from the part of the epoch that a resumed run finds done
        self.sums = defaultdict(float)  # of this rank, since then
        self.rows, self.batches, self.norms, self.names, self.balances = [], [], [], [], []

    def add(self, batch, names: list[str], values: torch.Tensor):
        """A batch, and what came of it on the device."""
        self.names = names
        self.rows.append(values)
        index = batch.index if batch.index.is_cuda else batch.index.clone()  # not a loader's memory, an open file each
        self.batches.append((len(self.norms), index, len(index) if batch.weight else 0))

    def add_norm(self, norm):
        """The gradient's norm closes an update."""
        self.norms.append(norm)

    def add_balance(self, balance):
        """Norms of the gradients of labels and distillation, and the cosine between them (on the device)."""
        self.balances.append((len(self.norms), balance))

    def add_times(self, seconds: dict):
        """Of the parts of one update."""
        for name, value in {'n': 1, **seconds}.items():
            self.sums[f'update/{name}'] += value

    def clock(self, seconds: float, waited: float):
        """Since this meter was made, for the updates that were read: of all, and of those the time without data."""
        self.sums |= {'time/seconds': seconds, 'time/wait': waited}

    def read(self, watch_norms: bool) -> list[dict]:
        """Bring everything in from the device; returns what was not finite, by update, of which nothing is counted."""
        values, norms = torch.stack(self.rows).tolist(), torch.stack(self.norms).tolist()
        rows = [(*batch, dict(zip(self.names, row))) for batch, row in zip(self.batches, values)]
        troubles, losses = {}, {}  # by update; of its last batch
        for update, _, _, parts in rows:
            losses[update] = {k.removeprefix('loss/'): v for k, v in parts.items() if k.startswith('loss/')}
            for name, value in losses[update].items():
                if not math.isfinite(value):
                    troubles.setdefault(update, (f'loss {name}', value, losses[update]))
        for update, norm in enumerate(norms):  # spoilt by a loss, if there is a trouble already
            if watch_norms and not math.isfinite(norm):
                troubles.setdefault(update, ('gradient norm', norm, losses[update]))
        for update, _, n, parts in rows:
            if n and update not in troubles:
                self.sums['n'] += n
                for name, value in parts.items():
                    self.sums[name] += value * n if name.startswith('loss') else value
        for update, balance in self.balances:
            if update not in troubles:
                for name, value in zip(('n', 'labels', 'distillation', 'cosine'), (1, *balance.tolist())):
                    self.sums[f'balance/{name}'] += value
        self.sums['time/n'] += len(norms)
        told = [{'what': what, 'value': str(value), 'updates_ago': len(norms) - 1 - broken,
                 'samples': [i for update, index, _, _ in rows if update == broken for i in index.tolist()],
                 'losses': {name: str(loss) for name, loss in parts.items()}}
                for broken, (what, value, parts) in sorted(troubles.items())]
        self.rows, self.batches, self.norms, self.balances = [], [], [], []
        return told

    def everybody(self) -> dict:
        """The sums over all ranks and over the whole epoch so far."""
        if not self.names:
            return self.before
        names = ['n', *self.names, *sorted(k for k in self.sums if k.startswith(KINDS))]
        summed = distributed.total(torch.tensor([self.sums[k] for k in names], dtype=torch.float64)).tolist()
        return self.before | {k: self.before.get(k, 0.0) + v for k, v in zip(names, summed)}


class Display:
    """A line that a person can read: rewritten in place on a terminal, one after the other in a log; rank 0 only."""

    def __init__(self, head: str, updates: int, samples_left: int):
        self.head, self.updates, self.samples_left = head, updates, samples_left
        self.live, self.of = sys.stdout.isatty(), 'rank 0: ' * (distributed.world() > 1)
        self.began, self.waited, self.samples = time.monotonic(), 0.0, 0
        self.warm = None  # these three behind the first update, in which loaders begin and --compile compiles

    def count(self, samples: int):
        self.samples += samples
        self.warm = self.warm or (time.monotonic(), self.waited, self.samples)

    def show(self, sums: dict, rate: float, done: int):
        if not distributed.is_main():
            return
        began, waited, samples = self.warm if self.samples > self.warm[2] else (self.began, 0.0, 0)
        seconds = max(time.monotonic() - began, 1e-9)
        speed, wait = (self.samples - samples) / seconds, (self.waited - waited) / seconds
        means, width = percentages(sums), len(str(self.updates))
        left = timedelta(seconds=round((self.samples_left - self.samples) / max(speed, 1e-9)))
        text = (f'{self.head} [{done:{width}}/{self.updates}]  {speed:.1f} img/s  wait {wait:.0%}  '
                f'{self.of}loss {means["loss"]:.4f}  top1 {means["top1"]:.2f}  ETA {left}  lr {rate:.4g}')
        if self.live:  # a line that wraps could not be rewritten
            text = text[:shutil.get_terminal_size().columns - 1]
            print(f'\033[K{text}', end='\n' if done == self.updates else '\r', flush=True)
        else:
            print(text, flush=True)
