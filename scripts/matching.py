"""Draw the matching of an MGD run: who learns from whom, what it costs, how much of it changes over the epochs.

    python scripts/matching.py runs/NAME -o matching.png

A row of a matrix is a student channel with the teacher channels that it is given. Teacher channels are ordered by their
margins, student channels by the mean margin of theirs. That slants any matching, so a number says how much the margins
of a group are alike: 0 as by chance, 1 neighbours throughout. Also works on a run that still goes on.
"""
import argparse
import sys
from pathlib import Path

import torch
from logs import png, read_log, refuse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import checkpoint


def read_stages(run):
    """[(flow [g, sc], margins [tc])] of the newest checkpoint, shallow to deep, and the checkpoint's progress."""
    content, path = checkpoint.newest(run / 'checkpoint.pth')
    if content is None:
        refuse(f'{run} has no checkpoint.pth yet')
    state = content.get('distillers', {})
    n = sum(key.startswith('mgd.') and key.endswith('.flow') for key in state)
    if not n:
        refuse(f'{path} is of a run without MGD')
    return [[state[f'mgd.stages.{i}.{name}'] for name in ('flow', 'margins')] for i in range(n)], content['progress']


def read_history(run, progress):
    """[(epoch, a row of numbers per stage)] where the matching was updated, also in the epoch under way."""
    records = read_log(run) if (run / 'log.jsonl').exists() else []
    news = {record['epoch']: record['news'] for record in [*records, progress] if record.get('news')}
    return [(epoch, rows['mgd']) for epoch, rows in sorted(news.items()) if rows.get('mgd')]


def alike(ranks):
    """[g, sc] -> 1 - variance within groups / variance of all: the mean is 0 over random groups."""
    return 1 - (ranks.var(0).mean() / ranks.var()).item()


def place(flow, margins):
    """Where channels are drawn: [g, sc] teachers that are learned from, [sc] students, and teachers left over."""
    ranks = margins.argsort(stable=True).argsort()
    unused = torch.ones(len(margins), dtype=torch.bool).index_fill(0, flow.flatten(), False)
    return ranks[flow], margins[flow].double().mean(0).argsort(stable=True).argsort(), ranks[unused].sort().values


def draw_matrix(axes, flow, margins, name, colour):
    """A dot per pair, a line through each group, and below them the teacher channels that nobody learns from."""
    (g, sc), tc, (column, row, unused) = flow.shape, len(margins), place(flow, margins)
    axes.hlines(row, column.amin(0), column.amax(0), color='0.85', linewidth=min(100 / sc, 0.8), zorder=1)
    dots = axes.scatter(column, row.expand(g, sc), c=margins[flow], s=min(max(4000 / (g * sc), 1.5), 24), linewidths=0)
    axes.plot(unused, torch.full(unused.shape, -0.05 * sc), '|', color='0.55', markersize=4)
    told = f'{g} for each, {len(unused)} left over' + (f', alike by {alike(column.double()):.2f}' if g > 1 else '')
    axes.set_title(name, color=colour, y=1.06)
    axes.text(0, 1.02, told, transform=axes.transAxes, color='0.35')
    axes.set(xlabel=f'{tc} teacher channels, by margin', ylabel=f'{sc} student channels', xticks=[], yticks=[],
             xlim=(-0.02 * tc, 1.02 * tc), ylim=(-0.09 * sc, 1.03 * sc), box_aspect=1)
    bar = axes.figure.colorbar(dots, ax=axes, shrink=0.7, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.set_title('margin', fontsize=8, fontweight='normal', loc='center')


def draw(stages, history):
    """A matrix per stage, and below them what its updates cost and changed."""
    from plot import STYLE, MaxNLocator, matplotlib, plt  # here, as report.py reads and draws without them
    plt.rcParams.update(STYLE)
    n = len(stages)
    figure = plt.figure(figsize=(max(4 * n, 8), 7.5), layout='constrained')
    above, below = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    cost, changed = below.subplots(1, 2, sharex=True)
    colours = matplotlib.colormaps['plasma']([0.85 * i / max(n - 1, 1) for i in range(n)])
    for i, (matrix, stage, colour) in enumerate(zip(above.subplots(1, n, squeeze=False)[0], stages, colours)):
        name = f'Stage {i + 1} of {n}' + ', the deepest' * (0 < i == n - 1)
        draw_matrix(matrix, *stage, name, colour)
        for axes, key, factor in ((cost, 'cost', 1), (changed, 'changed', 100)):
            points = [(epoch, factor * rows[i][key]) for epoch, rows in history if rows[i][key] is not None]
            axes.plot(*(zip(*points) if points else ([], [])), color=colour, marker='o', markersize=3, label=name)
    cost.set_title('Mean cost of a pair, 2 - 2 cos')
    cost.legend()
    changed.set_title('Teacher channels that changed hands (%)')
    changed.set_ylim(-3, 103)
    if len(history) < 2:
        changed.text(0.5, 0.5, 'from the second matching on', transform=changed.transAxes, ha='center', color='0.5')
    for axes in (cost, changed):
        axes.set_xlabel('epoch')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', type=Path, metavar='RUN', help='folder of a run of main_distill.py --distiller mgd')
    parser.add_argument('-o', '--output', type=png, default='matching.png', metavar='PNG', help='(%(default)s)')
    args = parser.parse_args()

    stages, progress = read_stages(args.run)
    try:
        draw(stages, read_history(args.run, progress)).savefig(args.output, dpi=150)
    except (OSError, ValueError) as error:  # no such folder, no such format
        refuse(f'{args.output}: {getattr(error, "strerror", None) or error}')
    print(args.output)


if __name__ == '__main__':
    main()
