"""What came of some runs: a table, mean +- std over seeds, and a page that shows how it came about.

    python scripts/report.py runs/demo/alone-? runs/demo/mgd-? --teacher runs/demo/teacher -o report.html

Runs whose folders are called the same but for a number behind a dash are one way to train, with several seeds. Also of
runs that still go on: what is not there yet is left out, and the page reloads itself every 30 seconds. The teacher's
run is found beside the weights that its students were given, where it is not named.
"""
import argparse
from pathlib import Path
from statistics import mean

from logs import png, refuse
from report_page import Page
from ways import collect, table


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


def write(ways, teacher, path):
    """The page appears whole or not at all: a browser may be reading it."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        temporary.write_text(Page(ways, teacher).html())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', nargs='+', type=Path, metavar='OUT', help='folder of a run')
    parser.add_argument('--teacher', nargs=1, type=Path, default=[], metavar='OUT', help='the run of their teacher')
    parser.add_argument('-o', '--output', type=Path, default='report.html', metavar='HTML', help='(%(default)s)')
    parser.add_argument('--curves', type=png, metavar='PNG', help='draw the curves of top-1 as a picture, too')
    args = parser.parse_args()
    ways, teacher = collect(args.out, args.teacher)
    print(table(teacher + ways))
    file = args.output
    try:
        write(ways, teacher, file)
        if file := args.curves:
            draw(ways, teacher).savefig(file, dpi=150)
    except (OSError, ValueError) as error:  # no such folder, no such format, a full disk
        refuse(f'{file}: {getattr(error, "strerror", None) or error}')


if __name__ == '__main__':
    main()
