"""Launch modes, the only file that knows of them: one process, DataParallel, spawned processes, torchrun.

    python main_base.py DIR                                     one process; DataParallel where several GPUs are visible
    python main_base.py DIR --gpu 0                             that GPU alone
    python main_base.py DIR --seeds 0 1 2                       several runs in one process on one device (together.py)
    python main_base.py DIR --multiprocessing-distributed       one process per GPU (or --procs-per-node on CPUs);
                            --world-size NODES --rank NODE --dist-url tcp://HOST:PORT for several nodes
    torchrun [--nnodes ...] main_base.py DIR                    env://, elastic restarts

Ranks exchange small host-side numbers over gloo, so agreeing on something never waits for a GPU.
"""
import atexit
import inspect
import os
import signal
import socket
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from . import signals, together
from .errors import in_words, of_compiler, remove_torn
from .heap import keep_memory
from .streams import enduring

_nodes = 1
at_end = ExitStack()  # what has to be closed before a rank ends, however it ends


def launch(worker, args):
    """Run worker(args, device) in as many processes as the command line and the environment ask for."""
    if args.gpu is not None and args.gpu >= torch.cuda.device_count():
        sys.exit(f'error: --gpu {args.gpu} is asked for, but {torch.cuda.device_count()} GPUs are visible')
    ranks, nodes = planned(args)
    by_hand = under_torchrun(args) and not {'LOCAL_RANK', 'LOCAL_WORLD_SIZE'} <= os.environ.keys()
    if by_hand and ranks > 1:
        sys.exit('error: WORLD_SIZE is set, as by torchrun, but not LOCAL_RANK and LOCAL_WORLD_SIZE, the number of '
                 'this process on its node and of processes there: set them, too, or unset WORLD_SIZE and RANK')
    if args.inspect:  # one process looks at what the ranks would do
        if int(os.environ.get('RANK', args.rank)) <= 0:
            _run(worker, args)
    elif under_torchrun(args):
        _run(worker, args, rank=int(os.environ['RANK']), world=ranks, local=int(os.environ.get('LOCAL_RANK', 0)),
             url='env://', nodes=nodes)
    elif args.multiprocessing_distributed:
        _spawn(worker, args, ranks // nodes)
    elif args.world_size > 1:  # as in pytorch/examples: every process is started by hand
        _run(worker, args, rank=args.rank, world=ranks, local=args.gpu or 0, url=args.dist_url, nodes=nodes)
    else:
        _run(partial(together.train, partial(_one_of_several, worker)) if args.seeds else worker, args)


def under_torchrun(args) -> bool:
    """Whether torchrun, or what sets the same variables, has started this process as a rank."""
    return {'RANK', 'WORLD_SIZE'} <= os.environ.keys() and not args.multiprocessing_distributed


def planned(args) -> tuple[int, int]:
    """How many ranks on how many nodes."""
    if under_torchrun(args):
        ranks = int(os.environ['WORLD_SIZE'])
        return ranks, ranks // int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    nodes = max(args.world_size, 1)
    gpus = 0 if args.no_accel else torch.cuda.device_count()
    return nodes * ((args.procs_per_node or max(gpus, 1)) if args.multiprocessing_distributed else 1), nodes


def _spawn(worker, args, per_node):
    nodes, node = max(args.world_size, 1), max(args.rank, 0)
    url = args.dist_url or f'tcp://127.0.0.1:{_free_port()}'
    context = mp.spawn(_spawned, (worker, args, node, nodes, per_node, url), nprocs=per_node, join=False)

    def forward(number, frame):
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    for number in signals.SIGNALS:
        signal.signal(number, forward)
    atexit.register(signals.ignore)
    try:
        while not context.join(grace_period=5):
            pass
    except mp.ProcessExitedException as ended:  # the worker has said why
        sys.exit(ended.exit_code if ended.exit_code >= 0 else 128 - ended.exit_code)


def _spawned(local, worker, args, node, nodes, per_node, url):
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which forwards it: once, not twice
    _run(worker, args, rank=node * per_node + local, world=nodes * per_node, local=local, url=url, nodes=nodes)


def _free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _run(worker, args, rank=0, world=1, local=0, url=None, nodes=1):
    global _nodes
    _nodes = nodes
    cuda = torch.cuda.is_available() and not args.no_accel
    if not cuda:
        keep_memory()
    signals.listen()
    if cuda and url is not None and args.gpu is None and local >= torch.cuda.device_count():
        sys.exit(f'error: local rank {local} has no GPU: {torch.cuda.device_count()} are visible '
                 '(start fewer processes, or add --no-accel)')
    device = torch.device('cuda', local if args.gpu is None else args.gpu) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
    try:
        with in_lines(rank, args):
            if url is not None:
                _join(url, rank, world, device, args)
            with enduring(), at_end:
                worker(args, device)
    except SystemExit as stop:
        if isinstance(stop.code, str):  # print it here: mp.spawn and torchrun would lose it or bury it
            write_line(f'[rank {rank}] {stop.code}' if rank else stop.code, sys.stderr)
            stop.code = 1
        if stop.code in (0, None, signals.EXIT_INTERRUPTED) and dist.is_initialized():
            dist.destroy_process_group()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _one_of_several(worker, args, device):
    """Of the runs that share a process."""
    with in_lines(0, args):
        worker(args, device)


@contextmanager
def in_lines(rank: int, args):
    """Errors that have words end in a line of them, and in an exit code."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if args.compile and signals.caught() and of_compiler(error):  # it was sent to the compilers, too
            write_line('stopped by a signal while it compiled; the same command goes on', sys.stderr)
            if args.output and not (args.evaluate or args.inspect):
                with suppress(OSError):  # the marker that tells a scheduler to start it again
                    Path(args.output, 'interrupted').write_text(f'{{"signal": {signals.caught()}}}\n')
            sys.exit(signals.EXIT_INTERRUPTED)
        if not (said := remove_torn(error) or in_words(error, rank, args)):
            raise
        write_line(f'error: {said}', sys.stderr)
        sys.exit(1)
    except OSError as error:
        if not error.filename:
            raise
        write_line(f'error: {error.filename}: {error.strerror}', sys.stderr)
        sys.exit(1)


def _join(url, rank, world, device, args):
    backend = f'cpu:gloo,cuda:{args.dist_backend}' if device.type == 'cuda' else 'gloo'
    timeout = timedelta(seconds=args.dist_timeout)
    try:
        store, rank, world = next(dist.rendezvous(url, rank, world, timeout=timeout))
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and 'rendezvous' not in str(error):
            raise
        sys.exit(f'error: --dist-url {url} is no place to meet, such as tcp://HOST:PORT: {error}')
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        # torchrun's store outlives a restart, and so would the addresses of ranks that are gone.
        store = dist.PrefixStore(f'attempt {restarts()}', store)
    dist.init_process_group(backend, store=store, world_size=world, rank=rank, timeout=timeout,
                            device_id=device if device.type == 'cuda' else None)
    if sys.version_info < (3, 12):
        # There a loader process waits for ever if a thread of gloo held a lock of Python's when it was forked off, as
        # they do for a moment after an exchange.
        os.register_at_fork(before=partial(time.sleep, 0.02))


def restarts() -> int:
    """How often torchrun has started this run again."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def launched_by() -> str:
    """Which torchrun, on this machine, has started this process; nothing without one."""
    name = os.environ.get('TORCHELASTIC_RUN_ID')
    return f'{name} {os.getppid()}' if name else ''


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def nodes() -> int:
    """How many machines take part; a process started by hand counts as one."""
    return _nodes


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def agree(*numbers: int) -> list[int]:
    """The sums over ranks of some host-side numbers, the same on every rank."""
    return total(torch.tensor(numbers, dtype=torch.int64)).tolist() if world() > 1 else [*numbers]


def gather_rows(rows: torch.Tensor, counts: bool) -> torch.Tensor:
    """[n, ...] of every rank -> [N, ...] in the order of the global batch, of which ranks hold every world-th sample.

    For a loss over the relations of all samples, computed alike on every rank: the gradients of all ranks are summed,
    as each rank's loss is weighted with its share of the batch. counts: whether this rank's samples belong to it.
    """
    return _GatherRows.apply(rows, counts) if world() > 1 else rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, counts):
        mine = len(rows) if counts else 0
        sizes = agree(*(mine if r == rank() else 0 for r in range(world())))  # falling by at most one
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[:mine] = rows[:mine]
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        ctx.shape, ctx.mine = rows.shape, mine
        return torch.stack(parts, 1).flatten(0, 1)[:sum(sizes)]

    @staticmethod
    def backward(ctx, grad):
        grad = total(grad.clone(memory_format=torch.contiguous_format))  # others may hold the one that came in
        rows = grad.new_zeros(ctx.shape)
        rows[:ctx.mine] = grad[rank()::world()][:ctx.mine]
        return rows, None


def gather(value) -> list:
    """One picklable value of every rank, in rank order."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def write_line(text: str, file):
    """On a terminal, in place of a line that is being rewritten there (meters.Display)."""
    print('\033[K' * file.isatty() + text, file=file, flush=True)


def say(text: str):
    if is_main():
        write_line(text, sys.stdout)


def stop(message: str, code: int = 1):
    """End every rank with an error that all of them know: said once, by rank 0."""
    if is_main():
        write_line(f'error: {message}', sys.stderr)
    sys.exit(code)


def from_main(function):
    """Call function on rank 0 only and give its result to all; a SystemExit there ends every rank."""
    outcome = [None, None]
    if is_main():
        try:
            outcome[0] = function()
        except SystemExit as stop:
            outcome[1] = stop.code
    if world() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        sys.exit(outcome[1] if is_main() else 1)
    return outcome[0]


def sync_buffers(module):
    """Rank 0's BatchNorm statistics for everybody: what is evaluated and what is saved is one network."""
    if world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def wrap(task, device, args):
    """DDP around the whole task, DataParallel around its student alone, or the task as it is."""
    if args.sync_bn:
        if device.type != 'cuda' or not dist.is_initialized():
            stop('--sync-bn needs GPUs, and one process for each (torchrun or --multiprocessing-distributed)')
        if own := does_more(task):
            stop(f'--sync-bn would take away what {own} does beside normalising')
        task = torch.nn.SyncBatchNorm.convert_sync_batchnorm(task)
    if dist.is_initialized():
        new = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters  # from torch 2.15 on
        buffers = 'forward_sync_buffers' if new else 'broadcast_buffers'
        # No device_ids: with them DDP would copy the parts of a batch that stay on the host to the device, and wait.
        # No static_graph: DDP arranges its buckets by the first backward pass without it, too.
        return DistributedDataParallel(task, gradient_as_bucket_view=True, **{buffers: False})
    task.student = replicated(task.student, device, args)
    return task


def does_more(module) -> str:
    """The kind of a BatchNorm with a forward() of its own, such as timm's with an activation; empty if none has."""
    plain = (_BatchNorm.forward, torch.nn.SyncBatchNorm.forward)
    return next((type(m).__name__ for m in module.modules() if isinstance(m, _BatchNorm)
                 and type(m).forward not in plain), '')


def replicas(device, args) -> int:
    """GPUs of one process: several where it was started without a word and sees them."""
    alone = device.type == 'cuda' and args.gpu is None and not dist.is_initialized()
    return max(torch.cuda.device_count(), 1) if alone else 1


def replicated(network, device, args):
    """DataParallel over them, or the network as it is."""
    if replicas(device, args) == 1:
        return network
    if args.compile:  # a replica would run what was compiled for the first GPU
        sys.exit('error: --compile needs one process per GPU (torchrun, --multiprocessing-distributed), or --gpu N')
    return Replicas(network)


class Replicas(DataParallel):
    """On as many GPUs as there are images for, with the keywords as they are, in the precision of autocast.

    Left to itself, DataParallel calls replicas without images where there are keywords, and its threads know of
    autocast that it is on, not in which precision: that would be float16.
    """

    def scatter(self, inputs, kwargs, device_ids):
        inputs, _ = super().scatter(inputs, {}, device_ids)
        return inputs, [kwargs] * len(inputs)

    def parallel_apply(self, replicas, inputs, kwargs):
        dtype, enabled = torch.get_autocast_dtype('cuda'), torch.is_autocast_enabled('cuda')
        calls = [torch.autocast('cuda', dtype, enabled=enabled)(replica.__call__) for replica in replicas]
        return super().parallel_apply(calls, inputs, kwargs)


def accumulating(task, last: bool):
    """Gradients are exchanged in the last backward pass of a step only."""
    return nullcontext() if last or not isinstance(task, DistributedDataParallel) else task.no_sync()
