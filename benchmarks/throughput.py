"""Images per second of main_distill.py under MGD, fed from prepared images, and how long of that it waits for data.

The rate is that of the loop over the second epoch, whose kernels are chosen and whose workers run, while it has data;
the update of the flow and the evaluation are not in it. `throughput` has the images from loader processes, as those of
a data set that no GPU can hold: JPEGs, and in another run raw pixels. The wait for the first batch, which one process
makes alone, is in the share, so the epoch is long. In `throughput_device` the device holds and crops them, for other
students: there waiting is the time that the host takes to ask for a batch, while a GPU does what it was asked before.
Files are few, under many names, and in the system's cache: no disk is measured. While the loop waits, a GPU may still
be at work on what it was given before, so the share is a bound of what waiting costs.

On a CPU, networks and workers share the cores. The sizes there only show that it runs, and nothing is judged.
"""
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch

from models import create_model
from utils.setup import has_bf16

from .harness import ROOT, Case, Row, Settings, Variant
from .loader import prepare, write_folder
from .mgd_step import settle

CUDA = {'teacher': 'resnet50', 'size': 224, 'batch': 256, 'images': 128, 'flags': ['--fast', '--compile']}
CPU = {'teacher': 'resnet50', 'size': 64, 'batch': 8, 'images': 16, 'flags': ['--fast', '--no-accel']}


def throughput(settings: Settings, **sizes) -> Case:
    names = 600 if settings.device.type == 'cuda' else 4
    return fed(settings, **{'kinds': ('jpeg', 'raw'), 'students': ('mobilenet_v1',), 'names': names} | sizes)


def throughput_device(settings: Settings, **sizes) -> Case:
    names, students = (150, ('mobilenet_v2_mgd', 'shufflenet_v2', 'resnet18')) if settings.device.type == 'cuda' else (
        3, ('shufflenet_v2',))
    return fed(settings, **{'kinds': ('device',), 'students': students, 'names': names} | sizes)


def fed(settings: Settings, **sizes) -> Case:
    on_cuda = settings.device.type == 'cuda'
    of, kept, facts = SimpleNamespace(**(CUDA if on_cuda else CPU) | sizes), TemporaryDirectory(), {}
    root = Path(kept.name)
    write_folder(root / 'images', of.images, of.images, width=500, height=375)
    folders = {kind: prepare(root / 'images', 'raw' if kind == 'device' else kind) for kind in of.kinds}
    for folder in folders.values():
        multiply(folder, of.names)
    torch.save(settled(of.teacher, of.size).state_dict(), root / 'teacher.pth')

    runs = {f'{student} raw' if kind == 'raw' else student: (student, kind)
            for kind in of.kinds for student in of.students}

    @cache
    def update(name: str) -> dict:
        """Seconds of one, and of those the time without data."""
        (student, kind), output = runs[name], Path(kept.name) / name  # by kept: the folder stays as long as this does
        command = [sys.executable, ROOT / 'main_distill.py', folders[kind], '--arch', student, '--teacher-arch',
                   of.teacher, '--teacher-resume', root / 'teacher.pth', '--distiller', 'mgd', '--image-size', of.size,
                   '--batch-size', of.batch, '--num-classes', 1000, '--epochs', 2, '--lr', 1e-3, '--pair-images',
                   of.batch, '--data-backend', 'device' if kind == 'device' else 'loader', '--workers', os.cpu_count(),
                   '--skip-first-evaluation', '--seed', 0, '--output', output, *of.flags,
                   *(['--gpu', 0] if on_cuda else [])]
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL,
                       env=os.environ | {'OMP_NUM_THREADS': str(settings.threads)})
        time = json.loads((output / 'log.jsonl').read_text().splitlines()[-1])['train']['time']
        facts[f'{name}, wait'] = {'images/s': round(of.batch / (time['seconds'] - time['wait'])), 'from': kind}
        print(f'{name}: {facts[f"{name}, wait"]}, waits {time["wait"] / time["seconds"]:.1%}', flush=True)
        return time

    precision, variants = 'bf16' if has_bf16(settings.device) else 'fp32', {}
    for name in runs:
        variants[name] = Variant(lambda name=name: (1e3 * update(name)['seconds'], {}), precision)
        variants[f'{name}, wait'] = Variant(lambda name=name: (1e3 * update(name)['wait'], {}), precision)
    rows = [Row(f'{name}, wait', name, 0.05 if on_cuda else None, 'share', tolerance=float('inf')) for name in runs]
    return Case(variants, rows, measures=True, facts=facts)


def multiply(folder: Path, names: int):
    """Give each file of the training images further names, which takes no room."""
    for path in [path for path in (folder / 'train').rglob('*') if path.is_file()]:
        for number in range(1, names):
            path.with_name(f'{number}-{path.name}').hardlink_to(path)


def settled(arch: str, size: int) -> torch.nn.Module:
    """With weights that are drawn, and features of a usual size all the same."""
    torch.manual_seed(0)
    network = create_model(arch)
    settle(network, torch.randn(8, 3, size, size))
    return network
