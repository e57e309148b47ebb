"""Compare ways to train by their last epoch: a table, mean +- std over seeds, and the curves.

    python scripts/compare.py runs/demo/alone-? runs/demo/mgd-? --teacher runs/demo/teacher -o curves.png

Runs whose folders are called the same but for a number behind a dash are one way to train, with several seeds.
"""
import argparse
import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

from matplotlib.ticker import MaxNLocator
from plot import STYLE, plt, read_log, refuse, series

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.args import NEUTRAL

FREE = NEUTRAL | {'seed'}  # arguments that runs of one way may differ in
COLOURS = ('0.15', '#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9')  # told apart with any kind of eyes


def read_result(run):
    path = run / 'result.json'
    try:
        result = json.loads(path.read_text())
        finished = result['finished']
    except OSError as error:
        refuse(f'{path}: {error.strerror}')
    except (ValueError, KeyError, TypeError):
        refuse(f'{path} is not the result of a run')
    if not finished:
        refuse(f'{run} is not finished')
    return result


def by_way(runs):
    """{name: {run: result}} in the order given. Runs that differ in more than the seed are no sample of one thing."""
    ways = {}
    for run in runs:
        ways.setdefault(re.sub(r'-\d+$', '', run.resolve().name), {})[run] = read_result(run)
    for name, results in ways.items():
        first, *others = results
        for run in others:
            one, other = results[first]['arguments'], results[run]['arguments']  # one may know newer flags
            if differing := [k for k in sorted((one.keys() & other.keys()) - FREE) if one[k] != other[k]]:
                refuse(f'{first} and {run} differ in {", ".join(differing)}')
        if len({result['seed'] for result in results.values()}) < len(results):
            refuse(f'{name}: two runs have the same seed')
    return ways


def top1(score):
    return 100 * score['correct1'] / score['n']


def spread(values):
    return f'{mean(values):.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')


def table(ways):
    rows = [('', 'network', 'top-1, last epoch', 'runs', 'top-1, best epoch', 'seconds per run')]
    for name, results in ways.items():
        runs = list(results.values())
        last, best = (spread([top1(run[which]) for run in runs]) for which in ('last', 'best'))
        rows.append((name, runs[0]['arguments']['arch'], last, str(len(runs)), best,
                     f'{mean(run["seconds"] for run in runs):.0f}'))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['| ' + ' | '.join(f'{cell:{width}}' for cell, width in zip(row, widths)) + ' |' for row in rows]
    return '\n'.join([lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:]])


def draw(ways, teacher):
    """The mean of each way in the band of its runs; the teacher's last epoch as a dashed line."""
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout='constrained')
    labels = []  # where a name belongs, the name, its colour
    for (name, runs), colour in zip(ways.items(), COLOURS * len(ways)):
        curves = [series(read_log(run), 'valid', 'top1') for run in runs]
        epochs, values = [epoch + 1 for epoch in curves[0][0]], list(zip(*(top1s for _, top1s in curves)))
        axes.plot(epochs, [mean(v) for v in values], color=colour)
        axes.fill_between(epochs, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
        labels.append((mean(values[-1]), name, colour))
    for name, results in teacher.items():
        score = top1(*(result['last'] for result in results.values()))
        axes.axhline(score, color='0.4', linestyle='--', linewidth=1.2)
        labels.append((score, name, '0.4'))
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', nargs='+', type=Path, metavar='OUT', help='folder of a finished run')
    parser.add_argument('--teacher', nargs=1, type=Path, default=[], metavar='OUT', help='the run of their teacher')
    parser.add_argument('-o', '--output', type=Path, default='comparison.png', metavar='PNG', help='(%(default)s)')
    args = parser.parse_args()
    ways, teacher = by_way(args.out), by_way(args.teacher)
    print(table(teacher | ways))
    try:
        draw(ways, teacher).savefig(args.output, dpi=150)
    except (OSError, ValueError) as error:  # no such folder, no such format
        refuse(f'{args.output}: {getattr(error, "strerror", None) or error}')


if __name__ == '__main__':
    main()
