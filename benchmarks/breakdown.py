"""Where each millisecond of a training step of MGD goes, and how far every part is from what the device allows.

    python -m benchmarks.breakdown                                                 8 images on a CPU
    python -m benchmarks.breakdown --device cuda --batch 256 --amp bf16 --compile

Times are those of kernels, and on a CPU of ops, by torch.profiler. Bytes are counted op by op: each tensor that an op
(no view) takes or gives is read or written once, of one that is picked from only as much as is taken. FLOPs are those
of products. The bound of a part is the longer of what its bytes take at the rate of a large copy and its FLOPs at that
of a large product. Both counts are of the step without --compile: fused kernels may stay below such a bound. With it,
student and losses are one. What MGD adds is told by whole steps with and without it.
"""
import argparse
import json
from bisect import bisect
from collections import defaultdict
from contextlib import contextmanager
from math import prod
from pathlib import Path
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.heap import keep_memory
from utils.optim import make_optimizer
from utils.run import git_revision
from utils.setup import device_name, precision

from .harness import ROOT, Settings, copy_rate, flop_counter, matmul_rate, timed
from .mgd_step import our_task, sizes_for, training_step
from .run import command, versions

MARK = 'part: '


class Counter(TorchDispatchMode):
    """Ops that are no views, and the bytes they have to read and write at least."""

    def __init__(self):
        super().__init__()
        self.ops = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name, arguments = func.overloadpacket.__name__, func._schema.arguments
        view = name == '_unsafe_view' or any(a.alias_info and not a.alias_info.is_write for a in arguments)
        if func.namespace == 'aten' and not view and 'empty' not in name:
            read = [size_of(x) for x in tree_leaves((args, kwargs))]
            if name in ('index_select', 'gather', 'index'):
                read[0] = min(read[0], size_of(result))
            changed = [x for x, a in zip(args, arguments) if a.alias_info and a.name != 'grads']  # scaled, in fp16
            written = {id(x): size_of(x) for x in tree_leaves((result, changed))}
            self.ops += 1
            self.bytes += sum(read) + sum(written.values())
        return result


def size_of(x) -> int:
    """Bytes; what is expanded is there once."""
    if not isinstance(x, torch.Tensor):
        return 0
    return x.element_size() * prod(size for size, stride in zip(x.shape, x.stride()) if stride)


def marked_step(task, batch, args, begin, apart: bool):
    """mgd_step.training_step, which tells where its parts begin; student and losses are two if apart.

    A backward pass goes from the newest node to the oldest: it is through with the losses when the gradient of the
    logits, which are the student's last op, is complete.
    """
    optimizer = make_optimizer(task, args)
    names = {'teacher': 'teacher'} | ({'student': 'student', 'losses': 'losses'} if apart else
                                      dict.fromkeys(('student', 'losses'), 'student and losses'))

    @contextmanager
    def around(network):
        marks = not torch.compiler.is_compiling()
        if marks:
            begin(f'{names[network]}, forward')
        yield
        if marks:
            begin(f'{names["losses"]}, forward')

    def run():
        with patch('distillers.base.timed', around), precision(batch.images.device, args.amp):
            logits, losses = task(batch)
        logits.register_hook(lambda grad: begin(f'{names["student"]}, backward'))
        begin(f'{names["losses"]}, backward')
        sum(losses.values()).backward()
        begin('optimizer')
        optimizer.step()
        optimizer.zero_grad()
        begin('between steps')
    return run


def counted(task, batch, args, apart: bool) -> dict[str, list[int]]:
    """Of each part, in their order: ops, bytes, FLOPs."""
    parts, before = {}, []

    def begin(part):
        now = [counter.ops, counter.bytes, flops.get_total_flops()]
        for last, found in before:
            parts[last] = [sum(x) - y for *x, y in zip(parts.get(last, (0, 0, 0)), now, found)]
        before[:] = [(part, now)]

    run = marked_step(task, batch, args, begin, apart)
    with flop_counter() as flops, Counter() as counter:
        run()
    return parts


def profiled(task, batch, args, apart: bool, steps: int) -> tuple[dict, dict]:
    """Of each part, and of each kernel by name: milliseconds and number in a step."""
    on_cuda = batch.images.is_cuda

    def begin(part):
        if on_cuda:  # what was launched has ended before, what comes is launched after
            torch.cuda.synchronize()
        with record_function(MARK + part):
            pass

    run = marked_step(task, batch, args, begin, apart)
    for _ in range(3):
        run()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda) as session:
        for _ in range(steps):
            run()
    events = session.events()
    marks = sorted((event.time_range.start, event.name.removeprefix(MARK)) for event in events
                   if event.name.startswith(MARK))
    parts, kernels = (defaultdict(lambda: {'ms': 0.0, 'number': 0.0}) for _ in range(2))
    for event in events:
        if on_cuda and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue  # an annotation spans kernels that are there themselves
        spent = event.time_range.elapsed_us() if on_cuda else event.self_cpu_time_total
        part = marks[max(bisect(marks, (event.time_range.start, '~')) - 1, 0)][1]
        for found in (parts[part], kernels[event.name]):
            found['ms'] += spent / 1e3 / steps
            found['number'] += 1 / steps
    return parts, kernels


def steady(run, device, steps: int) -> float:
    """Milliseconds, when all is compiled and chosen: what was profiled is compiled anew, without its marks."""
    for _ in range(3):
        run()
    return timed(run, device, steps)[0]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', metavar='D', help='cpu or cuda')
    parser.add_argument('--student', default='mobilenet_v1', metavar='ARCH')
    parser.add_argument('--teacher', default='resnet50', metavar='ARCH')
    parser.add_argument('--batch', type=int, metavar='N', help='images (8, on a GPU 128)')
    parser.add_argument('--size', type=int, default=224, metavar='PIXELS')
    parser.add_argument('--amp', choices=('off', 'bf16'), default='off')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--output', type=Path, default=ROOT / 'runs' / 'breakdown', metavar='DIR',
                        help='folder for breakdown.json')
    args = parser.parse_args(arguments)
    settings, device = Settings(torch.device(args.device), images=args.batch), torch.device(args.device)
    on_cuda = device.type == 'cuda'
    torch.set_num_threads(settings.threads)
    if not on_cuda:
        keep_memory()
    sizes = sizes_for(settings, {'teacher': args.teacher, 'student': args.student, 'size': args.size})
    how, steps = {'channels_last': True, 'amp': args.amp, 'fold': True}, 20 if on_cuda else 3
    kind = 'bf16' if args.amp == 'bf16' else 'tf32' if on_cuda else 'fp32'
    bytes_per_ms, flops_per_ms = copy_rate(device), matmul_rate(kind, device)

    counts = counted(*our_task(settings, sizes, **how), not args.compile)
    made = our_task(settings, sizes, **how, compile=args.compile)
    without_mgd = our_task(settings, sizes, **how, compile=args.compile, distil=False)
    torch.backends.cudnn.benchmark = True  # as the scripts have it; to search takes long, so not for what went before
    spent, kernels = profiled(*made, not args.compile, steps)
    step, without = (steady(training_step(*task), device, steps) for task in (made, without_mgd))

    total, rows = sum(spent[part]['ms'] for part in counts), []
    for part, (ops, moved, flops) in counts.items():
        ms, by_bytes, by_flops = spent[part]['ms'], moved / bytes_per_ms, flops / flops_per_ms
        rows.append({'part': part, 'ms': ms, 'share': ms / total, 'ops': ops,
                     **({'kernels': spent[part]['number']} if on_cuda else {}), 'MB': moved / 1e6,
                     'GFLOP': flops / 1e9, 'ms by bytes': by_bytes, 'ms by FLOP': by_flops,
                     'over bound': ms / max(by_bytes, by_flops)})
    dearest = sorted(kernels.items(), key=lambda kernel: -kernel[1]['ms'])[:10]
    record = {'command': command(), 'git': git_revision(), 'device': device_name(settings.device),
              'versions': versions(), **sizes, **how, 'compile': args.compile,
              'copy, GB/s': bytes_per_ms / 1e6, f'product in {kind}, TFLOP/s': flops_per_ms / 1e9,
              'a step, ms': step, 'images/s': 1e3 * sizes['batch'] / step, 'without MGD, ms': without,
              'MGD adds': step / without - 1, 'its parts, ms': total}
    print(*(f'{key}: {value:.4g}' if isinstance(value, float) else f'{key}: {value}' for key, value in record.items()),
          '', f'{"part":<30}' + ''.join(f'{key:>12}' for key in list(rows[0])[1:]), sep='\n')
    for row in rows:
        print(f'{row["part"]:<30}' + ''.join(f'{value:12.4g}' for value in list(row.values())[1:]))
    print('', *(f'{found["ms"]:10.3f} ms {found["number"]:6.0f} x  {name[:96]}' for name, found in dearest), sep='\n')
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / 'breakdown.json').write_text(json.dumps(record | {'parts': rows, 'kernels': dearest}, indent=1))


if __name__ == '__main__':
    main()
