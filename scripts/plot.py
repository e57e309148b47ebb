"""Draw the learning curves of one or several runs, also of runs that still go on.

    python scripts/plot.py runs/resnet50 runs/mobilenet_v1 -o curves.png
"""
import argparse
import sys
from pathlib import Path

from logs import png, read_json, read_log, refuse, series

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
    'text.parse_math': False,  # a name may have two $ in it
}


def arch_of(out):
    return str((read_json(out / 'args.json') or {}).get('arch', out.resolve().name))


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
    parser.add_argument('-o', '--output', type=png, default='curves.png', metavar='PNG', help='(%(default)s)')
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
