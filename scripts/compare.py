"""Which method for my data? Train one student in several ways with the same budget and seeds, and report.

    python scripts/compare.py DIR --methods alone kd mgd mgd+kd --seeds 0 1 2 --jobs 2 --output runs/compare \\
        --flags kd '--kd-temperature 2' -- --arch mobilenet_v1 --teacher-resume T.pth --epochs 30

What stands behind -- goes to every run; `alone` is the student without a teacher, + joins methods. The same command
goes on with what is missing. Ctrl-C lets the runs save; the exit code then is 75, as theirs. A method that fails (1)
leaves the others alone. The folder of runs also gets report.html, which shows how they stand while they train.
"""
import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import report
from logs import read_json
from ways import collect, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distillers import DISTILLERS, reads_outputs
from main_distill import make_parser
from utils import folder
from utils.args import SWITCH, base_parser
from utils.signals import EXIT_INTERRUPTED as INTERRUPTED
from utils.streams import enduring

ROOT = Path(__file__).resolve().parent.parent
STOPPED = (INTERRUPTED, -signal.SIGTERM)  # the latter before it could heed one
EVERY = 30  # seconds between two reports
OURS = ('--seed', '--seeds', '--output', '--distiller', '--mgd-with-kd', '--evaluate', '-e', '--inspect')


def spelt_out(flags: list[str]) -> list[str]:
    """With the words of each @file in its place, and MGD's --use-pretrained 1 in the words of main_base.py."""
    parser, words = base_parser(''), []
    for word in flags:
        try:
            lines = Path(word[1:]).read_text().splitlines() if word.startswith('@') else None
        except (OSError, ValueError) as error:
            parser.error(f'{word}: {error}')
        words += [word] if lines is None else [w for line in lines for w in parser.convert_arg_line_to_args(line)]
    mgd = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    mgd.add_argument('--use-pretrained', **SWITCH)
    given, others = mgd.parse_known_args(words)
    return others + ['--pretrained'] * bool(given.use_pretrained)


def of_student(flags: list[str]) -> list[str]:
    """The flags that a student without a teacher has, too."""
    known = [option for action in base_parser('')._actions for option in action.option_strings
             if not option.startswith('--teacher')]
    kept, keep = [], True
    for word in flags:
        if word.startswith('-') and not word.lstrip('-')[:1].isdigit():  # a flag, no negative number
            name = word.partition('=')[0]
            keep = not name.startswith('--') or any(option.startswith(name) for option in known)
        kept += [word] * keep
    return kept


def command(method: str, seed: int, out: Path, args, flags: list[str]) -> list[str]:
    data = [args.data] if args.data else []
    own = spelt_out([word for name, words in args.flags if name == method for word in shlex.split(words)])
    if method == 'alone':
        return ['main_base.py', *data, *of_student(flags), *own, '--seed', str(seed), '--output', str(out)]
    names = method.split('+')
    cache = []
    if args.share_teacher and all(reads_outputs(DISTILLERS[name]) for name in names):
        cache = ['--cache-teacher', 'lazy', '--cache-dir', str(args.output / 'teacher-cache')]
    return ['main_distill.py', *data, *flags, *cache, '--seed', str(seed), '--distiller', *names, *own,
            '--output', str(out)]


def named(gpu: str) -> str:
    """By its number among those that can be seen, as the scripts count."""
    seen = dict(enumerate(filter(None, os.environ.get('CUDA_VISIBLE_DEVICES', '').split(','))))
    return seen.get(int(gpu), gpu) if gpu.isdigit() else gpu


class Job:
    """A run to come, under way or over."""

    def __init__(self, method, seed, args, flags):
        self.method, self.folder = method, args.output / f'{method}-{seed}'
        self.command, self.process, self.state = command(method, seed, self.folder, args, flags), None, 'waits'
        result = read_json(self.folder / 'result.json') or {}
        made = shlex.split(result.get('command', ''))  # by another command: the run itself tells what differs
        self.by_another_command = bool(made) and [Path(word).name for word in made[:1]] + made[1:] != self.command
        if result.get('finished') and not self.by_another_command:
            self.state = 'finished before'

    def start(self, environment) -> bool:
        script, *words = self.command
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / 'out.txt', 'a') as out:  # a session of its own: Ctrl-C is ours to pass on, once
                self.process = subprocess.Popen([sys.executable, str(ROOT / script), *words], stdout=out,
                                                stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        except OSError as error:
            self.state = f'failed: cannot write to {error.filename}: {error.strerror}'
        else:
            self.state = 'starts'
        return self.process is not None

    def look(self):
        """Whether it still goes on; its state is its last line."""
        code = self.process.poll()
        self.state = (self.said(1) or ['starts'])[-1] if code in (None, 0) else (
            'stopped, the same command goes on' if code in STOPPED else f'failed with exit code {code}')
        return code is None

    def said(self, n):
        try:
            with open(self.folder / 'out.txt', 'rb') as out:
                out.seek(max(out.seek(0, os.SEEK_END) - 4096, 0))
                text = out.read()
        except FileNotFoundError:  # removed by somebody, to have the run made anew
            return []
        return [line for line in text.decode(errors='replace').splitlines() if line.strip()][-n:]


class View:
    """A line per run, rewritten on a terminal; elsewhere a line when something begins or ends."""

    def __init__(self, jobs):
        self.jobs, self.live, self.lines = jobs, sys.stdout.isatty(), 0

    def tell(self, job):
        if not self.live:
            print(f'{job.folder.name}: {job.state.split(";")[0]}', flush=True)

    def show(self):
        if not self.live:
            return
        width, height = shutil.get_terminal_size()
        rows = self.jobs if len(self.jobs) < height else [job for job in self.jobs if job.process][1 - height:]
        label = max(len(job.folder.name) for job in self.jobs)
        text = ''.join(f'\033[K{f"{job.folder.name:{label}}  {job.state}"[:width - 1]}\n' for job in rows)
        print((f'\033[{self.lines}A' if self.lines else '') + text + '\033[J', end='', flush=True)
        self.lines = len(rows)


def train(jobs, count, gpus) -> int:
    """All that is missing, so many at a time; the exit code."""
    view, caught, shown = View(jobs), [], 0.0
    running: dict[int, Job] = {}  # by slot

    def forward(number, frame):
        caught.append(number)
        for job in running.values():
            if job.process.poll() is None:
                job.process.send_signal(signal.SIGTERM)

    heeded = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP
    before = {number: signal.signal(number, forward) for number in heeded}
    waiting, failed = [job for job in jobs if job.state == 'waits'], set()
    for job in jobs:
        if job not in waiting:
            view.tell(job)
    while running or (waiting and not caught):
        for slot in range(count):
            if waiting and slot not in running and not caught:
                job = waiting.pop(0)
                threads = {'OMP_NUM_THREADS': str(max((os.cpu_count() or 1) // count, 1))}
                gpu = {'CUDA_VISIBLE_DEVICES': named(gpus[slot % len(gpus)])} if gpus else {}
                if job.start(threads | os.environ | gpu):
                    running[slot] = job
                    if caught:  # meanwhile
                        job.process.send_signal(signal.SIGTERM)
                else:
                    failed.add(job.method)
                view.tell(job)
        for slot, job in list(running.items()):
            if job.look():
                continue
            del running[slot]
            view.tell(job)
            if job.process.returncode not in (0, *STOPPED):
                failed.add(job.method)
                for other in [other for other in waiting if other.method == job.method]:
                    other.state = f'left out, as {job.folder.name} failed'
                    waiting.remove(other)
                    view.tell(other)
        view.show()
        if time.monotonic() - shown > EVERY:
            write_report(jobs)
            shown = time.monotonic()
        time.sleep(0.2)
    for number, handler in before.items():
        signal.signal(number, handler)
    for job in jobs:
        if job.process and job.process.returncode not in (0, *STOPPED):
            print(f'{job.folder.name} failed; the end of {job.folder / "out.txt"}:', *job.said(8), sep='\n',
                  file=sys.stderr)
    stopped = caught or any(job.process and job.process.returncode in STOPPED for job in jobs)
    return INTERRUPTED if stopped else int(bool(failed))


def write_report(jobs):
    # What a folder holds of an earlier command, which this one has not come to be, tells nothing of this one's flags.
    folders = [job.folder for job in jobs if job.folder.is_dir()
               and not (job.by_another_command and job.state.startswith(('failed', 'left out')))]
    try:
        ways, teacher = collect(folders, [])
        report.write(ways, teacher, jobs[0].folder.parent / 'report.html')
        return ways, teacher
    except SystemExit:  # has said why
        return None
    except OSError as error:
        print(f'the report cannot be written: {error}', file=sys.stderr)
        return None


def main():
    words = sys.argv[1:]
    at = words.index('--') if '--' in words else len(words)
    words, flags = words[:at], spelt_out(words[at + 1:])
    for i in (i + 2 for i, word in enumerate(words[:-2]) if word == '--flags'):
        words[i] = f' {words[i]}'  # a word with a space is no flag of ours to argparse
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', metavar='DIR', nargs='?', help='as of main_distill.py')
    parser.add_argument('--methods', nargs='+', required=True, metavar='NAME', help='alone, or of --list-distillers')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='N', help='(0 1 2)')
    parser.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at a time (1)')
    parser.add_argument('--gpus', nargs='+', metavar='N',
                        help='give each job one of these, in turn; counted from 0 among CUDA_VISIBLE_DEVICES')
    parser.add_argument('--output', type=Path, required=True, metavar='DIR', help='gets a folder per run: METHOD-SEED')
    parser.add_argument('--flags', nargs=2, action='append', default=[], metavar=('NAME', 'FLAGS'),
                        help="of one of the methods, as one word: --flags kd '--kd-weight 2'")
    parser.add_argument('--share-teacher', action='store_true', help="CIFAR: methods that read the teacher's logits or "
                        'pooled features alone share them in files (--cache-teacher lazy)')
    args = parser.parse_args(words)
    for name in {part for method in args.methods if method != 'alone' for part in method.split('+')}:
        if name not in DISTILLERS:
            parser.error(f'{name} is no method; python main_distill.py --list-distillers names them')
    for name, words in args.flags:
        if name not in args.methods:
            parser.error(f'--flags {name}: not among --methods')
        try:
            shlex.split(words)
        except ValueError as error:
            parser.error(f'--flags {name} {words}: {error}')
    given = flags + spelt_out([word for _, words in args.flags for word in shlex.split(words)])
    if taken := [word for word in given if word.partition('=')[0] in OURS]:
        parser.error(f'{taken[0]} is for compare.py to give')
    if unknown := [word for word in make_parser().parse_known_args(given)[1] if word.startswith('-')]:
        parser.error(f'{unknown[0]} is no flag of main_distill.py')
    if args.jobs < 1 or len({*args.seeds}) < len(args.seeds) or len({*args.methods}) < len(args.methods):
        parser.error('--jobs has to be above 0, and no seed or method there twice')

    folder.make(args.output)
    jobs = [Job(method, seed, args, flags) for seed in args.seeds for method in args.methods]
    code = train(jobs, args.jobs, args.gpus)
    if written := write_report(jobs):
        ways, teacher = written
        print('\n' + table(teacher + ways))
        print(f'\nreport: {args.output / "report.html"}')
        if find_spec('matplotlib'):
            try:
                report.draw(ways, teacher).savefig(args.output / 'curves.png', dpi=150)
                print(f'curves: {args.output / "curves.png"}')
            except OSError as error:
                print(f'the curves cannot be drawn: {error}', file=sys.stderr)
    if code == INTERRUPTED:
        print('stopped by a signal; the same command goes on', file=sys.stderr)
    sys.exit(code)


if __name__ == '__main__':
    with enduring():
        main()
