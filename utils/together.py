"""Runs side by side: with --seeds, one for each seed, in one process and on one device.

A run is a thread that goes through the whole script as if it were alone. One works at a time; the others wait where
the loops of engine.py hand over. There a run needs nothing of what a process has only once: each update seeds the
generators anew, an evaluation draws nothing, and what runs share is in the state that all expect. So each gives the
bits that it gives alone. (In a cache that is filled lazily a run also finds what the teacher made of another run's
batches: the same bits on a CPU, on a GPU perhaps rounded otherwise.) On a GPU each has a stream of its own, so that
their kernels run at the same time: those of one small network leave most of the device idle.
"""
import argparse
import io
import sys
import threading
import traceback
from collections import deque
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from . import signals

_turns = deque()  # a semaphore of each run that has not ended; it opens when the run may work, which then is the first
_things = {}


def hand_over():
    """Let each of the other runs work for a while."""
    if len(_turns) > 1:
        own = _turns[0]
        _turns.rotate(-1)
        _turns[0].release()
        own.acquire()


def shared(key, make):
    """What make() gives: of the runs that ask by the same key the first one makes it, and all get it."""
    if not _turns:
        return make()
    if key not in _things:
        _things[key] = make()
        if torch.cuda.is_initialized():  # for the others' streams it has to be there
            torch.cuda.synchronize()
    return _things[key]


def train(worker, args, device):
    """Call worker for each of --seeds. One that fails leaves the others alone, and its exit code for the end."""
    codes = {}

    def run(seed, turn, stream):
        turn.acquire()
        try:
            if stream:  # each thread has a current device, and a current stream
                torch.cuda.set_device(device)
            with torch.cuda.stream(stream):
                worker(alone(args, seed, device), device)
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr, flush=True)
            codes[seed] = 1 if isinstance(stop.code, str) else stop.code
        except Exception:
            traceback.print_exc()
            codes[seed] = 1
        finally:
            _turns.popleft()
            if _turns:
                _turns[0].release()

    _turns.extend(threading.Semaphore(0) for _ in args.seeds)
    streams = [torch.cuda.Stream(device) if device.type == 'cuda' else None for _ in args.seeds]
    threads = [threading.Thread(target=run, args=work, name=f'seed {work[0]}')
               for work in zip(args.seeds, _turns, streams)]
    with redirect_stdout(Labelled(sys.stdout)), redirect_stderr(Labelled(sys.stderr)):
        for thread in threads:
            thread.start()
        _turns[0].release()
        for thread in threads:
            thread.join()
    _things.clear()
    if failed := {seed: code for seed, code in codes.items() if code not in (0, None, signals.EXIT_INTERRUPTED)}:
        print('error: ' + ', '.join(f'seed {seed} ended with exit code {code}' for seed, code in failed.items()),
              file=sys.stderr)
    if signals.EXIT_INTERRUPTED in codes.values():  # some have to go on
        sys.exit(signals.EXIT_INTERRUPTED)
    if failed:
        sys.exit(next(iter(failed.values())))


def alone(args, seed: int, device: torch.device) -> argparse.Namespace:
    """The arguments of one of the runs, by which it can be started alone as well."""
    return argparse.Namespace(**vars(args) | {'seeds': None, 'seed': seed, 'gpu': device.index,
                                              'output': f'{Path(args.output)}-{seed}'})


class Labelled(io.TextIOBase):
    """A stream, no terminal, whose lines begin with the name of the thread that prints them."""

    def __init__(self, stream):
        self.stream, self.inside = stream, False

    def write(self, text):
        for line in text.splitlines(keepends=True):
            label = '' if self.inside or line == '\n' else f'{threading.current_thread().name} | '
            self.stream.write(label + line)
            self.inside = not line.endswith('\n')
        return len(text)

    def flush(self):
        self.stream.flush()
