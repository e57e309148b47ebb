"""Ways to train: runs that differ in their seed alone, as their folders tell of them, and what they come to."""
import os
import re
import sys
import time
import zipfile
import zlib
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from logs import read_json, records, refuse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.args import NEUTRAL, completed

# arguments that runs of one way may differ in
FREE = (NEUTRAL | {'seed', 'seeds'}) - {'teacher_resume', 'student_resume'}
DATA = ('dataset', 'data', 'dummy', 'dummy_images')
SEED_OR_TIME = r'(-\d{8}-\d{6})?(-\d+)?$'  # the end of a name, in which runs of one way differ
COLUMNS = ('', 'network', 'top-1, last epoch', 'runs', 'top-1, best epoch', 'seconds per run')


class Run:
    """A run's folder, with None and [] for what is not there."""

    def __init__(self, folder):
        self.folder, self.name = folder, folder.resolve().name
        result = read_json(folder / 'result.json') or {}
        self.result = result if 'arguments' in result else {}
        known = self.result.get('arguments') or read_json(folder / 'args.json')
        self.arguments = completed(known) if known else {}
        self.seed = self.result.get('seed', self.arguments.get('seed'))
        self.finished = bool(self.result.get('finished'))
        self.stopped = (folder / 'interrupted').exists()
        log = folder / 'log.jsonl'
        self.records = records(lines_of(log))[0]
        self.written = time.strftime('%H:%M, %b %d', time.localtime(log.stat().st_mtime)) if self.records else ''
        self.validated = next((r['valid']['n'] for r in self.records if r.get('valid')), None)  # to validate with
        self.contents = self.result.get('images')  # a hash of all
        self.predictions, self.start = (read_npz(folder / f'{name}.npz') for name in ('predictions', 'start'))
        self.guesses = [told for told in (self.predictions, self.start) if told]

    def score(self, which):
        score = self.result.get(which) or {}
        return 100 * score['correct1'] / score['n'] if score.get('n') else None

    def state(self):
        if self.finished:
            return 'finished'
        a = self.arguments
        if not a:
            return 'nothing recorded yet'
        total = a.get('epochs', 0) + (a.get('warmup_epochs', 0) if a.get('warmup') else 0)
        done = self.records[-1]['epoch'] + 1 if self.records else 0
        # Whether it still runs no file tells: it may have been killed.
        return (f'{"stopped" if self.stopped else "not finished"}, {done} of {total} epochs'
                + (f', the last at {self.written}' if done else ''))

    def curve(self, *keys):
        """[(epoch, value)] of a number deep in the records, where it is there."""
        points = []
        for record in self.records:
            value = record
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, (int, float)):
                points.append((record['epoch'], value))
        return points


class Way:
    """Runs that differ in the seed."""

    def __init__(self, name, runs):
        self.name, self.runs, self.colour = name, runs, 'var(--soft)'
        self.arguments = next((run.arguments for run in runs if run.arguments), {})
        self.arch, self.taught = self.arguments.get('arch', ''), 'distiller' in self.arguments
        self.finished = [run for run in runs if run.finished]
        self.predictions = [run.predictions for run in self.finished or runs if run.predictions]

    def scores(self, which):
        return [run.score(which) for run in self.finished if run.score(which) is not None]

    @property
    def last(self):
        """The mean of the last epochs, or None."""
        scores = self.scores('last')
        return mean(scores) if scores else None

    def mean_of(self, function):
        """Of function(predictions) over the runs that have some, or None."""
        return np.mean([function(told) for told in self.predictions], axis=0) if self.predictions else None

    def line(self, *keys):  # for curves
        return {'name': self.name, 'colour': self.colour, 'runs': [run.curve(*keys) for run in self.runs]}


def lines_of(path):
    try:
        return path.read_text(errors='replace').splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        refuse(f'{path}: {error.strerror}')


def read_npz(path):
    try:
        with np.load(path) as arrays:
            content = dict(arrays)
        return content if {'classes', 'target', 'student'} <= content.keys() else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):  # not there, or damaged
        return None


def by_way(folders):
    """Runs in the order given. Those that differ in more than the seed are no sample of one thing."""
    ways = {}
    for folder in folders:
        held = {*os.listdir(folder)} - {'.lock', 'out.txt'} if os.path.isdir(folder) else {'nothing'}
        if held and not held & {'args.json', 'result.json', 'log.jsonl'}:  # an empty one is of a run to come
            refuse(f'{folder} is not the folder of a run')
        ways.setdefault(re.sub(SEED_OR_TIME, '', folder.resolve().name), []).append(Run(folder))
    for name, runs in ways.items():
        known = [run for run in runs if run.arguments]
        for run in known[1:]:
            one, other = known[0].arguments, run.arguments  # one may know newer flags
            differing = [k for k in sorted((one.keys() & other.keys()) - FREE) if one[k] != other[k]]
            if differing := differing + ['images'] * other_contents(known[0], run):
                refuse(f'{known[0].folder} and {run.folder} differ in {", ".join(differing)}')
        seeds = [run.seed for run in known if run.seed is not None]
        if len(set(seeds)) < len(seeds):
            refuse(f'{name}: two runs have the same seed')
    return [Way(name, runs) for name, runs in ways.items()]


def other_contents(one, other) -> bool:
    """Whether both runs know their images by a hash, and they are others."""
    return None not in (one.contents, other.contents) and one.contents != other.contents


def other_data(ways) -> str:
    """What keeps their scores from being compared: that they are of different images."""
    first = size = target = None
    for run in (run for way in ways for run in way.runs if run.arguments):
        first, size = first or run, size or run.validated
        differing = [key for key in DATA if run.arguments.get(key) != first.arguments.get(key)]
        if run.contents and run.contents == first.contents:  # of a copy elsewhere
            differing = []
        elif other_contents(run, first):
            differing.append('the images')
        if run.validated and run.validated != size:
            differing.append(f'the number of validation images ({size} and {run.validated})')
        for told in run.guesses:
            target = told['target'] if target is None else target
            if not np.array_equal(told['target'], target):
                differing = differing or ['the classes of the validation images']
        if differing:
            return (f'{first.folder} and {run.folder} are runs of different data: they differ in '
                    f'{", ".join(differing)}')
    return ''


def find_teacher(ways):
    """The folder of the run whose weights the students were given."""
    for way in ways:
        folder = Path(way.arguments.get('teacher_resume') or '/').parent
        if way.taught and (folder / 'log.jsonl').exists():
            return [folder]
    return []


def collect(folders, teacher):
    """The ways, and that of the teacher, wherever it was named; it is one of the others if it is a student's twin."""
    ways = by_way(folders)
    named, teacher = bool(teacher), by_way(teacher or find_teacher(ways))
    if other_data(teacher + ways) and not named:  # what it was trained with is its own affair
        teacher = []
    if wrong := other_data(teacher + ways):
        refuse(wrong)
    its, students = folders_of(teacher), {way.arch for way in ways if way.taught}
    return [way for way in ways if way.arch in students or not folders_of([way]) <= its], teacher


def folders_of(ways) -> set:
    return {run.folder.resolve() for way in ways for run in way.runs}


# The table, as text

def over_seeds(values):
    return '-' if not values else f'{mean(values):.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')


def cells(way):
    n, all_of_them = len(way.finished), len(way.runs)
    seconds = [run.result['seconds'] for run in way.finished if 'seconds' in run.result]
    return (way.name, way.arch, over_seeds(way.scores('last')), str(n) if n == all_of_them else f'{n} of {all_of_them}',
            over_seeds(way.scores('best')), f'{mean(seconds):.0f}' if seconds else '-')


def table(ways):
    rows = [COLUMNS, *map(cells, ways)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['| ' + ' | '.join(f'{cell:{width}}' for cell, width in zip(row, widths)) + ' |' for row in rows]
    return '\n'.join([lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:]])
