"""The tables of CIFAR-100 and ImageNet as Markdown: what papers say beside what was measured here.

    python scripts/summarize.py                                   of the files in results/
    python scripts/summarize.py runs/cifar100/*-[0-9]*            of these runs, the tables they belong to
    python scripts/summarize.py --collect runs/cifar100/*-[0-9]*  of results/ after theirs are put there

Which cell a run belongs to is told by its --output, TABLE/METHOD-TEACHER-STUDENT-SEED or TABLE/base-NETWORK-SEED, as
cifar100.sh and imagenet.sh name it. published.json has what is published, with the labels that it should have had.
"""
import argparse
import json
import sys
from pathlib import Path
from statistics import mean

from logs import refuse
from ways import over_seeds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.args import NEUTRAL, completed

HERE = Path(__file__).resolve().parent
# arguments that runs of one cell may differ in; a teacher is known by its weights, wherever they lie
FREE = NEUTRAL | {'seed'}
# how all recipes see images
IMAGES = {'flip': 0.5, 'crop': 'resized', 'crop_area': 0.08, 'val_resize_size': None, 'mean': None, 'std': None}
# arguments that students of one architecture have in common, whatever the method
COMMON = ('dataset', 'image_size', 'epochs', 'schedule', 'lr_drop_epochs', 'lr_drop_ratio', 'warmup', 'momentum',
          'nesterov', 'weight_decay', 'no_bias_decay', 'label_smoothing', 'mixup', 'cutmix', 'auto_augment',
          'random_erasing', 'ema', 'crop_padding', 'warmup_epochs', 'warmup_by', 'clip_grad', 'amp', 'accum_steps',
          'sync_bn', *IMAGES)
# those of them that methods of a table with own_recipes set for themselves
OWN = ('epochs', 'lr_drop_epochs', 'lr_drop_ratio', 'warmup', 'nesterov', 'no_bias_decay')
# what the recipes of CIFAR's tables have in common
RECIPE = IMAGES | {'weight_decay': 5e-4, 'schedule': 'step', 'label_smoothing': 0, 'mixup': 0, 'cutmix': 0,
                   'auto_augment': 'off', 'random_erasing': 0, 'ema': 0}
APART = 'they belong into different tables (--results DIR)'
LEGEND = """Top-1 accuracy in %: *the paper's* / **our last epoch's**, mean ± standard deviation of the sample (seeds),
then our best test epoch's, then ours less the paper's: of the last epoch, or of the best where the paper's is the best.
Runs of another length than the paper's, on images that were seen otherwise, or on CIFAR with another decay or
augmentation, tell it instead. A dash was not run, or not published.
"""


def read(path):
    """The result in a run's folder or in a file of results/, with its place in a table; None if it is not finished."""
    file = path / 'result.json' if path.is_dir() else path
    try:
        run = {'finished': False} if path.is_dir() and not file.exists() else json.loads(file.read_text())
        if not run['finished']:
            print(f'note: {path} is not finished, and left out', file=sys.stderr)
            return None
        arguments = run['arguments'] = completed(run['arguments'])
        output = Path(arguments['output'])
        method, *networks, seed = output.name.split('-')
        run |= {'path': path, 'table': output.parent.name, 'method': method, 'pair': '-'.join(networks),
                'arch': arguments['arch'], 'teacher_arch': arguments['teacher_arch'],
                'top1': {which: 100 * run[which]['correct1'] / run[which]['n'] for which in ('last', 'best')}}
    except OSError as error:
        refuse(f'{file}: {error.strerror}')
    except (ValueError, KeyError, TypeError):
        refuse(f'{file} is not the result of a run that cifar100.sh or imagenet.sh has named')
    pair = [run['teacher_arch']] * ('distiller' in arguments) + [run['arch']]
    if len(networks) != (1 if method == 'base' else 2) or [*networks[-len(pair):], seed] != [*pair, str(run['seed'])]:
        refuse(f'{path} trained {run["arch"]} with seed {run["seed"]}, but was called {output.name}: its name is '
               f'METHOD-{"-".join(pair)}-{run["seed"]}, of a METHOD without a dash')
    if arguments['dummy']:
        refuse(f'{path} was trained on made-up images')
    return run


def groups(runs, *keys):
    """Lists of runs that have the same values of the keys."""
    found = {}
    for run in runs:
        found.setdefault(tuple(run[key] for key in keys), []).append(run)
    return found


def check(runs, tables):
    """Refuse to compare what was not trained alike."""
    for of_cell in groups(runs, 'table', 'method', 'pair').values():
        for run in of_cell[1:]:
            one, other = (protocol(r) for r in (of_cell[0], run))
            agree(of_cell[0], run, [key for key in one.keys() & other.keys() if one[key] != other[key]])
        for same in groups(of_cell, 'seed').values():
            if len(same) > 1:
                refuse(f'{same[0]["path"]} and {same[1]["path"]} have the same seed: {APART}')
    own = {table['runs'] for table in tables if table.get('own_recipes')}
    for run in runs:
        dataset = 'imagefolder' if run['table'] in own else 'cifar100'
        if run['table'] in {table['runs'] for table in tables} and run['arguments']['dataset'] != dataset:
            refuse(f'{run["path"]} is a run on {run["arguments"]["dataset"]}, and {run["table"]} a table of {dataset}')
    for (name, _), (first, *others) in groups(runs, 'table', 'arch').items():
        common = [key for key in COMMON if name not in own or key not in OWN]
        for run in others:
            agree(first, run, [key for key in common if first['arguments'][key] != run['arguments'][key]])
    for first, *others in groups([run for run in runs if 'images' in run], 'table').values():
        for run in others:
            agree(first, run, ['images'] * (first['images'] != run['images']))
    taught = [run for run in runs if run.get('teacher') and 'teacher' not in run['last']]  # else it has learned, too
    for first, *others in groups(taught, 'table', 'teacher_arch').values():
        for run in others:
            agree(first, run, ['teacher'] * (first['teacher'] != run['teacher']))


def protocol(run):
    """What runs of one cell have in common. Paths inside the run's own folder differ by the seed only."""
    arguments = {k: str(v).replace(run['arguments']['output'], '') for k, v in run['arguments'].items()}
    began = {'start_epoch': arguments.get('start_epoch'), 'student_resume': 'start' in run,
             'changed': run.get('changed', [])}
    return {k: v for k, v in arguments.items() if k not in FREE} | {'world_size': run['world_size']} | began


def agree(one, other, differing):
    if differing:
        refuse(f'{one["path"]} and {other["path"]} differ in {", ".join(sorted(differing))}: {APART}')


def cell(paper, epoch, epochs, runs):
    """epoch: which of ours the paper's is compared with; epochs: how long a method, or a network, is trained."""
    copied = '-' if paper is None else f'*{paper:.2f}*'
    if not runs:
        return copied if paper is None else f'{copied} / -'
    ours = {which: [run['top1'][which] for run in runs] for which in ('last', 'best')}
    text = f'{copied} / **{over_seeds(ours["last"])}** ({len(runs)}), best {over_seeds(ours["best"])}'
    run, arguments = runs[0], runs[0]['arguments']
    names = f'{run["method"]}-{run["pair"]}', run['method'], run['arch'], '*'
    if arguments['epochs'] != next((epochs[name] for name in names if name in epochs), None):
        return f'{text}, epochs: {arguments["epochs"]}'
    padding = {'crop_padding': 'reflect' if run['table'] == 'srd_dist' else 'zeros'}
    recipe = IMAGES if arguments['dataset'] == 'imagefolder' else RECIPE | padding
    if other := [f'{key}: {arguments[key]}' for key, value in recipe.items() if arguments[key] != value]:
        return f'{text}, {", ".join(other)}'
    comparable = paper is not None and epoch  # else it is not known which of ours it would be compared with
    return f'{text}, {mean(ours[epoch]) - paper:+.2f}' if comparable else text


def key_of(method, pair):
    """Which runs a row has under a pair: base and teachers are about one of the networks."""
    teacher, _, student = pair.rpartition('-')
    return {'base': ('base', student), 'teachers': ('base', teacher)}.get(method, (method, pair))


def belongs(run, table):
    return run['table'] == table['runs'] and run['pair'] in {
        *table['pairs'], *(network for pair in table['pairs'] for network in pair.split('-'))}


def show(table, sources, runs):
    """A table in Markdown; methods that were run and have no row get one."""
    cells = {(method, pair): some for (name, method, pair), some in groups(runs, 'table', 'method', 'pair').items()
             if name == table['runs']}
    known = {method for method, *_ in table['rows']}
    more = {method: [method, method, None, [None] * len(table['pairs'])] for method, pair in cells
            if method not in known and pair in table['pairs']}
    lines = [['method', '`METHOD`', 'source', *(pair.replace('-', ' → ') for pair in table['pairs'])],
             ['---'] * (3 + len(table['pairs']))]
    for method, label, source, papers in [*table['rows'], *more.values()]:
        epoch = sources[source]['epoch'] if source else 'last'
        lines.append([label, f'`{method}`', source or '-', *(
            cell(paper, epoch, table['epochs'], cells.get(key_of(method, pair)))
            for pair, paper in zip(table['pairs'], papers))])
    print(f'### {table["title"]}\n')
    print('\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n')
    origins = sorted({source for _, _, source, _ in table['rows'] if source})
    folders = sorted({str(run['path'].parent).removeprefix(f'{HERE.parent}/') for run in runs if belongs(run, table)})
    notes = [*table['notes'], *(f'{source}: {sources[source]["from"]}.' for source in origins),
             *(f'Logs: `{folder}/METHOD-TEACHER-STUDENT-SEED`, without a teacher `base-NETWORK-SEED`.'
               for folder in folders)]
    print('\n'.join(f'* {note}' for note in notes) + '\n')


def unpublished(tables, runs):
    """A table for the pairs of each TABLE that no published one has."""
    for name in dict.fromkeys(run['table'] for run in runs):
        known = {pair for table in tables if table['runs'] == name for pair in table['pairs']}
        pairs = dict.fromkeys(run['pair'] for run in runs
                              if run['table'] == name and run['method'] != 'base' and run['pair'] not in known)
        if pairs:
            rows = [[method, label, None, [None] * len(pairs)]
                    for method, label in (('teachers', 'teacher'), ('base', 'student alone'))]
            yield {'title': f'{name}: pairs without published numbers', 'runs': name, 'pairs': [*pairs], 'rows': rows,
                   'epochs': {}, 'notes': []}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='*', type=Path, metavar='RUN', help='folder of a run, or its file in results/')
    parser.add_argument('--collect', action='store_true', help='put the results of the runs into --results')
    parser.add_argument('--results', type=Path, default=HERE.parent / 'results', metavar='DIR', help='(results/)')
    args = parser.parse_args()

    named = [run for run in map(read, args.runs) if run]
    files = sorted(args.results.glob('*/*.json')) if args.collect or not args.runs else []
    stored = [run for run in map(read, files) if run]
    new = [run for run in named if run | {'path': 0} not in [other | {'path': 0} for other in stored]]
    published = json.loads((HERE / 'published.json').read_text())
    check(stored + new, published['tables'])
    if args.collect:
        for run in new:
            source, target = run['path'], args.results / run['table'] / f'{Path(run["arguments"]["output"]).name}.json'
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text((source / 'result.json' if source.is_dir() else source).read_text())
            run['path'] = target

    runs = stored + new
    tables = [*published['tables'], *unpublished(published['tables'], runs)]
    print(LEGEND)
    for table in tables:
        if args.collect or not args.runs or any(belongs(run, table) for run in runs):
            show(table, published['sources'], runs)
    for run in runs:
        if not any(belongs(run, table) for table in tables):
            print(f'note: {run["path"]} belongs to no table', file=sys.stderr)


if __name__ == '__main__':
    main()
