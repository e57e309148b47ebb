"""What came of some runs: a table, mean +- std over seeds, and a page that shows how it came about.

    python scripts/report.py runs/demo/alone-? runs/demo/mgd-? --teacher runs/demo/teacher -o report.html

Runs whose folders are called the same but for a number behind a dash are one way to train, with several seeds. Also of
runs that still go on: what is not there yet is left out, and the page asks for itself again every 30 seconds. The
teacher's run is found beside the weights that its students were given, where it is not named.
"""
import argparse
import contextlib
import io
import re
import sys
import time
import zipfile
import zlib
from html import escape
from pathlib import Path
from statistics import mean, stdev
from string import Template

import numpy as np
from logs import read_json, records, refuse
from svg import curves, matrix, missing, reliability, stacks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.args import NEUTRAL

FREE = NEUTRAL | {'seed', 'seeds'}  # arguments that runs of one way may differ in
DATA = ('dataset', 'data', 'dummy', 'dummy_images')
SHOWN = 20  # classes, pairs of classes
BINS = 15
PARTS = {'wait': 'waiting for data', 'teacher': 'teacher', 'student': 'student', 'losses': 'losses',
         'backward': 'backward', 'rest': 'everything else'}


class Run:
    """A run's folder, with None and [] for what is not there."""

    def __init__(self, folder):
        self.folder, self.name = folder, folder.resolve().name
        result = read_json(folder / 'result.json') or {}
        self.result = result if 'arguments' in result else {}
        self.arguments = self.result.get('arguments') or read_json(folder / 'args.json') or {}
        self.seed = self.result.get('seed', self.arguments.get('seed'))
        self.finished = bool(self.result.get('finished'))
        self.stopped = (folder / 'interrupted').exists()
        log = folder / 'log.jsonl'
        self.records = records(log.read_text(errors='replace').splitlines())[0] if log.exists() else []
        self.predictions, self.start = read_npz(folder / 'predictions.npz'), read_npz(folder / 'start.npz')

    def score(self, which):
        score = self.result.get(which) or {}
        return 100 * score['correct1'] / score['n'] if score.get('n') else None

    def state(self):
        if self.finished:
            return 'finished'
        a = self.arguments
        total = a.get('epochs', 0) + (a.get('warmup_epochs', 0) if a.get('warmup') else 0)
        done = self.records[-1]['epoch'] + 1 if self.records else 0
        if not a:
            return 'nothing recorded yet'
        return f'{"stopped" if self.stopped else "running"}, {done} of {total} epochs'

    def curve(self, *keys):
        """[(epoch, value)] of a number deep in the records, where it is there; epochs counted from 1."""
        points = []
        for record in self.records:
            value = record
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, (int, float)):
                points.append((record['epoch'] + 1, value))
        return points


class Way:
    """Runs that differ in the seed."""

    def __init__(self, name, runs):
        self.name, self.runs, self.colour = name, runs, 'var(--soft)'
        self.arguments = next((run.arguments for run in runs if run.arguments), {})
        self.arch, self.taught = self.arguments.get('arch', ''), 'distiller' in self.arguments
        self.finished = [run for run in runs if run.finished]

    def scores(self, which):
        return [run.score(which) for run in self.finished if run.score(which) is not None]

    def line(self, *keys):  # for curves
        return {'name': self.name, 'colour': self.colour, 'runs': [run.curve(*keys) for run in self.runs]}


def read_npz(path):
    try:
        with np.load(path) as arrays:
            content = dict(arrays)
        return content if {'classes', 'target'} <= content.keys() else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):  # not there, or damaged
        return None


def by_way(folders):
    """Runs in the order given. Those that differ in more than the seed are no sample of one thing."""
    ways = {}
    for folder in folders:
        if not folder.is_dir():
            refuse(f'{folder} is not the folder of a run')
        ways.setdefault(re.sub(r'-\d+$', '', folder.resolve().name), []).append(Run(folder))
    for name, runs in ways.items():
        known = [run for run in runs if run.arguments]
        for run in known[1:]:
            one, other = known[0].arguments, run.arguments  # one may know newer flags
            if differing := [k for k in sorted((one.keys() & other.keys()) - FREE) if one[k] != other[k]]:
                refuse(f'{known[0].folder} and {run.folder} differ in {", ".join(differing)}')
        seeds = [run.seed for run in known if run.seed is not None]
        if len(set(seeds)) < len(seeds):
            refuse(f'{name}: two runs have the same seed')
    return [Way(name, runs) for name, runs in ways.items()]


def same_data(ways):
    """Refuse to compare scores of different images."""
    first = size = target = None
    for run in (run for way in ways for run in way.runs if run.arguments):
        data = {key: run.arguments.get(key) for key in DATA}
        n = next((record['valid']['n'] for record in run.records if record.get('valid')), None)
        first, size = first or (run, data), size or n
        differing = [key for key in DATA if data[key] != first[1][key]]
        if n and n != size:
            differing.append(f'the number of validation images ({size} and {n})')
        for told in (run.predictions, run.start):
            target = told['target'] if target is None and told else target
            if told and not np.array_equal(told['target'], target):
                differing = differing or ['the classes of the validation images']
        if differing:
            refuse(f'{first[0].folder} and {run.folder} are runs of different data: they differ in '
                   f'{", ".join(differing)}')


def find_teacher(ways):
    """The folder of the run whose weights the students were given."""
    for way in ways:
        folder = Path(way.arguments.get('teacher_resume') or '/').parent
        if way.taught and (folder / 'log.jsonl').exists():
            return [] if any(folder.resolve() == run.folder.resolve() for w in ways for run in w.runs) else [folder]
    return []


# The table, as text

def spread(values):
    return '-' if not values else f'{mean(values):.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')


def cells(way):
    n, all_of_them = len(way.finished), len(way.runs)
    seconds = [run.result['seconds'] for run in way.finished if 'seconds' in run.result]
    return (way.name, way.arch, spread(way.scores('last')), str(n) if n == all_of_them else f'{n} of {all_of_them}',
            spread(way.scores('best')), f'{mean(seconds):.0f}' if seconds else '-')


COLUMNS = ('', 'network', 'top-1, last epoch', 'runs', 'top-1, best epoch', 'seconds per run')


def table(ways):
    rows = [COLUMNS, *map(cells, ways)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['| ' + ' | '.join(f'{cell:{width}}' for cell, width in zip(row, widths)) + ' |' for row in rows]
    return '\n'.join([lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:]])


# What follows from the guesses

def right(told, who):
    return told[who][0].astype(int) == told['target']


def mean_over(runs, function):
    """Of function(predictions) of the runs that have some."""
    values = [function(run.predictions) for run in runs if run.predictions and 'student' in run.predictions]
    return np.mean(values, axis=0) if values else None


def per_class(told, who='student'):
    """Percent right of each class."""
    n = np.bincount(told['target'])
    return 100 * np.bincount(told['target'], right(told, who), len(n)) / np.maximum(n, 1)


def calibration(told, who='student'):
    """[BINS, 3]: of each bin of confidence the number of images, and the sums of confidence and of right guesses."""
    sure = told[who][1].astype(float)
    bins = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
    return np.stack([np.bincount(bins, weights, BINS) for weights in (None, sure, right(told, who))], 1)


def ece(counts):
    """Expected calibration error: the mean distance of confidence and accuracy."""
    return np.abs(counts[:, 1] - counts[:, 2]).sum() / max(counts[:, 0].sum(), 1)


def teachers_guesses(ways, teacher):
    """Predictions and the name of the network in them that is the teacher."""
    for way in teacher:
        for run in way.runs:
            if run.predictions and 'student' in run.predictions:
                return run.predictions, 'student'
    for told in (told for way in ways for run in way.runs for told in (run.predictions, run.start)):
        if told and 'teacher' in told:
            return told, 'teacher'
    return None, None


def confusions(told, who, known):
    """{(class, guess): how often} among the images that `known` marks and that are guessed wrong."""
    chosen = known & ~right(told, who)
    pairs, counts = np.unique(np.stack([told['target'], told[who][0].astype(int)])[:, chosen], axis=1,
                              return_counts=True)
    return dict(zip(map(tuple, pairs.T.tolist()), counts.tolist()))


# The page

def section(title, text, *parts):
    return f'<section><h2>{escape(title)}</h2><p>{text}</p>{"".join(parts)}</section>'


def grid(columns, parts):
    return f'<div class="grid{columns}">{"".join(parts)}</div>'


def dot(way):
    return f'<i class="dot" style="--c:{way.colour}"></i>{escape(way.name)}'


def html_table(head, rows, best=None):
    told = ''.join(f'<th>{cell}</th>' for cell in head) if any(head) else ''
    body = ''.join(f'<tr{" class=best" * (i == best)}>' + ''.join(
        cell if cell.startswith('<td') else f'<td>{cell}</td>' for cell in row) + '</tr>' for i, row in enumerate(rows))
    return f'<div class="card"><table><thead><tr>{told}</tr></thead><tbody>{body}</tbody></table></div>'


def shaded(value, most, text):
    kind, share = ('up' if value > 0 else 'down'), round(55 * min(abs(value) / most, 1)) if most else 0
    return f'<td class="{kind}" style="--v:{share}">{text}</td>'


class Page:
    def __init__(self, ways, teacher):
        self.teacher, self.ways, self.all = teacher, ways, teacher + ways
        self.alone = next((way for way in ways if way.arguments and not way.taught), None)
        self.taught = [way for way in ways if way.taught]
        others = iter(range(1, 10 ** 6))
        for way in ways:
            way.colour = 'var(--s0)' if way is self.alone else f'var(--s{(next(others) - 1) % 7 + 1})'
        self.best = max((way for way in ways if way.scores('last')), key=lambda w: mean(w.scores('last')), default=None)
        self.guesses, self.who = teachers_guesses(ways, teacher)
        self.names = next((told['classes'] for way in self.all for run in way.runs
                           for told in (run.predictions, run.start) if told), None)
        self.running = [run for way in self.all for run in way.runs if not run.finished]

    def html(self):
        arguments = next((way.arguments for way in self.ways + self.teacher if way.arguments), {})
        data = Path(arguments.get('data') or 'made-up images').name
        data = data if arguments.get('dataset', 'imagefolder') == 'imagefolder' else arguments['dataset']
        students = ', '.join(dict.fromkeys(way.arch for way in self.ways if way.arch))
        title = f'{students or "Runs"} on {data}'
        parts = [self.head(title), self.final(), self.course(), self.pull(), self.matching(), self.classes(),
                 self.confused(), self.calibrated(), self.times(), self.origin()]
        page = Template((Path(__file__).parent / 'report_page.html').read_text())
        return page.substitute(title=escape(title), body='\n'.join(parts),
                               refresh='<meta http-equiv="refresh" content="30">' * bool(self.running))

    def head(self, title):
        n = next((record['valid']['n'] for way in self.all for run in way.runs for record in run.records
                  if record.get('valid')), None)
        facts = [f'{n:,} validation images' if n else '']
        facts.append(f'{len(self.names)} classes' if self.names is not None else '')
        under = {way.arguments.get('teacher_arch') for way in self.taught}
        facts.append(f'teacher {", ".join(sorted(map(str, under)))}' if under else '')
        runs = sum(len(way.runs) for way in self.all)
        facts.append(f'{runs} runs' + (f', {len(self.running)} not finished' if self.running else ''))
        tiles, means = [], {way: mean(way.scores('last')) for way in self.all if way.scores('last')}
        if self.best:
            tiles.append((f'{means[self.best]:.1f} %', f'the best of the last epochs: {self.best.name}'))
            if self.alone in means and self.best is not self.alone:
                gain = means[self.best] - means[self.alone]
                tiles.append((f'{gain:+.1f}', f'points more than {self.alone.name}'))
                gap = means[self.teacher[0]] - means[self.alone] if self.teacher and self.teacher[0] in means else 0
                if gap > 0:
                    tiles.append((f'{100 * gain / gap:.0f} %', 'of the way up to the teacher'))
            if self.guesses is not None:
                same = mean_over(self.best.runs, self.agreement)
                if same is not None:
                    tiles.append((f'{same:.0f} %', f'of the guesses of {self.best.name} are the teacher\'s'))
        shown = ''.join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>'
                        for big, small in tiles)
        states = ''.join(f'<span class="pill">{escape(run.name)}: {escape(run.state())}</span>' for run in self.running)
        return (f'<h1>{escape(title)}</h1><p class="lead">{escape(" · ".join(filter(None, facts)))}</p>{states}'
                f'<div class="tiles">{shown}</div>')

    def agreement(self, told):
        return 100 * np.mean(told['student'][0] == self.guesses[self.who][0])

    def final(self):
        rows = []
        for way in self.all:
            others = cells(way)[1:]
            counts = mean_over(way.runs, lambda told: 100 * ece(calibration(told)))
            same = mean_over(way.runs, self.agreement) if self.guesses is not None and way in self.ways else None
            gain = ''
            if way in self.taught and self.alone and way.scores('last') and self.alone.scores('last'):
                gain = f'{mean(way.scores("last")) - mean(self.alone.scores("last")):+.2f}'
            rows.append([dot(way), *map(escape, others[:2]), gain, *others[2:],
                         '-' if counts is None else f'{counts:.1f} %', '-' if same is None else f'{same:.1f} %'])
        best = self.all.index(self.best) if self.best else None
        over = f'over {escape(self.alone.name)}' if self.alone else ''
        head = ['', 'network', 'top-1 %,<br>last epoch', over, 'runs',
                'top-1 %,<br>best epoch', 'seconds<br>per run', 'ECE', 'agrees with<br>the teacher']
        return section('What came of it', 'Mean ± standard deviation of the sample over the seeds, of finished runs. '
                       'The best epoch is picked by the validation images themselves, and flatters.',
                       html_table(head, rows, best), self.verdict())

    def verdict(self):
        """Whether the seeds tell the first from the second."""
        ranked = sorted((way for way in self.ways if way.scores('last')), key=lambda way: -mean(way.scores('last')))
        if len(ranked) < 2:
            return ''
        one, two = ranked[:2]
        gap = mean(one.scores('last')) - mean(two.scores('last'))
        told = f'{escape(one.name)} ends {gap:.2f} points above {escape(two.name)}'
        if min(len(way.scores('last')) for way in (one, two)) < 2:
            return f'<p class="soft">{told}, by one seed: that may be chance.</p>'
        error = sum(stdev(way.scores('last')) ** 2 / len(way.scores('last')) for way in (one, two)) ** 0.5
        return (f'<p class="soft">{told}, with a standard error of {error:.2f}: '
                f'{"more than chance makes likely" if gap > 2 * error else "as much could be chance"}.</p>')

    def course(self):
        last = [way.scores('last') for way in self.teacher]
        level = [{'name': way.name, 'colour': 'var(--soft)', 'value': mean(values)}
                 for way, values in zip(self.teacher, last) if values]
        parts = [curves('Top-1 on the validation images, %', [way.line('valid', 'top1') for way in self.ways],
                        levels=level),
                 curves('Top-1 on the training images, %', [way.line('train', 'top1') for way in self.ways],
                        note='as augmented, during the epoch'),
                 curves('Cross entropy on the validation images', [way.line('valid', 'loss') for way in self.ways],
                        log=True)]
        for way in self.taught:
            names = dict.fromkeys(name for run in way.runs for record in run.records
                                  for name in record['train'].get('losses', {}))
            lines = [way.line('train', 'losses', name) | {'name': name, 'colour': f'var(--s{i % 8})'}
                     for i, name in enumerate(names)]
            parts.append(curves(f'Losses of {way.name}', lines, note='each with its factor'))
        return section('How it went', 'A line is the mean of the runs of one way, in the band of their range.',
                       grid(2, parts))

    def pull(self):
        ratio, angle = [], []
        for way in self.taught:
            runs = [[(epoch, much / little) for (epoch, much), (_, little) in zip(
                run.curve('train', 'balance', 'distillation'), run.curve('train', 'balance', 'labels')) if little]
                    for run in way.runs]
            ratio.append({'name': way.name, 'colour': way.colour, 'runs': runs})
            angle.append(way.line('train', 'balance', 'cosine'))
        if not self.taught:
            return ''
        return section(
            'Who pulls', 'The gradient of the distillation losses against that of the labels\' cross entropy, over all '
            'of the student\'s weights, in a few updates of each epoch. A ratio of 1 is a fair share; a negative '
            'cosine means that they want different things. Not measured with --compile and --amp fp16.',
            grid(2, [curves('Norm of the distillation\'s gradient / norm of the labels\'', ratio, log=True),
                     curves('Cosine between them', angle)]))

    def matching(self):
        matched = [way for way in self.taught if 'mgd' in way.arguments.get('distiller', [])]
        parts = []
        for way in matched:
            updates = [[(record['epoch'] + 1, row) for record in run.records
                        for row in (record.get('news') or {}).get('mgd', [])] for run in way.runs]
            stages = sorted({row['stage'] for run in updates for _, row in run})
            for key, title, factor in (('changed', 'Teacher channels that changed hands, %', 100),
                                       ('cost', 'Cost of a pair, 2 - 2 cos', 1)):
                lines = [{'name': f'stage {stage + 1}', 'colour': f'var(--m{min(2 * i, 4)})', 'runs': [
                    [(x, factor * row[key]) for x, row in run if row['stage'] == stage and row[key] is not None]
                    for run in updates]} for i, stage in enumerate(stages)]
                parts.append(curves(f'{title} ({way.name})', lines))
        if not matched:
            return ''
        return section(
            'Who learns from whom', 'MGD gives every student channel teacher channels of its own, and solves that '
            'matching anew every few epochs. In the pictures a row is a student channel, a dot a teacher channel that '
            'it learns from. Teacher channels stand by margin, lowest first, student channels by the mean of theirs; '
            'ticks below are teacher channels that are left over.', grid(2, parts), *map(self.matrices, matched))

    def matrices(self, way):
        run = next((run for run in way.runs if (run.folder / 'checkpoint.pth').exists()), None)
        stages = read_matching(run.folder) if run else None
        if not stages:
            return missing(f'The matching of {way.name}')
        import matching
        parts = []
        for i, (flow, margins) in enumerate(stages):
            (g, sc), tc = flow.shape, len(margins)
            ranks = margins.argsort(stable=True).argsort()
            row = margins[flow].double().mean(0).argsort(stable=True).argsort().numpy()
            column, shade = ranks[flow].numpy(), (ranks[flow] * 5 // tc).numpy()
            unused = np.setdiff1d(np.arange(tc), column)
            note = f'{sc} students, {tc} teachers: {g} for each, {len(unused)} left over' + (
                f'; alike by {matching.alike(ranks[flow].double()):.2f}' if g > 1 else '')
            title = f'{run.name}, stage {i + 1} of {len(stages)}'
            parts.append(matrix(title, note, column, row, shade, unused, sc, tc))
        return grid(3, parts)

    def classes(self):
        alone = self.alone and mean_over(self.alone.runs, per_class)
        gains = {way: mean_over(way.runs, per_class) for way in self.taught}
        gains = {way: value - alone for way, value in gains.items() if value is not None and alone is not None}
        if not self.taught:
            return ''
        text = ('Points of accuracy on a class over the student without a teacher'
                + (f' ({escape(self.alone.name)})' if self.alone else '') + ', at the last epoch.')
        if not gains:
            return section('Which classes gain', text, missing('Gain per class'))
        middle = np.mean(list(gains.values()), axis=0)
        order = np.argsort(-middle, kind='stable')
        cut = len(order) > SHOWN
        order = [*order[:SHOWN // 2], *order[-(SHOWN // 2):]] if cut else order
        if cut:
            text += f' The {SHOWN // 2} largest gains and the {SHOWN // 2} largest losses of {len(middle)} classes.'
        teacher = per_class(self.guesses, self.who) if self.guesses is not None else None
        most = max(np.abs(np.stack([*gains.values()])[:, order]).max(), 1e-9)
        rows = [[self.class_name(c), '-' if teacher is None else f'{teacher[c]:.0f}', f'{alone[c]:.0f}',
                 *(shaded(gain[c], most, f'{gain[c]:+.1f}') for gain in gains.values())] for c in order]
        head = ['class', 'teacher, %', f'{escape(self.alone.name)}, %', *map(dot, gains)]
        return section('Which classes gain', text, html_table(head, rows))

    def class_name(self, number):
        return escape(str(self.names[number]) if number < len(self.names) else f'output {number}')

    def confused(self):
        if not self.taught:
            return ''
        text = ('What a student takes for something else though the teacher knows it: images per run, of the pairs '
                'that students with a teacher confuse most.')
        if self.guesses is None:
            return section('Where students still differ from the teacher', text, missing('Confused classes'))
        known, counted = right(self.guesses, self.who), {}
        for way in self.ways:
            told = [confusions(run.predictions, 'student', known) for run in way.runs
                    if run.predictions and 'student' in run.predictions]
            if told:
                counted[way] = {pair: mean(each.get(pair, 0) for each in told) for pair in set().union(*told)}
        pairs = {pair for way, counts in counted.items() if way.taught for pair in counts}
        total = {pair: sum(counts.get(pair, 0) for way, counts in counted.items() if way.taught) for pair in pairs}
        top = sorted(pairs, key=lambda pair: (-total[pair], pair))[:SHOWN // 2]
        if not top:
            return section('Where students still differ from the teacher', text, missing('Confused classes'))
        most = max(counts.get(pair, 0) for counts in counted.values() for pair in top)
        rows = [[f'{self.class_name(true)} <span class="soft">taken for</span> {self.class_name(guess)}',
                 *(shaded(-counts.get((true, guess), 0), most, f'{counts.get((true, guess), 0):.1f}')
                   for counts in counted.values())] for true, guess in top]
        rows.append(['<td class="soft">all that the teacher knows and the student does not</td>',
                     *(f'{sum(counts.values()):.1f}' for counts in counted.values())])
        return section('Where students still differ from the teacher', text,
                       html_table(['class', *map(dot, counted)], rows))

    def calibrated(self):
        parts = []
        shown = [(way.name, way.colour, [run.predictions for run in way.runs
                                         if run.predictions and 'student' in run.predictions], 'student')
                 for way in self.ways]
        if self.guesses is not None:
            shown.insert(0, ('teacher', 'var(--soft)', [self.guesses], self.who))
        for name, colour, all_told, who in shown:
            if all_told:
                counts = np.sum([calibration(told, who) for told in all_told], 0)
                error = mean(float(ece(calibration(told, who))) for told in all_told)
                bins = [(int(n), sure / max(n, 1), hit / max(n, 1)) for n, sure, hit in counts]
                parts.append(reliability(name, colour, bins, error))
            else:
                parts.append(missing(name))
        return section('How sure, and how often right', 'Images by the confidence of the guess: bars on the dashed '
                       'line are calibrated, below it too sure. The paler a bar, the fewer its images. ECE is the '
                       f'expected calibration error over {BINS} bins, the mean of the runs.', grid(4, parts))

    def times(self):
        rows = []
        for way in self.all:
            found = [record['train'] for run in way.runs for record in run.records
                     if record['train'].get('time') and record['train'].get('update')]
            if found:
                values = {key: 1e3 * mean(train['update'].get(key, 0) for train in found) for key in PARTS}
                values['wait'] = 1e3 * mean(train['time']['wait'] for train in found)
                whole = 1e3 * mean(train['time']['seconds'] for train in found)
                values['rest'] = max(whole - sum(values.values()), 0)
                rows.append((way.name, {PARTS[key]: value for key, value in values.items()}))
        text = ('One update, on average. Parts are measured in a few updates of each epoch, one after the other, which '
                'a GPU otherwise overlaps.')
        if not rows:
            return section('Where the time goes', text, missing('Time of an update'))
        colours = ['var(--soft)', 'var(--s2)', 'var(--s1)', 'var(--s4)', 'var(--s5)', 'var(--line)']
        scored = [f'{escape(way.name)} {mean(v):.2g} s' for way in self.all
                  if (v := [y for run in way.runs for _, y in run.curve('evaluation')])]
        told = f'<p class="soft">An evaluation takes: {", ".join(scored)}.</p>' if scored else ''
        return section('Where the time goes', text,
                       stacks('Time of an update', rows, list(zip(PARTS.values(), colours)), 'ms'), told)

    def origin(self):
        results = [run.result for way in self.all for run in way.runs if run.result]

        def values(get):
            return ', '.join(dict.fromkeys(str(get(result)) for result in results)) or 'not recorded yet'
        facts = [('device', values(lambda r: r.get('device'))), ('processes', values(lambda r: r.get('world_size'))),
                 *((name, values(lambda r, name=name: r.get('versions', {}).get(name)))
                   for name in ('python', 'torch', 'torchvision')),
                 ('git', values(lambda r: r.get('git') or 'no checkout')),
                 ('teacher', ', '.join(dict.fromkeys(r['teacher'] for r in results if 'teacher' in r)) or '-')]
        rows = [[name, f'<td class="text">{escape(value)}</td>'] for name, value in facts]
        known = [way for way in self.ways if way.arguments]
        keys = sorted({key for way in known for key in way.arguments} - FREE)
        differing = [key for key in keys if len({str(way.arguments.get(key, '-')) for way in known}) > 1]
        flags = [[f'<code>--{key.replace("_", "-")}</code>',
                  *(f'<td class="text">{escape(told(way.arguments.get(key, "-")))}</td>' for way in known)]
                 for key in differing]
        commands = []
        for way in self.all:
            first = next((run for run in way.runs if run.result.get('command')), None)
            if first:
                others = ', '.join(str(run.seed) for run in way.runs if run is not first)
                again = f'\n# and with --seed {others}' if others else ''
                commands.append(f'python {first.result["command"]}{again}')
        return section(
            'What it was made with', 'All that is needed to do it again.', html_table(['', ''], rows),
            (f'<details><summary>Arguments in which the ways differ</summary>'
             f'{html_table(["", *map(dot, known)], flags)}</details>') if flags else '',
            f'<details open><summary>Command lines</summary><pre>{escape((chr(10) * 2).join(commands))}</pre></details>'
            if commands else missing('Command lines'),
            f'<footer>Made {time.strftime("%Y-%m-%d %H:%M")} by scripts/report.py of '
            f'{escape(", ".join(str(run.folder) for way in self.all for run in way.runs))}</footer>')


def told(value):
    return ' '.join(map(str, value)) or '-' if isinstance(value, list) else str(value)


def read_matching(folder):
    """matching.read_stages, or None where there is none yet."""
    try:
        import matching
        with contextlib.redirect_stderr(io.StringIO()):
            return matching.read_stages(folder)[0]
    except (SystemExit, KeyError):
        return None


def draw(ways, teacher):
    """The mean of each way in the band of its runs; the teacher's last epoch as a dashed line. For matplotlib."""
    from plot import STYLE, MaxNLocator, plt
    plt.rcParams.update(STYLE)
    colours = ('0.15', '#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9')  # told apart with any kind of eyes
    figure, axes = plt.subplots(figsize=(7, 4.2), layout='constrained')
    labels = []  # where a name belongs, the name, its colour
    for way, colour in zip(ways, colours * len(ways)):
        columns = {}
        for run in way.runs:
            for epoch, value in run.curve('valid', 'top1'):
                columns.setdefault(epoch, []).append(value)
        if columns:
            epochs, values = zip(*sorted(columns.items()))
            axes.plot(epochs, [mean(v) for v in values], color=colour)
            low, high = zip(*((min(v), max(v)) for v in values))
            axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
            labels.append((mean(values[-1]), way.name, colour))
    for way in teacher:
        if way.scores('last'):
            score = mean(way.scores('last'))
            axes.axhline(score, color='0.4', linestyle='--', linewidth=1.2)
            labels.append((score, way.name, '0.4'))
    low, high = axes.get_ylim()
    place = low
    for value, name, colour in sorted(labels):
        place = max(value, place + 0.045 * (high - low))  # names of curves that end close together do not overlap
        axes.annotate(f'{name} {value:.1f}', (1, place), (6, 0), color=colour, va='center', annotation_clip=False,
                      xycoords=axes.get_yaxis_transform(), textcoords='offset points')
    axes.set_title('Top-1 accuracy (%) on the validation images: mean and range of the runs')
    axes.set_xlabel('epoch')
    axes.margins(x=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def collect(folders, teacher):
    ways = by_way(folders)
    teacher = by_way(teacher or find_teacher(ways))
    same_data(teacher + ways)
    return ways, teacher


def write(ways, teacher, path):
    """The page appears whole or not at all: a browser may be reading it."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(Page(ways, teacher).html())
    temporary.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', nargs='+', type=Path, metavar='OUT', help='folder of a run')
    parser.add_argument('--teacher', nargs=1, type=Path, default=[], metavar='OUT', help='the run of their teacher')
    parser.add_argument('-o', '--output', type=Path, default='report.html', metavar='HTML', help='(%(default)s)')
    parser.add_argument('--curves', type=Path, metavar='PNG', help='draw the curves of top-1 as a picture, too')
    args = parser.parse_args()
    ways, teacher = collect(args.out, args.teacher)
    print(table(teacher + ways))
    try:
        write(ways, teacher, args.output)
        if args.curves:
            draw(ways, teacher).savefig(args.curves, dpi=150)
    except (OSError, ValueError) as error:  # no such folder, no such format
        refuse(f'{getattr(error, "filename", None) or args.curves}: {getattr(error, "strerror", None) or error}')


if __name__ == '__main__':
    main()
