"""How long main_distill.py takes for CIFAR-100's 240 epochs of KD, told by a few of them: training and evaluation.

Alone, and for each of several seeds side by side. All views are in the teacher's table before: whichever network has
filled it makes no difference, so a small one does. Its filling, what comes before the first epoch, and the files that
are written every ten seconds are not in it. On a CPU there is only a handful of images, and nothing is judged.
"""
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from models import create_model

from .harness import ROOT, Case, Row, Settings, Variant

EPOCHS, BUDGET = 240, 'a minute and a half'
CUDA = {'student': 'resnet8x4', 'images': 50000, 'epochs': 8, 'flags': ['--fast', '--cuda-graph', '--compile']}
CPU = {'student': 'resnet8', 'images': 12, 'epochs': 3, 'flags': ['--no-accel']}
NEW = 2  # first epochs, in which kernels are made and chosen
SEEDS = 3


def cifar_run(settings: Settings, **sizes) -> Case:
    on_cuda = settings.device.type == 'cuda'
    of, folder = (CUDA if on_cuda else CPU) | sizes, TemporaryDirectory()
    torch.save(create_model('resnet8', 100).state_dict(), Path(folder.name, 'teacher.pth'))

    def seconds(seeds: int) -> float:
        root = Path(folder.name)
        command = [sys.executable, ROOT / 'main_distill.py', '--dataset', 'cifar100', '--dummy', '--dummy-images',
                   of['images'], '--arch', of['student'], '--teacher-arch', 'resnet8', '--teacher-resume',
                   root / 'teacher.pth', '--distiller', 'kd', '--cache-teacher', 'full', '--cache-dir', root / 'cache',
                   '--batch-size', 64, '--lr', 0.05, '--epochs', of['epochs'], '--print-freq', 200,
                   '--skip-first-evaluation', '--seeds', *range(seeds), '--output',
                   root / str(seeds), *of['flags']]
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
        ends = [json.loads(line)['seconds'] for line in (root / f'{seeds}-0' / 'log.jsonl').read_text().splitlines()]
        durations = [end - begin for begin, end in zip(ends[NEW - 1:], ends[NEW:])]
        return EPOCHS * median(durations) / seeds

    variants = {'alone': 1, f'each of {SEEDS} seeds': SEEDS}
    rows = [Row(name, BUDGET, 1 if on_cuda else None, 'cost', tolerance=float('inf')) for name in variants]
    measured = {name: Variant(lambda seeds=seeds: (seconds(seeds), {})) for name, seeds in variants.items()}
    return Case({BUDGET: Variant(lambda: (90, {})), **measured}, rows, unit='s', measures=True)
