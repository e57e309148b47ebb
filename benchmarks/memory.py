"""Peak memory of a training step of MGD, each variant in a process of its own."""
import ctypes
import json
from pathlib import Path
from statistics import median

import torch

from utils.cost import forget_peak, peak, status
from utils.heap import keep_memory
from utils.setup import full_float32

from . import peers
from .harness import Case, Row, Settings, Variant, in_its_own_process
from .mgd_step import builders, sizes_for

STEPS = 5


def memory(settings: Settings, **sizes) -> Case:
    sizes = sizes_for(settings, sizes)
    given = str(settings.device), settings.threads, str(settings.peers or ''), sizes
    variants = {name: Variant(in_its_own_process(__name__, name, *given), kind)
                for name, (_, kind, _) in builders(settings, sizes).items()}
    rows = [Row('channels_last', 'plain', 0.9, 'share', tolerance=1e-4),
            Row('bf16 folded', 'plain', 0.5, 'share', tolerance=2e-2),
            Row('channels_last', peers.MGD, 0.45, 'share', tolerance=1e-4),
            Row('bf16 folded', peers.MGD, 0.3, 'share', tolerance=2e-2)]
    return Case(variants, rows, unit='MB', measures=True, skipped=peers.trouble(settings))


def growth_of(run, device: torch.device) -> tuple[float, float]:
    """MB that a step takes beyond what is there between two, the median of some, and the loss of the one before."""
    with full_float32():
        loss = run()['loss'].item()  # some make their momentum in it, which others have by then
    taken = []
    for _ in range(STEPS):
        forget(device)
        before = held(device)
        run()
        taken.append((peak(device) - before) / 1e6)
    return median(taken), loss


def forget(device: torch.device):
    """The peak so far, and on a CPU what is free but still counts as taken."""
    if device.type == 'cpu':
        ctypes.CDLL(None).malloc_trim(0)
    forget_peak(device)


def held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == 'cuda' else status('VmRSS')


def main(given: str):
    name, device, threads, folder, sizes = json.loads(given)
    torch.set_num_threads(threads)
    settings = Settings(torch.device(device), threads, Path(folder) if folder else None)
    build, _, theirs = builders(settings, sizes)[name]
    if not theirs and device == 'cpu':
        keep_memory()
    print(json.dumps(growth_of(build(), settings.device)))
