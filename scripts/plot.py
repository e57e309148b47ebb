"""Draw the learning curves of one or several runs, also of runs that still go on.

    python scripts/plot.py runs/resnet50 runs/mobilenet_v1 -o curves.png
"""
import argparse
import json
import sys
from pathlib import Path

try:
    import matplotlib
    matplotlib.use('Agg')  # draws to files, needs no display
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
except ImportError:
    sys.stderr.write('plot.py needs matplotlib: pip install matplotlib\n')
    sys.exit(2)

STYLE = {
    'font.size': 9, 'axes.titlesize': 10, 'axes.titlelocation': 'left', 'axes.titleweight': 'bold',
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.edgecolor': '0.6', 'axes.grid': True,
    'grid.color': '0.92', 'xtick.color': '0.35', 'ytick.color': '0.35', 'legend.frameon': False, 'lines.linewidth': 1.6,
}


def refuse(line):
    print(line, file=sys.stderr)
    sys.exit(2)


def read_log(out):
    """The records of a run in the order of its epochs; of an epoch that was run again, the last."""
    path = out / 'log.jsonl'
    try:
        lines = path.read_text(errors='replace').splitlines()
    except OSError as error:
        refuse(f'{path}: {error.strerror}')
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record['lr'], record['train']['loss'], record['train']['top1']
            records[record['epoch']] = record
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # a half-written last line only means that the run is writing it
                refuse(f'{path}: line {number} is not the record of an epoch')
    if not records:
        refuse(f'{path}: no epoch yet')
    return [records[epoch] for epoch in sorted(records)]


def arch_of(out):
    try:
        return str(json.loads((out / 'args.json').read_text())['arch'])
    except (OSError, ValueError, KeyError, TypeError):
        return out.resolve().name


def series(records, split, key):
    """Epochs and values of those epochs that have the split: validation may be rare."""
    points = [(record['epoch'], record[split][key]) for record in records if record.get(split)]
    return tuple(zip(*points, strict=True)) or ((), ())


def draw(runs):
    """Three panels of runs, a list of (label, records): a colour per run, validation solid, training dashed."""
    plt.rcParams.update(STYLE)
    figure, (loss, top1, lr) = plt.subplots(
        1, 3, figsize=(12, 3.8), width_ratios=(1, 1, 0.7), layout='constrained')
    colours = matplotlib.colormaps['tab10' if len(runs) <= 10 else 'tab20'].colors
    handles = []
    for number, (label, records) in enumerate(runs):
        marker = 'o' if len(records) < 20 else ''
        style = {'color': colours[number % len(colours)], 'marker': marker, 'markersize': 3}
        for axes, key in ((loss, 'loss'), (top1, 'top1')):
            axes.plot(*series(records, 'train', key), **style, linestyle='--', alpha=0.55, linewidth=1.2)
            axes.plot(*series(records, 'valid', key), **style)
        lr.plot([record['epoch'] for record in records], [record['lr'] for record in records], **style)
        reached = series(records, 'valid', 'top1')[1]
        handles.append(Line2D([], [], **style, label=f'{label}, {max(reached):.1f} %' if reached else label))
    handles.append(Line2D([], [], color='0.4', label='validation, its best top-1'))
    handles.append(Line2D([], [], color='0.4', linestyle='--', alpha=0.55, linewidth=1.2, label='training'))
    for axes, title in ((loss, 'Loss'), (top1, 'Top-1 accuracy (%)'), (lr, 'Learning rate')):
        axes.set_title(title)
        axes.set_xlabel('epoch')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    lr.set_ylim(bottom=0)
    figure.legend(handles=handles, loc='outside lower center', ncols=min(len(handles), 5))
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', nargs='+', type=Path, metavar='OUT', help='folder of a run, with its log.jsonl')
    parser.add_argument('-o', '--output', type=Path, default='curves.png', metavar='PNG', help='(%(default)s)')
    args = parser.parse_args()

    labels = [arch_of(out) for out in args.out]
    runs = [(label if labels.count(label) == 1 else f'{label} ({out})', read_log(out))
            for label, out in zip(labels, args.out, strict=True)]
    try:
        draw(runs).savefig(args.output, dpi=150)
    except (OSError, ValueError) as error:  # no such folder, no such format
        refuse(f'{args.output}: {getattr(error, "strerror", None) or error}')
    print(args.output)


if __name__ == '__main__':
    main()
