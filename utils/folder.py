"""The folder of a run: which one it is, whether this run may write there, and what of it stays. For rank 0."""
import errno
import fcntl
import json
import sys
import time
from contextlib import suppress
from io import TextIOBase
from pathlib import Path

from . import checkpoint, distributed
from .args import completed

FILES = ['args.json', 'log.jsonl', 'result.json', 'checkpoint.pth', 'checkpoint.pth.new', 'checkpoint.previous.pth',
         'best.pth', 'last.pth', 'teacher.pth', 'predictions.npz', 'start.json', 'start.npz', 'evaluate.json',
         'evaluate.npz', 'interrupted', 'nonfinite.json', 'events.out.*']
TORN = [f'{name}.tmp' for name in FILES]  # of a process that was killed while it wrote


def default_output(args) -> Path:
    """runs/SCRIPT-DATA-NETWORK-METHODS-TIME; one that torchrun restarts finds what it had, by the word of its lock."""
    data = 'dummy' if args.dummy else args.dataset if args.dataset != 'imagefolder' else Path(args.data).resolve().name
    what = [Path(sys.argv[0]).stem.removeprefix('main_'), data, args.arch, *getattr(args, 'distiller', [])]
    stem = '-'.join(what) + '-'
    if distributed.restarts():
        for lock in sorted(Path('runs').glob(f'{stem}[0-9]*/.lock'), reverse=True):
            if lock.read_text() == distributed.launched_by():
                return lock.parent
    folder = new = Path('runs') / (stem + time.strftime('%Y%m%d-%H%M%S'))
    number = 1
    while new.exists():  # of a run that began in the same second
        number += 1
        new = folder.with_name(f'{folder.name}-{number}')
    return new


def stamps(folder: Path) -> list:
    """What tells the checkpoints that are there from those of a moment later."""
    files = checkpoint.places(folder / 'checkpoint.pth')
    found = [file.stat() if file.exists() else None for file in files]
    return [stat and (stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in found]


def refuse_harm(folder: Path, args):
    """End where the run would write over what it starts from."""
    folder = folder.resolve()
    for flag in ('teacher_resume', 'student_resume'):
        file = getattr(args, flag) and Path(getattr(args, flag)).resolve()
        if file and file.parent == folder and any(map(file.match, FILES)):
            sys.exit(f'error: --{flag.replace("_", "-")} {file} lies in --output, where this run would write over it: '
                     'choose another --output')


def refuse_class(folder: Path, args):
    """End where the run would write among the images."""
    folder = folder.resolve()
    if args.data and args.dataset == 'imagefolder':
        for split in ('train', 'valid', 'val'):
            if (Path(args.data) / split).resolve() in (folder, *folder.parents):
                sys.exit(f'error: --output {folder} lies among the images, where it would be a class')


def make(folder: Path):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f'error: cannot write to --output {folder}: {error.strerror}')


def lock(folder: Path) -> TextIOBase:
    """A file that keeps other processes out as long as it is open, and says who has it; workers do not inherit it."""
    try:
        file = open(folder / '.lock', 'a')  # noqa: SIM115
        take(file, folder)
        file.truncate(0)
        file.write(distributed.launched_by())
        file.flush()
    except OSError as error:
        sys.exit(f'error: cannot write to --output {folder}: {error.strerror}')
    return file


def take(file: TextIOBase, folder: Path):
    """Lock it, or end where another process has it; some network file systems have no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f'error: another run is writing to {folder}')
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def clear(folder: Path, found: list, anew: bool, epoch: int):
    """Leave what lies before the epoch that the run goes on with. found: the stamps of when it looked for one."""
    if stamps(folder) != found:
        sys.exit(f'error: another run has written to {folder} since this one looked: start again')
    log = folder / 'log.jsonl'
    told = [] if anew or not log.exists() else log.read_text(errors='replace').splitlines(keepends=True)
    if len(told) > 1 and not any(found):  # one line may be there before the first checkpoint is
        sys.exit(f'error: {folder} holds a run whose checkpoint.pth is gone; choose another --output, or --overwrite '
                 'to start anew')
    if not (anew or told or any(found)) and (weights := [*folder.glob('best.pth'), *folder.glob('last.pth')]):
        sys.exit(f'error: {weights[0]} would be written over; choose another --output, or --overwrite')
    for file in (file for pattern in [*TORN, *(FILES if anew else ['interrupted'])] for file in folder.glob(pattern)):
        file.unlink()
    if told:
        kept = [line for line in told if line.endswith('\n') and epoch_of(line) < epoch]
        checkpoint.write(log, ''.join(kept).encode())


def arguments_beside(weights: str | Path | None) -> dict | None:
    """Those of the run in whose folder a file of weights lies, if it is one."""
    try:
        return completed(json.loads(Path(weights).with_name('args.json').read_text())) if weights else None
    except (OSError, ValueError, TypeError):
        return None


def bring_best(source: Path, target: Path, best: dict) -> dict | None:
    """Bring the weights of the best epoch from the folder of the run that this one goes on from; None if they are gone.

    Better ones of a later epoch have taken their place where the run was killed before its checkpoint told of these.
    They are known by their hash. Older runs have none: there result.json, which is written after best.pth, tells whose
    weights these are.
    """
    weights, told = source / 'best.pth', source / 'result.json'
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if 'weights' in best:
            there = checkpoint.fingerprint(checkpoint.read(weights)) == best['weights']
        else:
            of_same_epoch = json.loads(told.read_text())['best'] == best
            there = of_same_epoch and weights.stat().st_mtime <= told.stat().st_mtime
        if there and source.resolve() != target.resolve():
            checkpoint.write(target / 'best.pth', weights.read_bytes())
        if there:
            return best
    print(f'note: {source} does not hold the weights of epoch {best["epoch"]}, the best so far: best.pth will be that '
          'of a later one', file=sys.stderr)
    return None


def epoch_of(line: str) -> float:
    """Of a record; infinity, which is no epoch of a run, where the line is none."""
    try:
        return float(json.loads(line)['epoch'])
    except (ValueError, KeyError, TypeError):
        return float('inf')
