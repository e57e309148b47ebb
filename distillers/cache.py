"""An exact cache of a frozen teacher: what it shows of each of the 162 views of each CIFAR image (utils/resident.py).

A table holds one field of Features, logits or pooled, in float16, and training always reads it from there: a view looks
the same at the first visit and at later ones. The teacher fills it in float32, without autocast, in eval mode.

With a folder, a table is also a file, named by a hash of what it follows from:
    header   4096 bytes of JSON: teacher, data, normalisation, field, type, sizes
    marks    int32 [N * 162], 0 where the view is not known, else a checksum of its values
    values   float16 [N * 162, C]
Values reach the disk before their marks do, and a process that reads or writes holds a lock. So several processes may
use and fill one file, each bringing in what others have not (it reads what they have when it begins), a crash costs
what was not written yet, and values that do not match their marks are refused.
"""
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from models import Features
from utils import distributed, signals
from utils.cost import memory
from utils.data import Batch
from utils.resident import VIEWS
from utils.views import statistics

from .base import OUTPUTS, probe

HEADER, DTYPE = 4096, torch.float16
ROWS_AT_ONCE = 2**13
# How many images the teacher looks at. A multiple of the first number: so there are few sizes to search the fastest
# kernels for, and none so small that it has kernels of its own. At most the second: so a CPU's cache holds the maps.
AT_ONCE = {'cpu': (16, 64), 'cuda': (128, 512)}
SAVE_EVERY = 60  # seconds of filling in


class Table:
    """Values on the device, which of them are known on the host, and a file of both if it has a path."""

    def __init__(self, rows: int, width: int, device: torch.device, path: Path | None = None, about=None):
        self.values = torch.zeros(rows, width, dtype=DTYPE, device=device)
        self.known = torch.zeros(rows, dtype=torch.bool)
        self.path, self.about, self.fresh = path, about, []
        if path:
            self.load()

    def put(self, rows: torch.Tensor, values: torch.Tensor):
        self.values[rows.to(self.values.device, non_blocking=True)] = values.to(DTYPE)
        self.known[rows] = True
        if self.path:
            self.fresh.append(rows)

    def load(self):
        with self.opened() as (marks, values):
            self.known = torch.from_numpy(marks != 0)
            for part in self.known.nonzero()[:, 0].split(ROWS_AT_ONCE):
                value = torch.from_numpy(values[part.numpy()])
                if not torch.equal(checksums(value), torch.from_numpy(marks[part.numpy()])):
                    sys.exit(f'error: {self.path} is damaged; delete it, and it is filled in anew')
                self.values[part.to(self.values.device)] = value.to(self.values.device)

    def save(self):
        """Bring into the file what is known here and not there; what float16 cannot hold stays out."""
        if not self.fresh:
            return
        rows, self.fresh = torch.cat(self.fresh).sort().values, []
        with self.opened() as (marks, values):
            rows, sums = rows[torch.from_numpy(marks[rows.numpy()] == 0)], []
            for part in rows.split(ROWS_AT_ONCE):
                value = self.values[part.to(self.values.device)].cpu()
                values[part.numpy()] = value.numpy()
                sums.append(torch.where(value.isfinite().all(1), checksums(value), 0))
            values.flush()
            marks[rows.numpy()] = torch.cat(sums).numpy() if sums else 0
            marks.flush()

    @contextmanager
    def opened(self):
        """The file's marks and values, this process's alone for a while."""
        rows, width = self.values.shape
        header = json.dumps(self.about).encode().ljust(HEADER, b'\0')
        size = HEADER + 4 * rows + 2 * rows * width
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), 'r+b') as file:
                fcntl.lockf(file, fcntl.LOCK_EX)
                found = file.read(HEADER)
                if not found.strip(b'\0'):  # new, or its maker got no further
                    free = shutil.disk_usage(self.path.parent).free + 512 * os.fstat(file.fileno()).st_blocks
                    if free < size:  # an attempt would take all that is left
                        raise OSError(errno.ENOSPC, f'it needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free')
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and a crash in a mapping
                    file.seek(0)
                    file.write(header)
                    file.flush()
                    os.fsync(file.fileno())
                elif found != header or os.fstat(file.fileno()).st_size != size:
                    sys.exit(f'error: {self.path} is damaged, or no table of this teacher; delete it')
                yield (np.memmap(file, np.int32, 'r+', HEADER, (rows,)),
                       np.memmap(file, np.float16, 'r+', HEADER + 4 * rows, (rows, width)))
        except OSError as error:
            sys.exit(f'error: --cache-dir: {self.path}: {error.strerror}')


def checksums(values: torch.Tensor) -> torch.Tensor:
    """[R, C] -> [R], from 1 on: a weighted sum modulo a prime, which no single wrong number leaves as it was."""
    words = values.view(torch.int16).double()  # of integers, so the product is exact
    return ((words @ torch.arange(1, values.shape[1] + 1).double()).long() % (2**31 - 1) + 1).int()


class TeacherCache:
    """In place of the teacher while a student trains, with `prepare` in place of Prepare."""

    def __init__(self, teacher, identity: str, fields: set[str], train, prepare, device, args):
        self.teacher, self.train, self.prepare_images, self.device = teacher, train, prepare, device
        shown, rows = probe(teacher), len(train.images) * VIEWS
        if more := fields - OUTPUTS:
            sys.exit(f"error: --cache-teacher keeps logits and pooled features, but a method reads the teacher's "
                     f'{", ".join(more)} as well: leave it out')
        widths = {field: getattr(shown, field).shape[1] for field in sorted(fields)}
        if (size := 2 * rows * sum(widths.values())) > memory(device):
            sys.exit(f'error: --cache-teacher: {sum(widths.values()):,} numbers of each of {rows:,} views, '
                     f'{" and ".join(widths)}, take {size / 1e9:.1f} GB, and there are {memory(device) / 1e9:.1f} GB')
        self.tables = {}
        data = train.resident(device).fingerprint() if args.cache_dir else None
        for field, width in widths.items():
            path = None
            about = {'teacher': identity, 'data': data, 'normalisation': statistics(args), 'field': field,
                     'type': 'float16', 'rows': rows, 'width': width, 'format': 1}
            if args.cache_dir:
                key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
                path = Path(args.cache_dir) / f'{identity.split()[0]}-{field}-{key}.table'
            self.tables[field] = Table(rows, width, device, path, about)
        self.filled = torch.cuda.Event() if device.type == 'cuda' else None
        distributed.at_end.callback(self.save)

    def wait(self):
        """What was brought in by runs side by side, each on its stream, is there for what comes now."""
        if self.filled:
            torch.cuda.current_stream(self.device).wait_event(self.filled)

    def __str__(self):
        size, views = sum(table.values.nbytes for table in self.tables.values()) / 1e9, len(self.train.images) * VIEWS
        return (f'{" and ".join(self.tables)}, {size:.2f} GB, {views - len(self.unknown()):,} of {views:,} views '
                'known')

    def __call__(self, batch: Batch) -> Features:
        rows = batch.index * VIEWS + batch.view
        fields = {field: table.values.index_select(0, rows).float() for field, table in self.tables.items()}
        return Features(**{'logits': None, 'pooled': None, 'head': None, 'preact': [], 'maps': []} | fields)

    def prepare(self, batch: Batch) -> Batch:
        """A batch on the device, of which every view is known."""
        self.look(batch)
        return self.prepare_images(batch)

    def unknown(self, rows=slice(None)) -> torch.Tensor:
        """Places, among these rows, of views not known. By numpy, as all updates ask: in a quarter of torch's time."""
        known = np.logical_and.reduce([table.known.numpy()[rows] for table in self.tables.values()])
        return torch.from_numpy(np.flatnonzero(~known))

    @torch.no_grad()
    def look(self, batch: Batch):
        """Let the teacher look at what is not known of a batch that comes from a loader."""
        self.wait()
        rows = (batch.index * VIEWS + batch.view).cpu()  # on the host already, but for --inspect on a GPU
        multiple, most = AT_ONCE[self.device.type]
        for places in self.unknown(rows.numpy()).split(most):
            if not (n := len(places)):  # of nothing, split gives one part
                break
            asked = places[torch.arange(-(-n // multiple) * multiple) % n]
            there = asked.to(self.device, non_blocking=True)  # without waiting for all that the device has yet to do
            fields = (x.to(self.device, non_blocking=True)[there] for x in batch[:3])
            with torch.autocast(self.device.type, enabled=False):
                shown = self.teacher(self.prepare_images(Batch(*fields, None)).images, features=True)
            for field, table in self.tables.items():
                table.put(rows[places], getattr(shown, field)[:n])
            if self.filled:
                self.filled.record()

    def fill(self) -> bool:
        """Let the teacher look at all that is not known, each rank for itself; False where a signal asks to stop."""
        resident, began, done = self.train.resident(self.device), time.monotonic(), 0
        unknown, (_, at_once) = self.unknown(), AT_ONCE[self.device.type]
        while True:
            until = time.monotonic() + SAVE_EVERY  # then all ranks hear of each other
            while done < len(unknown) and not signals.caught():
                rows = unknown[done:done + at_once]
                index, view = rows // VIEWS, rows % VIEWS
                there = [x.to(self.device, non_blocking=True) for x in (index, view)]
                self.look(Batch(resident.views(*there), there[0], index, None, view=view))
                done += len(rows)
                if time.monotonic() > until:
                    break
            self.save()
            if len(unknown):
                distributed.say(f'teacher cache: {done:,} of {len(unknown):,} views filled in, '
                                f'{done / (time.monotonic() - began):,.0f} per second')
            left, stop = distributed.agree(len(unknown) - done, signals.caught())
            if stop or not left:
                return not stop

    def save(self):
        self.wait()
        for table in self.tables.values():
            table.save()
