"""How a case is measured: all its variants, in random order within each round.

The machine may be busy, so what counts on a CPU is the process's own time, and what is reported is the median over
rounds of the ratio within a round. Each variant has a process there, so that memory which one has freed spares no other
its own, and those that are ours treat memory as the scripts do. A GPU's time is taken by its events, over many steps;
in fp32 its convolutions round to TF32, as PyTorch lets them, but not where results are compared.
"""
import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from math import prod
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from utils.heap import keep_memory
from utils.setup import full_float32, has_bf16

ROOT = Path(__file__).resolve().parent.parent
CUDA_STEPS, CUDA_MS = 40, 500  # of a variant in a round, whichever is less

# How a variant compares with its baseline, and whether more of it is better
METRICS = {
    'speed-up': (lambda ours, baseline: baseline / ours, True),
    'share': (lambda ours, baseline: ours / baseline, False),
    'overhead': (lambda ours, baseline: ours / baseline - 1, False),
    'cost': (lambda ours, baseline: ours / baseline, False),
}


class Settings(NamedTuple):
    device: torch.device = torch.device('cpu')
    threads: int = 1
    peers: Path | None = None  # a folder with checkouts of other projects
    images: int | None = None  # at once, in place of a case's own

    def batch(self, cpu: int, cuda: int) -> int:
        """A GPU needs more images at once before it, and not the launching of its kernels, takes the time."""
        return self.images or (cuda if self.device.type == 'cuda' else cpu)


class Variant(NamedTuple):
    run: Callable  # does the work once and returns what it comes to: numbers or tensors by name
    precision: str = 'fp32'
    clock: Callable[[], float] | None = None  # seconds, for what the host does; None: the device's own, by steps
    theirs: bool = False  # a plain formulation, or another project


class Row(NamedTuple):
    """A variant against another one. Their results may differ by `tolerance` of the mean magnitude."""
    variant: str
    baseline: str
    goal: float | None  # None: reported, not judged
    metric: str = 'speed-up'
    tolerance: float = 1e-5


class Limit(NamedTuple):
    what: str  # that no code of ours could do without, nor faster
    least: Mapping[str, float] = MappingProxyType({})  # of some variants, in the unit of the case


class Case(NamedTuple):
    variants: dict[str, Variant]
    rows: list[Row]
    unit: str = 'ms'
    limit: Callable[[], Limit] | None = None  # asked for at the end
    measures: bool = False  # run() returns (value, result) by itself, of something that noise does not touch
    skipped: tuple[str, ...] = ()  # lines about what could not be compared
    facts: Mapping[str, dict] = MappingProxyType({})  # what else is told of a variant


class Mismatch(Exception):
    """Two variants do not come to the same."""


class Outcome(NamedTuple):
    row: Row
    precision: str
    ours: list[float]
    baseline: list[float]
    error: float

    @property
    def ratios(self) -> np.ndarray:
        return METRICS[self.row.metric][0](np.array(self.ours), np.array(self.baseline))

    @property
    def reached(self) -> bool:
        if self.row.goal is None:
            return True
        ratio, more_is_better = np.median(self.ratios), METRICS[self.row.metric][1]
        return bool(ratio >= self.row.goal if more_is_better else ratio <= self.row.goal)


def measure(case: Case, settings: Settings, rounds: int) -> list[Outcome]:
    """One outcome for every row whose precision this machine has, after all results were found to be equal."""
    variants = {name: v for name, v in case.variants.items() if available(v.precision, settings.device)}
    rows = [row for row in case.rows if row.variant in variants and row.baseline in variants]
    variants = {name: v for name, v in variants.items() if any(name in (row.variant, row.baseline) for row in rows)}
    if case.measures:
        with full_float32():
            kept = [{name: v.run() for name, v in variants.items()}]
        errors = differences(rows, kept[0])
    else:
        errors, kept = in_rounds(variants, rows, settings, rounds)
    samples = {name: [measured[name][0] for measured in kept] for name in variants}
    return [Outcome(row, variants[row.variant].precision, samples[row.variant], samples[row.baseline], error)
            for row, error in zip(rows, errors)]


def in_rounds(variants: dict[str, Variant], rows: list[Row], settings: Settings, rounds: int) -> tuple[list, list]:
    """The error of each row, and of each round what the variants took and came to."""
    order, steps = random.Random(0), dict.fromkeys(variants, 1)
    with ExitStack() as processes:
        ask = {name: processes.enter_context(ready(v, settings)) for name, v in variants.items()}

        def one_round():
            return {name: ask[name](steps[name]) for name in order.sample(list(variants), len(variants))}

        with full_float32():
            first = one_round()
        if settings.device.type == 'cuda' and not all(v.clock for v in variants.values()):
            torch.backends.cudnn.benchmark = True  # as the scripts have it
            one_round()
            for name, (ms, _) in one_round().items():
                steps[name] = round(min(max(CUDA_MS / max(ms, 1e-3), 1), CUDA_STEPS))
            one_round()  # in it, what is recorded as a graph is recorded
        errors = differences(rows, first)
        kept = [one_round() for _ in range(rounds)]
    torch.backends.cudnn.benchmark = False  # for a case's limit kernels are not worth a search
    return errors, kept


@contextmanager
def ready(variant: Variant, settings: Settings) -> Iterator[Callable[[int], tuple[float, dict]]]:
    """A function from a number of steps to the milliseconds that one takes, and what it comes to."""
    if settings.device.type == 'cuda':
        yield partial(answer, variant, settings.device)
        return
    fork = get_context('fork')
    here, there = fork.Pipe()
    process = fork.Process(target=serve, args=(variant, settings, here, there))
    process.start()
    there.close()

    def ask(steps: int):
        here.send(steps)
        return here.recv()
    try:
        yield ask
    finally:  # in the reverse order: those that were forked later hold this end, too
        here.close()
        process.join()


def serve(variant: Variant, settings: Settings, asked_from: Connection, pipe: Connection):
    asked_from.close()  # so that only the process that asks holds that end
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    torch.set_num_threads(settings.threads)
    if not variant.theirs:
        keep_memory()
    with suppress(EOFError):
        while True:
            pipe.send(answer(variant, settings.device, pipe.recv()))


def answer(variant: Variant, device: torch.device, steps: int) -> tuple[float, dict]:
    torch.manual_seed(0)
    ms, result = timed(variant.run, device, steps, variant.clock)
    return ms, {name: torch.as_tensor(value).detach().cpu().double().numpy() for name, value in result.items()}


def timed(run: Callable, device: torch.device, steps: int, clock=None) -> tuple[float, dict]:
    """Milliseconds per step, and the result of the first; by the clock of a host one step is enough."""
    if clock or device.type == 'cpu':
        clock = clock or spent
        start = clock()
        result = run()
        return 1e3 * (clock() - start), result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = run()
    for _ in range(steps - 1):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / steps, result


def in_its_own_process(module: str, *given) -> Callable[[], tuple[float, dict]]:
    """A function that runs a module's main(given as JSON) in a process of its own; it prints [value, loss] as JSON."""
    def run():
        command = [sys.executable, '-c', f'import sys; from {module} import main; main(sys.argv[1])', json.dumps(given)]
        answer = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        value, loss = json.loads(answer)
        return value, {'loss': loss}
    return run


def spent() -> float:
    """CPU seconds of this process, and of those it started that have ended."""
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + others.ru_utime + others.ru_stime


def differences(rows: list[Row], measured: dict[str, tuple]) -> list[float]:
    return [difference(row, measured[row.variant][1], measured[row.baseline][1]) for row in rows]


def difference(row: Row, ours: dict, baseline: dict) -> float:
    """The largest difference of what both return, in mean magnitudes of the baseline."""
    worst = 0.0
    for name in ours.keys() & baseline.keys():
        a, b = (np.asarray(result[name]) for result in (ours, baseline))
        error = float(np.abs(a - b).max() / max(np.abs(b).mean(), 1e-30))
        if not error <= row.tolerance:  # NaN is a mismatch, too
            raise Mismatch(f'{row.variant}: {name} differs from that of {row.baseline} by {error:.1e} of its mean '
                           f'magnitude, {row.tolerance:.0e} is allowed')
        worst = max(worst, error)
    return worst


def available(precision: str, device: torch.device) -> bool:
    """bfloat16 is slower than float32 where the processor has no instructions for it."""
    return precision != 'bf16' or has_bf16(device)


def products(run: Callable, variants: Mapping[str, Variant], device: torch.device) -> Limit:
    """What all of these have to multiply, told by one of them, at the rate of a large product.

    Most products of a network are smaller, or convolutions.
    """
    with flop_counter() as counter:
        run()
    work, n = counter.get_total_flops(), matmul_size(device)
    kinds = {name: 'tf32' if v.precision == 'fp32' and device.type == 'cuda' else v.precision
             for name, v in variants.items() if available(v.precision, device)}
    rates = {kind: matmul_rate(kind, device) for kind in sorted({*kinds.values()})}
    told = ', '.join(f'{rate / 1e6:.0f} in {kind}' for kind, rate in rates.items())
    return Limit(f'{work / 1e9:.3g} GFLOP of products, at the GFLOP/s of one of {n} x {n}, {told}',
                 {name: work / rates[kind] for name, kind in kinds.items()})


def matmul_rate(precision: str, device: torch.device) -> float:
    """FLOP per ms that a product of two square matrices reaches here, the best of a few."""
    n, steps = matmul_size(device), 20 if device.type == 'cuda' else 1
    a = torch.rand(n, n, device=device, dtype=torch.bfloat16 if precision == 'bf16' else torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == 'tf32'
    milliseconds = min(timed(lambda: a @ a, device, steps)[0] for _ in range(5))
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * n ** 3 / milliseconds


def matmul_size(device: torch.device) -> int:
    """Large enough to keep all of a GPU at work."""
    return 8192 if device.type == 'cuda' else 1024


def flop_counter() -> FlopCounterMode:
    """PyTorch's, but for the gradient of a convolution's weight: it takes no notice of groups there."""
    def backward(grad, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, wanted, **_):
        return 2 * prod(x if transposed else grad) * prod(weight[1:]) * sum(wanted[:2])
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: backward})


def copy_rate(device: torch.device) -> float:
    """Bytes per ms that a copy far larger than any cache reads and writes, the best of a few."""
    a = torch.zeros(2 ** 28 if device.type == 'cuda' else 2 ** 25, device=device)
    b = torch.ones_like(a)
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a), device, 20 if device.type == 'cuda' else 1)[0]
                              for _ in range(5))
