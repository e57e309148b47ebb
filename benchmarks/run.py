"""Measure this project against plain formulations of the same, and against other projects.

    python benchmarks/run.py                         everything, on a CPU
    python benchmarks/run.py mgd-step --device cuda  one case, on a GPU
    python benchmarks/run.py --peers ~/checkouts     also against KaiyuYue/mgd, megvii-research/mdistiller and
                                                     yoshitomo-matsubara/torchdistill in ~/checkouts/mgd and so on

Before a speed is printed, the results are compared. Exits with 1 where they differ or a goal is missed.
"""
import argparse
import json
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import CASES, peers
from benchmarks.harness import METRICS, ROOT, Case, Limit, Mismatch, Outcome, Settings, measure
from utils.run import git_revision
from utils.setup import device_name

LINE = '{:<16} {:<20} {:<20} {:>5} {:>8} {:>8} {:>2} {:>9} {:>6} {:>13} {:>7}  {}'
HEAD = LINE.format('case', 'variant', 'against', 'in', 'ours', 'baseline', '', '', 'median', 'IQR', 'goal', '')


def main(cases=CASES, arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('cases', nargs='*', metavar='CASE', help=f'of {", ".join(cases)} (default: all)')
    parser.add_argument('--device', default='cpu', metavar='D', help='cpu or cuda')
    parser.add_argument('--threads', type=int, default=1, metavar='N', help='of the process')
    parser.add_argument('--rounds', type=int, default=9, metavar='N', help='after one that does not count')
    parser.add_argument('--batch', type=int, metavar='N',
                        help="images at once (default: a case's own; those of CIFAR keep theirs)")
    parser.add_argument('--peers', type=Path, metavar='DIR', help='folder with checkouts of other projects')
    parser.add_argument('--output', type=Path, default=ROOT / 'runs' / 'bench', metavar='DIR',
                        help='folder for bench.json and bench.png')
    args = parser.parse_args(arguments)
    for name in args.cases:
        if name not in cases:
            parser.error(f'there is no case {name}, but {", ".join(cases)}')
    if args.rounds < 1 or (args.batch or 1) < 1:
        parser.error('--rounds and --batch have to be at least 1')
    settings = Settings(torch.device(args.device), args.threads, args.peers and args.peers.expanduser().resolve(),
                        args.batch)

    facts = {'command': command(), 'time': datetime.now().isoformat(timespec='seconds'),
             'device': device_name(settings.device), 'threads': args.threads, 'rounds': args.rounds,
             'git': git_revision(), 'versions': versions()}
    if args.peers:
        facts['peers'] = {name: peers.revision(settings, name) for name in peers.PEERS
                          if peers.available(settings, name)}
    print(*(f'{key}: {value}' for key, value in facts.items()), sep='\n')
    print(f'\n{HEAD}', flush=True)

    began = time.monotonic()
    found = alone(args.cases or list(cases), cases, settings, args.rounds)
    facts['seconds'] = round(time.monotonic() - began)
    records = [record for rows in found for record in rows or []]
    write(args.output, facts, records)
    return 0 if None not in found and all(record['reached'] for record in records) else 1


def alone(names: list[str], cases, settings: Settings, rounds: int) -> list[list[dict] | None]:
    """Several cases get a process each, so that none begins with the memory that another has freed."""
    if len(names) == 1:
        return [one(cases[names[0]], names[0], settings, rounds)]
    found = []
    for name in names:
        with ProcessPoolExecutor(1, get_context('spawn')) as pool:
            found.append(pool.submit(one, cases[name], name, settings, rounds).result())
    return found


def one(make, name: str, settings: Settings, rounds: int) -> list[dict] | None:
    """The records of a case; None where its variants do not come to the same."""
    torch.set_num_threads(1)  # a process that has worked with several must not be forked
    try:
        case = make(settings)
        outcomes = measure(case, settings, rounds)
        torch.set_num_threads(settings.threads)
        return show(name, case, outcomes)
    except Mismatch as error:
        print(f'{name:<16} MISMATCH {error}', flush=True)
        return None


def show(name: str, case: Case, outcomes: list[Outcome]) -> list[dict]:
    """Print the rows of a case and return them for the record."""
    records = []
    limit = case.limit() if case.limit else Limit('')
    for outcome in outcomes:
        row, ratios = outcome.row, outcome.ratios
        low, median, high = np.percentile(ratios, (25, 50, 75))
        ours, baseline = np.median(outcome.ours), np.median(outcome.baseline)
        facts = case.facts.get(row.variant, {})
        if row.variant in limit.least:
            facts = {'times its limit': round(ours / limit.least[row.variant], 2)} | facts
        goal, verdict = '', [f'{key}: {value}' for key, value in facts.items()]
        if row.goal is not None:
            goal = f'{">=" if METRICS[row.metric][1] else "<="} {row.goal}'
            verdict = ['ok' if outcome.reached else 'MISSED', *verdict]
        print(LINE.format(name, row.variant, row.baseline, outcome.precision, figures(ours), figures(baseline),
                          case.unit, row.metric, f'{median:.2f}', f'{low:.2f} .. {high:.2f}', goal, ', '.join(verdict)))
        records.append({'case': name, **row._asdict(), 'precision': outcome.precision, 'unit': case.unit,
                        'ours': outcome.ours, 'against': outcome.baseline, 'error': outcome.error, 'ratio': median,
                        'quartiles': [low, high], 'reached': outcome.reached, 'limit': limit.what, **facts})
    measured = {outcome.row for outcome in outcomes}
    for row in case.rows:
        if row not in measured and row.variant in case.variants and row.baseline in case.variants:
            print(f'{name:<16} {row.variant:<20} skipped: this machine has no instructions for its precision')
    errors = [outcome.error for outcome in outcomes if np.isfinite(outcome.row.tolerance)]
    if errors:
        print(f'{"":<16} equal results, up to {max(errors):.0e} of their mean magnitude')
    if limit.what:
        print(f'{"":<16} limit: {limit.what}')
    for line in case.skipped:
        print(f'{"":<16} skipped: {line}')
    sys.stdout.flush()
    return records


def figures(value: float) -> str:
    """Three at least."""
    return f'{value:.0f}' if value >= 100 else f'{value:.3g}'


def command() -> list[str]:
    """As it is given from the project's folder; with -m Python tells the whole path."""
    return [os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]


def versions() -> dict:
    import ortools
    import torchvision
    return {'python': platform.python_version(), 'torch': torch.__version__, 'torchvision': torchvision.__version__,
            'ortools': ortools.__version__, 'numpy': np.__version__}


def write(folder: Path, facts: dict, records: list[dict]):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'bench.json', 'w') as file:
        json.dump(facts | {'rows': records}, file, indent=1, default=str)
    try:
        import matplotlib
        matplotlib.use('Agg')
        from matplotlib import pyplot as plt
    except ImportError:
        print(f'\n{folder / "bench.json"}; a chart needs matplotlib')
        return
    figure, axes = plt.subplots(figsize=(8, 1 + 0.35 * len(records)), layout='constrained')
    places = range(len(records))
    axes.barh(places, [r['ratio'] for r in records], color=['tab:blue' if r['reached'] else 'tab:red' for r in records])
    goals = np.array([r['goal'] for r in records], float)  # None becomes NaN, which is not drawn
    axes.vlines(goals, [p - 0.45 for p in places], [p + 0.45 for p in places], color='black')
    axes.set_yticks(places, [f'{r["case"]}: {r["variant"]} / {r["baseline"]} ({r["metric"]})' for r in records])
    axes.invert_yaxis()
    axes.set_title(f'{facts["device"]}; black: goal')
    figure.savefig(folder / 'bench.png', dpi=120)
    plt.close(figure)
    print(f'\n{folder / "bench.json"}, {folder / "bench.png"}')


if __name__ == '__main__':
    sys.exit(main())
