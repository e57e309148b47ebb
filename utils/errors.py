"""Errors of the device, of loaders, of compilers and of other ranks, in words for the user."""
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from models.errors import Unfit, line


@contextmanager
def one_line(what: str = ''):
    """A ValueError inside, which is in words for the user, ends the run in one line. what: said before them."""
    try:
        yield
    except ValueError as error:
        sys.exit(f'error: {what}{error}')


def in_words(error: Exception, rank: int, args) -> str:
    """An error of the device or of another rank, for the user; nothing of one whose traceback is needed."""
    text = line(error)
    if isinstance(error, Unfit):  # in DataParallel it has become the last line of a replica's
        return str(error).splitlines()[-1].rpartition('Unfit: ')[2]
    if isinstance(error, torch.OutOfMemoryError):
        return (f'rank {rank}: {". ".join(text.split(". ")[:2])}: take a smaller -b (with --accum-steps, if the global '
                'batch is to stay), or --amp bf16; --inspect measures beforehand')
    if 'not one image can be read' in str(error):  # told by a loader process, it is the last line
        return str(error).splitlines()[-1].removeprefix('RuntimeError: ')
    if 'shared memory(shm)' in str(error):
        return ('/dev/shm, where loader processes put their batches, is too small: more of it (in docker --shm-size or '
                '--ipc=host), or fewer of them by -j')
    if 'DefaultCPUAllocator' in text:
        return f'rank {rank}: not enough memory: {text.rpartition("memory: ")[2]}'
    if text.startswith('DataLoader timed out'):
        return (f'no images have come from the loader processes for {args.dist_timeout:g} seconds (--dist-timeout): '
                'one hangs, or the storage does. The same command goes on from the last checkpoint')
    if text.startswith('DataLoader worker'):
        return f'a loader process is gone, as for want of memory (fewer by -j?): {text}. The same command goes on'
    if text.startswith('Expected more than 1 value per channel'):
        return 'a BatchNorm has 1 image to take statistics from, as of the last batch of an epoch: take another -b'
    if 'Expected to have finished reduction' in text:
        return ("over several ranks each of the student's parameters has to be in a loss, and some are in none: freeze "
                'them where the network is made, by requires_grad_(False)')
    if 'have a deterministic implementation' in text:
        return f'--deterministic: {text.partition(",")[0]}'
    words = ('gloo', 'Application timeout', 'Connection', 'client socket', 'NCCL')
    if isinstance(error, RuntimeError) and any(word in str(error) for word in words):
        cause = ' '.join(str(error).partition('Last error:')[2].split())  # NCCL's
        return (f'rank {rank} waits no longer for the others: one hangs (--dist-timeout is {args.dist_timeout:g} '
                f'seconds), was killed, or has told its own error. {text}' + f': {cause}' * bool(cause)
                + '. Nodes meet by the interface that GLOO_SOCKET_IFNAME names' * ('connectFullMesh' in str(error)))
    return ''


def of_compiler(error: Exception) -> bool:
    """By name: where nothing is compiled, nobody has to import torch's compiler."""
    return type(error).__name__ in ('InductorError', 'BackendCompilerFailed')


def remove_torn(error: Exception) -> str:
    """Take away the library that a compiler which was killed has left in its cache, if that is it; and say so."""
    torn = re.search(r'(/\S+): file too short', str(error)) if of_compiler(error) else None
    if not torn:
        return ''
    Path(torn[1]).unlink(missing_ok=True)
    return f'--compile: {torn[1]} was left in pieces when a run was killed. It is removed: give the command again'
