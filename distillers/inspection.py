"""--inspect: what a run would do, what it would cost, and all that would stop it. No file is written, no weight kept.

The parts of a run are made as the scripts make them, one after the other. What cannot be made is a problem to list, and
something stands in for it (made-up images, random weights), so that the rest is looked at as well.
"""
import fcntl
import io
import os
import shutil
import sys
import textwrap
import warnings
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from utils import checkpoint, distributed, setup, together
from utils.cost import cut, device_name, loading, measure, memory, now, step
from utils.data import Prepare, load_data
from utils.engine import Supervised
from utils.meters import hits
from utils.optim import learning_rate, make_ema, make_optimizer, total_epochs
from utils.order import TrainOrder
from utils.randomness import seed_everything
from utils.run import Run
from utils.sources import Folder, load_source

from . import DISTILLERS
from .base import Distillation, evaluating, first_line, flag, from_flags, hyper_parameters, probe, probe_image
from .cache import TeacherCache
from .lean import lean_teacher
from .networks import build_student, build_teacher, identity

WIDTH = 112  # of what is printed
DECODED = 64  # images of each split
SCORED = {'cpu': 64, 'cuda': 256}  # images


class Findings:
    def __init__(self):
        self.problems, self.notes = [], []

    @contextmanager
    def listing(self, what: str = ''):
        """Where the block would end the run, note why and go on behind it; note what it prints, too."""
        said = io.StringIO()
        try:
            with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                yield
        except SystemExit as stop:
            said.write(f'\n{stop.code}')
        except Exception as error:  # whatever it is
            kind = '' if isinstance(error, (ValueError, OSError)) else f'{type(error).__name__}: '
            said.write(f'\nerror: {kind}{(str(error).strip() or type(error).__name__).splitlines()[0]}')
        for line in said.getvalue().split('\n'):
            if line.startswith('error: '):
                self.problems.append(what + line.removeprefix('error: '))
            elif len(line) > 1 and '\r' not in line:  # neither an exit code nor a progress bar
                self.notes.append(line.removeprefix('note: '))


class Unwritten(Run):
    """A run that leaves no file."""

    def save(self):
        pass

    def note(self, name, content):
        sys.exit('error: {what} is {value} in update {update} on one and the same batch'.format(**content)
                 if 'what' in content else 'error: stopped by a signal')


def worker(args, device):
    """In place of those of the scripts."""
    setup.configure(args, device)
    found, methods = Findings(), getattr(args, 'distiller', [])
    ranks, nodes = distributed.planned(args)
    batch_size = args.batch_size * nodes
    one = Namespace(**vars(args) | {  # what the one process here does: the part of one rank
        'batch_size': max(batch_size // ranks, 1), 'cache_dir': None, 'save_every': 0,
        'sync_bn': args.sync_bn and ranks == 1, 'gpu': device.index if ranks > 1 else args.gpu})
    print(f'{Path(sys.argv[0]).name} --inspect: nothing is trained, nothing is written')

    # the folder
    run = Unwritten(Namespace(**vars(args) | {'overwrite': True, 'resume': 'auto'}), device)
    for single in [together.alone(args, seed, device) for seed in args.seeds] if args.seeds else [args]:
        with found.listing():
            run = Unwritten(single, device)
        with found.listing():
            check_folder('--output', run.folder)

    # data
    train, sources = None, {}
    with found.listing():
        train, valid, classes = load_data(one, run.seed, device)
        sources = {'train': train.images.source, 'valid': valid.dataset.source}
    real = train is not None
    if not real:
        for split in ('train', 'valid'):
            with found.listing():
                sources[split] = load_source(args, split == 'train')
        classes = max((source.classes for source in sources.values()), key=len, default=outputs_of(args.teacher_resume))
        with found.listing():
            made_up = Namespace(**vars(one) | {'dummy': True, 'data': None, 'num_classes': None})
            train, valid, dummy = load_data(made_up, run.seed, device)
        classes = classes or dummy
        found.notes.append('made-up images stand in for the data')
    if sources:
        table('data', look_at_data(sources, args, found))
    outputs = args.num_classes or len(classes)
    prepare, prepare_mixed = Prepare(args, device), Prepare(args, device, mix_classes=outputs)

    # networks and their weights
    untrained = any(DISTILLERS[name].trains_teacher for name in methods)
    published = {'teacher': not (args.teacher_resume or args.dummy or untrained), 'student': args.pretrained}
    files = {'teacher': args.teacher_resume, 'student': args.student_resume}
    build = {'student': build_student, 'teacher': build_teacher}
    networks, origins, columns = {}, {}, {}
    for name in ['student', 'teacher'] if methods else ['student']:
        seed_everything(run.seed, name)
        for pretrained in dict.fromkeys([published[name], False]):
            with found.listing(f'{name}: '):
                network = build[name](args, outputs, pretrained, shows=bool(methods))
                columns[name] = look_at_network(network, args.image_size)
                networks[name] = setup.place(network, device, args)
                origins[name] = 'published' if pretrained else None
                break
        if files[name] and name in networks:
            with found.listing(f'{name}: '):
                checkpoint.load_weights(networks[name], files[name], classes if real and name == 'teacher' else None)
                origins[name] = files[name]
    student, teacher = (networks.get(name) for name in ('student', 'teacher'))

    # methods
    task = optimizer = made = None
    built = {}
    if methods and student and teacher:
        for name in methods:
            seed_everything(run.seed, 'distillers')
            with found.listing(f'{name}: {args.arch} under {args.teacher_arch}: '):
                built |= from_flags(DISTILLERS, [name], args, student, teacher)
        run.facts['teacher'] = identity(teacher, args)
        with found.listing():
            made = Distillation(student, distributed.replicated(teacher, device, one), built, args.ce_weight,
                                args.label_smoothing, args.logit_standardize).to(device)
            made.know(torch.tensor(train.images.source.targets, device=device) % outputs)
            if args.cache_teacher == 'off':
                made.stand_in = lean_teacher(made, teacher, device, one)
        with found.listing('--cache-teacher: '):
            if args.cache_teacher != 'off' and real:
                if args.cache_dir:
                    check_folder('--cache-dir', Path(args.cache_dir))
                made.stand_in = cache = TeacherCache(made.teacher, run.facts['teacher'], made.read_of_teacher(), train,
                                                     prepare, device, one)
                prepare_mixed = cache.prepare
                gigabytes = sum(held.values.nbytes for held in cache.tables.values()) / 1e9
                print(f'teacher cache: {" and ".join(cache.tables)}, {gigabytes:.2f} GB; times are those with it full')
    elif student and not methods:
        made = Supervised(student, args.label_smoothing)

    # what trains them, and where a run goes on from
    if made:
        network = made.shipped() if methods else student
        with found.listing():
            ema, task = make_ema(network, args), distributed.wrap(made, device, one)
            optimizer = make_optimizer(task, args)
            scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
            if len(built) < len(methods):
                run.saved = None  # would not fit, for a reason that is listed already
            elif run.saved:
                origins['student'] = run.origin
            run.restore(model=network, distillers=made.distillers if methods else None, optimizer=optimizer,
                        scaler=scaler, ema=ema, teacher=teacher if untrained else None)

    # what they know
    seconds = {}
    for name, network in networks.items():
        with found.listing(f'{name}: '):
            right, n, seconds[name] = score(network, valid, prepare, device, args)
            origin, chance = origins[name], 1 / len(classes)
            columns[name] |= {'weights': short(str(origin or 'random'))}
            if real:
                columns[name] |= {'top-1': f'{100 * right / n:.1f} % of {n} images (chance {100 * chance:.3g} %)'}
            if real and origin and right <= n * chance + 2 * (n * chance * (1 - chance)) ** 0.5:
                print(f'{name}: top-1 at the level of chance: wrong weights, images that are normalised otherwise, '
                      'another order of the classes, or a classifier that starts fresh')
    if columns:
        heads = [f'{name}: {args.teacher_arch if name == "teacher" else args.arch}' for name in columns]
        rows = dict.fromkeys(row for column in columns.values() for row in column)
        table('networks', [('', *heads), *((row, *(c.get(row, '') for c in columns.values())) for row in rows)])
    if made and methods:
        table('methods', look_at_methods(made, probe(student).maps, probe(teacher).maps, args))
    length = len(train.images) if real else batch_size
    order = TrainOrder(length, batch_size, args.accum_steps, run.seed, 0, ranks)
    table('schedule', look_at_schedule(order, real, run, args))
    check_ranks(order, nodes, student, train.loader, args, found)

    # what it costs
    if task and optimizer:
        how, rows = (task, train.images, prepare_mixed, optimizer, scaler, ema, run, device, one), []
        with found.listing('training: '):
            batch, load = loading(train, one, device)
            batch = batch._replace(target=batch.target % outputs, weight=1.0)
            cost = measure(batch, how, device) | {'load': load, 'evaluation': seconds['student']}
            if methods:
                pairs = min(args.pair_images, length) / ranks
                cost |= preparation(made, train, prepare, pairs, cost['images'], device)
            n = len(batch.target)
            rows = look_at_cost(cost, n, order, len(valid.dataset) if real else 0, train.loader, run, args)
            check_disk(run)
        if rows:
            table(f'cost of a batch of {n} images here, {device_name(device)}'
                  + f'; measured with {cost["images"]} of them, scaled' * (cost['images'] < n), rows)
        if real and 0 < length % batch_size < 2 * ranks and one.batch_size > 1:
            with found.listing('training, on the last batch of an epoch, of which a rank has 1 image: '):
                step(cut(batch, 1), *how)

    for title, texts in (('notes', found.notes), ('problems', found.problems)):
        if texts:
            table(title, [('-', text) for text in dict.fromkeys(texts)])
    if found.problems:
        sys.exit(1)
    print('\nno problem found')


# What there is

def look_at_data(sources: dict, args, found: Findings) -> list[tuple]:
    columns = []
    for split, source in sources.items():
        sizes, modes, broken = [], Counter(), []
        picked = spread(len(source), DECODED)
        for index in picked:
            try:
                image, _ = source.load(index)
                sizes.append(image.size if isinstance(image, Image.Image) else tuple(image.shape[:0:-1]))
                if isinstance(source, Folder):
                    with Image.open(source.name(index)) as file:
                        modes[file.mode] += 1
            except Exception as error:  # whatever a decoder makes of a broken file
                broken.append(f'{split}: {source.name(index)} cannot be read: {error}')
        expected = len(broken) * len(source) / max(len(picked), 1)
        if split == 'valid' or expected > args.max_bad_images:
            found.problems += broken
        else:  # in training others stand in for them
            found.notes += broken
        counts = dict.fromkeys(source.classes, 0) | Counter(source.classes[target] for target in source.targets)
        least, most = (f(counts, key=counts.get) for f in (min, max))
        sides = ['/'.join(f'{f(side):g}' for f in (min, median, max)) for side in zip(*sizes)] or ['-', '-']
        columns.append((split, f'{len(source):,}', str(len(source.classes)), f'{counts[least]:,} ({short(least)})',
                        f'{counts[most]:,} ({short(most)})', str(len(picked)), *sides,
                        ', '.join(f'{mode} {number}' for mode, number in modes.most_common()) or '-', str(len(broken))))
    names = ('', 'images', 'classes', 'smallest class', 'largest class', 'decoded', 'width (min/median/max)',
             'height', 'mode', 'unreadable')
    return list(zip(names, *columns))


@torch.no_grad()
def look_at_network(network: nn.Module, image_size: int) -> dict[str, str]:
    """What one image shows. Multiplications are those of convolutions and linear layers, not those of attention."""
    network.image_size, macs = image_size, 0

    def add(module, inputs, output):
        nonlocal macs
        macs += (inputs[0] if isinstance(module, nn.ConvTranspose2d) else output).numel() * module.weight[0].numel()

    handles = [m.register_forward_hook(add) for m in network.modules()
               if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    shows = hasattr(network, 'feature_channels')
    with evaluating(network):
        seen = network(probe_image(network), **{'features': True} if shows else {})
    for handle in handles:
        handle.remove()
    rows = {'parameters': f'{count(network):,}', f'MACs at {image_size}': f'{macs / 1e6:,.1f} M'}
    if not shows:
        return rows | {'logits': shape(seen)}
    for i, (before, f, norm) in enumerate(zip(seen.preact, seen.maps, network.feature_norms)):
        rows[f'stage {i}'] = (f'{shape(f)}, stride {image_size / f.shape[-1]:g}, {type(norm).__name__ if norm else "-"}'
                              + ', no ReLU' * (before is f))
    return rows | {'head': shape(seen.head), 'pooled': shape(seen.pooled), 'logits': shape(seen.logits)}


def look_at_methods(made: Distillation, maps_s: list, maps_t: list, args) -> list[tuple]:
    rows = [('ce', f'weight {made.ce_weight:g}')]
    for name, method in made.distillers.items():
        rows.append((name, first_line(type(method))))
        rows += [('', f'stage {i} of the student, {shape(maps_s[i])}, and {j} of the teacher, {shape(maps_t[j])}')
                 for i, j in method.pairing]
        given = [f'{flag(name, key)} {value}' for key, (parameter, _) in hyper_parameters(type(method)).items()
                 if (value := getattr(args, f'{name}_{key}')) != parameter.default]
        rows.append(('', f'{" ".join(given) or "flags at their defaults"}; {count(method):,} parameters of its own to '
                         f'train; {size(dict(method.named_buffers())) / 1e6:.2f} MB of buffers'))
    return rows


def look_at_schedule(order: TrainOrder, real: bool, run: Run, args) -> list[tuple]:
    epochs, first = total_epochs(args), run.progress['epoch']
    rates = [f'{learning_rate(epoch, args):.4g}' for epoch in range(epochs)]
    changes = [epoch for epoch in range(epochs) if epoch == 0 or rates[epoch] != rates[epoch - 1]]
    if len(changes) > 12:
        peak = args.warmup_epochs * args.warmup
        changes = sorted({peak, changes[-1], *(changes[i] for i in spread(len(changes), 10))})
    rows = [('batch', f'{order.batch * order.accum:,} images per update = {order.batch / order.world:g} x '
                      f'{order.world} ranks x {order.accum} batches'),
            ('epochs', f'{epochs}' + f', {args.warmup_epochs} of them warm-up' * args.warmup
                       + f'; goes on from epoch {first}' * (first > 0)),
            ('rate', ', '.join(f'{rates[epoch]} from epoch {epoch}' for epoch in changes)), ('seed', str(run.seed))]
    if real:
        rows.insert(1, ('updates', f'{order.updates():,} per epoch, {order.updates() * epochs:,} in all'))
    return rows


def look_at_cost(cost: dict, n: int, order: TrainOrder, scored: int, loader, run: Run, args) -> list[tuple]:
    """scored: validation images; 0 where there are no data, and epochs of no known length."""
    device, load = run.device, cost['load']
    apart = isinstance(loader, DataLoader) and args.workers > 0 and device.type == 'cuda'

    def both(loading, computing):  # on a CPU they want the same cores
        return max(loading, computing) if apart else loading + computing

    names = {'load': f'loader, {args.workers} workers' if isinstance(loader, DataLoader) else 'data, on the device',
             'teacher': 'teacher forward', 'student': 'student forward', 'losses': 'losses', 'backward': 'backward',
             'rest': 'optimizer and the rest', 'step': 'a step in all'}
    rows = [(text, f'{1e3 * cost[name]:,.1f} ms') for name, text in names.items() if name in cost]
    batch = both(load, cost['step'] - cost['rest'] * (1 - 1 / order.accum))
    rows += [('speed', f'{n / batch:,.1f} images/s per rank, {n / batch * order.world:,.1f} in all'),
             ('bottleneck', f'{"the loader" if load > cost["step"] else "the step"}: alone, the loader makes '
                            f'{n / load:,.1f} images/s, the step {n / cost["step"]:,.1f}'),
             ('peak memory', f'{cost["peak"] / 1e9:.2f} GB of {memory(device) / 1e9:.1f} GB'
                             + f', with {cost["images"]} images' * (cost['images'] < n))]
    if scored:
        left = total_epochs(args) - run.progress['epoch']
        epoch, evaluation = len(order) * batch, scored / order.world * both(load / n, cost['evaluation'])
        first, each = cost.get('first', 0), cost.get('each', 0)
        if first:
            rows.append(('methods', f'{duration(first)} before the first epoch'
                         + f', {duration(each)} before others' * (each > 0)))
        rows += [('an epoch', f'{duration(epoch)} training, {duration(evaluation)} evaluation'),
                 ('the run', f'{duration(first + (left - 1) * each + left * (epoch + evaluation))} for {left} epochs')]
    weights, whole = run_files(run)
    return [*rows, ('on disk', f'{whole / 1e6:,.1f} MB per checkpoint, {weights / 1e6:,.1f} MB per file of weights')]


# What would stop it

def check_folder(flag: str, folder: Path):
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        sys.exit(f'error: cannot write to {flag} {folder}: {there} is {"read-only" if there.is_dir() else "no folder"}')
    if (folder / '.lock').exists():
        try:
            with open(folder / '.lock', 'r+') as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f'error: another run is writing to {folder}')


def check_ranks(order: TrainOrder, nodes: int, student: nn.Module | None, loader, args, found: Findings):
    if order.batch < order.world:
        found.problems.append(f'a batch of {order.batch} is smaller than the number of ranks, {order.world}')
    elif order.batch // order.world == 1 and not args.sync_bn and student and any(
            isinstance(m, _BatchNorm) for m in student.modules()):
        found.problems.append('BatchNorm takes its statistics from 1 image per rank: a larger batch, or fewer ranks')
    workers, cores = args.workers * order.world // nodes, os.cpu_count()
    if isinstance(loader, DataLoader) and workers > cores:
        found.notes.append(f'{workers} loader processes share {cores} cores: -j {max(cores * nodes // order.world, 1)} '
                           'may be faster')


def check_disk(run: Run):
    """While a checkpoint is written, the one before it and the one before that are there, too; so with weights."""
    weights, whole = run_files(run)
    there = next(path for path in (run.folder.absolute(), *run.folder.absolute().parents) if path.exists())
    if (needed := 3 * whole + 3 * weights) > (free := shutil.disk_usage(there).free):
        sys.exit(f'error: checkpoints need {needed / 1e9:.2f} GB, and {there} has {free / 1e9:.2f} GB free')


def run_files(run: Run) -> tuple[int, int]:
    """Bytes of the weights alone, and of a checkpoint."""
    return size(run.shipped().state_dict()), sum(size(part.state_dict()) for part in run.parts.values())


# Measurements

@torch.no_grad()
def score(network: nn.Module, valid, prepare, device, args) -> tuple[int, int, float]:
    """How many of some validation images are right, of how many, and seconds per image."""
    valid.batch_sampler.samples = spread(len(valid.dataset), SCORED[device.type])
    right, n, seconds = 0, 0, []
    with evaluating(network):
        for batch in valid:
            ready, began = prepare(batch), now(device)
            with setup.precision(device, args.amp):
                logits = network(ready.images)
            seconds.append((now(device) - began) / len(logits))
            right += hits(logits, ready.target % logits.shape[1])[0].item()
            n += len(logits)
    return right, n, median(seconds)


def preparation(made: Distillation, train, prepare, pairs: float, some: int, device) -> dict[str, float]:
    """Seconds of what methods do with some pairs of images before the first and the next epoch, scaled to all pairs."""
    seconds = []
    for epoch in (1, 2):
        looks, began = [], now(device)

        def look():
            looks.append(1)  # noqa: B023
            return map(prepare, train.sample(0, some))
        news = made.start_epoch(epoch, look)
        fixed = sum(row.get('seconds', 0.0) for rows in news.values() for row in rows)
        seconds.append(fixed + (now(device) - began - fixed) * pairs / some if looks else 0.0)
    return dict(zip(('first', 'each'), seconds))


# Words and numbers

def table(title: str, rows: list[tuple]):
    """Columns of text; the last one wraps."""
    print(f'\n{title}')
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        left = '  ' + ''.join(f'{cell:{width}}  ' for cell, width in zip(row, widths))
        print(textwrap.fill(row[-1], WIDTH, initial_indent=left, subsequent_indent=' ' * len(left)) or left)


def short(text: str) -> str:
    return text if len(text) <= 40 else f'...{text[-37:]}'


def shape(x: torch.Tensor) -> str:
    return ' x '.join(map(str, x.shape[1:]))


def duration(seconds: float) -> str:
    return f'{seconds:.1f} s' if seconds < 60 else str(timedelta(seconds=round(seconds)))


def spread(length: int, some: int) -> list[int]:
    some = min(length, some)
    return [i * length // some for i in range(some)]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def size(content) -> int:
    """Bytes of the tensors in a state dict."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return sum(map(size, parts))


def outputs_of(path: str | None) -> range | None:
    """Numbers of the classes that a file of weights knows, if the last of them tell."""
    try:
        return range(len(list(checkpoint.weights_of(checkpoint.read(Path(path)), path).values())[-1]))
    except (TypeError, ValueError):
        return None
