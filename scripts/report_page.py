"""The page of a report: HTML that needs nothing from elsewhere, in the frame of report_page.html."""
import contextlib
import io
import time
from collections import Counter
from html import escape
from pathlib import Path
from statistics import mean, variance
from string import Template

import numpy as np
from guesses import BINS, calibration, confusions, ece, per_class, right
from svg import curves, matrix, missing, reliability, stacks
from ways import FREE, cells

SHOWN = 20  # classes, pairs of classes
# of Student's t: what lies beyond it, on both sides, is a twentieth; by degrees of freedom
QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
PARTS = {'wait': 'waiting for data', 'teacher': 'teacher', 'student': 'student', 'losses': 'losses',
         'backward': 'backward', 'rest': 'everything else'}


class Page:
    def __init__(self, ways, teacher):
        self.teacher, self.ways, self.all = teacher, ways, teacher + ways
        self.taught = [way for way in ways if way.taught]
        students = {way.arch for way in self.taught}
        self.alone = next((way for way in ways if way.arguments and not way.taught
                           and (way.arch in students or not students)), None)
        for i, way in enumerate(way for way in ways if way is not self.alone):
            way.colour = f'var(--s{i % 7 + 1})'
        if self.alone:
            self.alone.colour = 'var(--s0)'
        self.ranked = sorted((way for way in ways if way.last is not None), key=lambda way: -way.last)
        self.best = self.ranked[0] if self.ranked else None
        self.teachers = {way: told for way in self.taught if (told := teachers_guesses(way, teacher))}
        self.guesses, self.who = next(iter(self.teachers.values()), (None, None))
        self.runs = [run for way in self.all for run in way.runs]
        self.names = next((told['classes'] for run in self.runs for told in run.guesses), None)
        self.unfinished = [run for run in self.runs if not run.finished]

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
                               refresh='<meta http-equiv="refresh" content="30">' * bool(self.unfinished))

    def head(self, title):
        n = next((run.validated for run in self.runs if run.validated), None)
        under = {way.arguments.get('teacher_arch') for way in self.taught}
        facts = [f'{n:,} validation images' if n else '',
                 f'{len(self.names)} classes' if self.names is not None else '',
                 f'teacher {", ".join(sorted(map(str, under)))}' if under else '',
                 f'{len(self.runs)} runs' + (f', {len(self.unfinished)} not finished' if self.unfinished else '')]
        tiles = []
        if self.best:
            tiles.append((f'{self.best.last:.1f} %', f'the best of the last epochs: {self.best.name}'))
            gain, gap = self.gain(self.best), self.gap(self.best)
            if gain is not None and self.best is not self.alone:
                tiles.append((f'{gain:+.1f}', f'points more than {self.alone.name}'))
                if gap and gap > 0:
                    tiles.append((f'{100 * gain / gap:.0f} %', 'of the way up to the teacher'))
            same = self.agreement(self.best)
            if same is not None:
                tiles.append((f'{same:.0f} %', f'of the guesses of {self.best.name} are the teacher\'s'))
        shown = ''.join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>'
                        for big, small in tiles)
        states = ''.join(f'<span class="pill">{escape(run.name)}: {escape(run.state())}</span>'
                         for run in self.unfinished)
        return (f'<h1>{escape(title)}</h1><p class="lead">{escape(" · ".join(filter(None, facts)))}</p>{states}'
                f'<div class="tiles">{shown}</div>')

    def gain(self, way):
        """Points of the last epoch over the student alone, or None."""
        known = self.alone and None not in (way.last, self.alone.last)
        return way.last - self.alone.last if known else None

    def gap(self, way):
        """Points of its teacher, as it was when it taught, over the student alone, or None."""
        learned = [run.result.get('last', {}).get('teacher') for run in way.finished]
        scores = [100 * score['correct1'] / score['n'] for score in learned if score]
        scores += [score for run in way.runs if (score := run.score('teacher_score')) is not None]
        scores += [way.last for way in self.teacher if way.last is not None]
        return scores[0] - self.alone.last if scores and self.alone and self.alone.last is not None else None

    def teacher_of(self, way):
        """Guesses of its teacher, or for a way without one of the first that is known, and its name among them."""
        return self.teachers.get(way, (None, None) if way.taught else (self.guesses, self.who))

    def beside(self, told, way):
        """What teacher_of tells, of the teacher that has learned beside this very student, if one has."""
        return (told, 'teacher') if 'teacher' in told else self.teacher_of(way)

    def agreement(self, way):
        """Percent of the guesses that are the teacher's, or None."""
        def of_one(told):
            guesses, who = self.beside(told, way)
            return 100 * np.mean(told['student'][0] == guesses[who][0])
        return None if self.teacher_of(way)[0] is None else way.mean_of(of_one)

    def final(self):
        rows = []
        for way in self.all:
            others = cells(way)[1:]
            error = way.mean_of(lambda told: 100 * ece(calibration(told)))
            same = self.agreement(way) if way in self.ways else None
            gain = self.gain(way) if way in self.taught else None
            rows.append([dot(way), *map(escape, others[:2]), '' if gain is None else f'{gain:+.2f}', *others[2:],
                         '-' if error is None else f'{error:.1f} %', '-' if same is None else f'{same:.1f} %'])
        best = self.all.index(self.best) if self.best else None
        over = f'over {escape(self.alone.name)}' if self.alone else ''
        head = ['', 'network', 'top-1 %,<br>last epoch', over, 'runs',
                'top-1 %,<br>best epoch', 'seconds<br>per run', 'ECE', 'agrees with<br>the teacher']
        return section('What came of it', 'Mean ± standard deviation of the sample over the seeds, of finished runs. '
                       'The best epoch is picked by the validation images themselves, and flatters.',
                       html_table(head, rows, best), self.verdict())

    def verdict(self):
        """Whether the seeds tell the first from the second."""
        if len(self.ranked) < 2:
            return ''
        one, two = self.ranked[:2]
        gap, samples = one.last - two.last, [way.scores('last') for way in (one, two)]
        told = f'{escape(one.name)} ends {gap:.2f} points above {escape(two.name)}'
        if min(map(len, samples)) < 2:
            return f'<p class="soft">{told}, by one seed: that may be chance.</p>'
        error, largest = likely(*samples)
        return (f'<p class="soft">{told}, with a standard error of {error:.2f}: '
                f'{"more than chance makes likely" if gap > largest else "as much could be chance"}.</p>')

    def course(self):
        levels = [{'name': way.name, 'colour': way.colour, 'value': way.last} for way in self.teacher]
        parts = [curves('Top-1 on the validation images, %', [way.line('valid', 'top1') for way in self.ways],
                        levels=levels),
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
        if not self.taught:
            return ''
        ratio, angle = [], []
        for way in self.taught:
            told = [[(epoch, much / little, cosine) for (epoch, much), (_, little), (_, cosine) in zip(*(
                run.curve('train', 'balance', name) for name in ('distillation', 'labels', 'cosine'))) if little]
                    for run in way.runs]  # where the labels have a gradient
            line = {'name': way.name, 'colour': way.colour}
            ratio.append(line | {'runs': [[(epoch, share) for epoch, share, _ in run] for run in told]})
            angle.append(line | {'runs': [[(epoch, cosine) for epoch, _, cosine in run] for run in told]})
        return section(
            'Who pulls', 'The gradient of the distillation losses against that of the labels\' cross entropy, over all '
            'of the student\'s weights, in a few updates of each epoch. A ratio of 1 is a fair share; a negative '
            'cosine means that they want different things. Not measured with --compile and --amp fp16.',
            grid(2, [curves('Norm of the distillation\'s gradient / norm of the labels\'', ratio, log=True),
                     curves('Cosine between them', angle)]))

    def matching(self):
        matched = [way for way in self.taught if 'mgd' in way.arguments.get('distiller', [])]
        if not matched:
            return ''
        parts = []
        for way in matched:
            updates = [[(record['epoch'], row) for record in run.records
                        for row in (record.get('news') or {}).get('mgd', [])] for run in way.runs]
            stages = sorted({row['stage'] for run in updates for _, row in run})
            for key, title, factor in (('changed', 'Teacher channels that changed hands, %', 100),
                                       ('cost', 'Cost of a pair, 2 - 2 cos', 1)):
                lines = [{'name': f'stage {i + 1} of {len(stages)}', 'colour': f'var(--m{min(2 * i, 4)})', 'runs': [
                    [(x, factor * row[key]) for x, row in run if row['stage'] == stage and row[key] is not None]
                    for run in updates]} for i, stage in enumerate(stages)]
                parts.append(curves(f'{title} ({way.name})', lines))
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
            (g, sc), tc, (column, row, unused) = flow.shape, len(margins), matching.place(flow, margins)
            note = f'{sc} students, {tc} teachers: {g} for each, {len(unused)} left over' + (
                f'; alike by {matching.alike(column.double()):.2f}' if g > 1 else '')
            title, places = f'{run.name}, stage {i + 1} of {len(stages)}', (column, row, column * 5 // tc, unused)
            parts.append(matrix(title, note, *(x.numpy() for x in places), sc, tc))
        return grid(3, parts)

    def classes(self):
        if not self.taught:
            return ''
        alone = self.alone and self.alone.mean_of(per_class)
        gains = {way: way.mean_of(per_class) - alone for way in self.taught if way.predictions and alone is not None}
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
        title = 'Where students still differ from the teacher'
        text = ('What a student takes for something else though the teacher knows it: images per run, of the pairs '
                'that students with a teacher confuse most.')
        counted, total = {}, Counter()
        for way in (way for way in self.ways if way.predictions and self.teacher_of(way)[0] is not None):
            found = [confusions(told, 'student', right(*self.beside(told, way))) for told in way.predictions]
            counted[way] = Counter({pair: mean(each.get(pair, 0) for each in found) for pair in set().union(*found)})
            total.update(counted[way] if way.taught else {})
        top = sorted(total, key=lambda pair: (-total[pair], pair))[:SHOWN // 2]
        if not top:
            return section(title, text, missing('Confused classes'))
        most = max(counts[pair] for counts in counted.values() for pair in top)
        rows = [[f'{self.class_name(true)} <span class="soft">taken for</span> {self.class_name(guess)}',
                 *(shaded(-counts[true, guess], most, f'{counts[true, guess]:.1f}') for counts in counted.values())]
                for true, guess in top]
        rows.append(['<td class="soft">all that the teacher knows and the student does not</td>',
                     *(f'{sum(counts.values()):.1f}' for counts in counted.values())])
        return section(title, text, html_table(['class', *map(dot, counted)], rows))

    def calibrated(self):
        parts = []
        shown = [(way.name, way.colour, way.predictions, 'student') for way in self.ways]
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
        results = [run.result for run in self.runs if run.result]

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
                  *(f'<td class="text">{escape(words(way.arguments.get(key, "-")))}</td>' for way in known)]
                 for key in differing]
        commands = []
        for way in self.all:
            first = next((run for run in way.runs if run.result.get('command')), None)
            if first:
                seeds = ', '.join(str(run.seed) for run in way.runs if run.seed is not None)
                commands.append(f'python {first.result["command"]}\n# seeds: {seeds}')
        return section(
            'What it was made with', 'All that is needed to do it again.', html_table(['', ''], rows),
            (f'<details><summary>Arguments in which the ways differ</summary>'
             f'{html_table(["", *map(dot, known)], flags)}</details>') if flags else '',
            f'<details open><summary>Command lines</summary><pre>{escape((chr(10) * 2).join(commands))}</pre></details>'
            if commands else missing('Command lines'),
            f'<footer>Made {time.strftime("%Y-%m-%d %H:%M")} by scripts/report.py of '
            f'{escape(", ".join(str(run.folder) for run in self.runs))}</footer>')


def words(value):
    return ' '.join(map(str, value)) or '-' if isinstance(value, list) else str(value)


def read_matching(folder):
    """matching.read_stages, or None where there is none yet."""
    try:
        import matching
        with contextlib.redirect_stderr(io.StringIO()):
            return matching.read_stages(folder)[0]
    except (SystemExit, KeyError):
        return None


def teachers_guesses(way, teacher):
    """Predictions, and the name in them of the network that taught, as it was when it did; None if they are gone."""
    file = Path(way.arguments.get('teacher_resume') or '')
    last = file.name in ('last.pth', 'checkpoint.pth')  # of which predictions.npz tells
    found = [(run.predictions, 'teacher') for run in way.runs]  # that has learned beside it
    found += [(run.start, 'teacher') for run in way.runs]
    found += [(run.predictions, 'student') for of in teacher for run in of.runs
              if last and run.folder.resolve() == file.parent.resolve()]
    return next(((told, who) for told, who in found if told and who in told), None)


def likely(one, other):
    """The standard error of the difference of two means, and the largest that chance makes likely (Welch's test)."""
    parts = [(variance(scores) / len(scores), len(scores) - 1) for scores in (one, other)]
    error = sum(part for part, _ in parts)
    if not error:
        return 0.0, 0.0
    freedom = int(error ** 2 / sum(part ** 2 / n for part, n in parts) + 1e-9)
    quantile = QUANTILES[freedom - 1] if freedom <= len(QUANTILES) else 1.96 + 2.6 / freedom
    return error ** 0.5, quantile * error ** 0.5


# Pieces of HTML

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
