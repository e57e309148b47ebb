"""--inspect: what a run would do, what it would cost, and all that would stop it. No file is written, no weight kept.

The parts of a run are made as the scripts make them, one after the other. What cannot be made is a problem to list, and
something stands in for it (made-up images, random weights), so that the rest is looked at as well. looks.py makes the
tables.
"""
import io
import os
import shutil
import sys
import warnings
from argparse import Namespace
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from models.errors import line
from utils import checkpoint, distributed, setup, together
from utils.closely import now
from utils.cost import cut, loading, measure, preparation, step
from utils.data import Prepare, bad_allowed, contents, load_data
from utils.engine import Supervised, parts
from utils.folder import refuse_harm, take
from utils.meters import hits
from utils.optim import make_ema, make_optimizer
from utils.order import TrainOrder, spread
from utils.randomness import seed_everything
from utils.run import Run
from utils.sources import load_source

from . import DISTILLERS, looks
from .base import Distillation, evaluating, probe
from .cache import TeacherCache
from .flags import from_flags
from .lean import lean_teacher
from .networks import at_chance, build_student, build_teacher, identity

SCORED = {'cpu': 64, 'cuda': 256}  # images
TOLD = 4  # unreadable images of a split


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
            said.write(f'\nerror: {kind}{line(error)}')
        for told in said.getvalue().split('\n'):
            if told.startswith('error: '):
                self.problems.append(what + told.removeprefix('error: '))
            elif len(told) > 1 and '\r' not in told:  # neither an exit code nor a progress bar
                self.notes.append(told.removeprefix('note: '))

    def tell(self):
        for title, texts in (('notes', self.notes), ('problems', self.problems)):
            if texts:
                looks.table(title, [('-', text) for text in dict.fromkeys(texts)])
        if self.problems:
            sys.exit(1)
        print('\nno problem found')


class Unwritten(Run):
    """A run that leaves no file."""

    def save(self):
        pass

    def note(self, name, content):
        sys.exit('error: {what} is {value} in update {update} on one and the same batch'.format(**content)
                 if 'what' in content else 'error: stopped by a signal')


def worker(args, device):
    """In place of those of the scripts."""
    found, methods = Findings(), getattr(args, 'distiller', [])
    if args.seeds:  # which share one GPU
        args.gpu = device.index
    asked = args.cuda_graph
    if problem := setup.no_graph(args, device):
        found.problems.append(problem)
        args.cuda_graph = False
    setup.configure(args, device)
    ranks, nodes = distributed.planned(args)
    batch_size = args.batch_size * nodes
    one = Namespace(**vars(args) | {  # what the one process here does: the part of one rank
        'batch_size': max(batch_size // ranks, 1), 'cache_dir': None, 'save_every': 0,
        'sync_bn': args.sync_bn and ranks == 1, 'gpu': device.index if ranks > 1 else args.gpu})
    print(f'{Path(sys.argv[0]).name} --inspect: nothing is trained, nothing is written')
    if args.sync_bn and device.type != 'cuda':
        found.problems.append('--sync-bn needs GPUs')

    run = find_run(Namespace(**vars(args) | {'cuda_graph': asked}), device, found)
    train, valid, classes, real = find_data(args, one, run.seed, device, found)
    if real:
        run.facts['images'] = contents(train, valid)
    outputs = args.num_classes or len(classes)
    prepare, prepare_mixed = Prepare(args, device), Prepare(args, device, mix_classes=outputs)

    networks, origins, columns = find_networks(args, outputs, classes if real else None, run, device, found)
    student, teacher = networks.get('student'), networks.get('teacher')
    if student and args.student_resume:
        run.facts['start'] = checkpoint.fingerprint(student)

    # methods
    task = optimizer = made = None
    built = {}
    if methods and student and teacher:
        for name in methods:
            seed_everything(run.seed, 'distillers')
            with found.listing(f'{args.arch} under {args.teacher_arch}: '):
                built |= from_flags(DISTILLERS, [name], args, student, teacher)
        run.facts['teacher'] = identity(teacher, args)
        with found.listing():
            made = Distillation(student, distributed.replicated(teacher, device, one), built, args.ce_weight,
                                args.label_smoothing, args.logit_standardize).to(device)
            made.know(torch.tensor(train.images.source.targets, device=device) % outputs)
            if unreached := made.freeze_unreached():
                print(f"{unreached:,} of the student's parameters are in no loss, and stay as they are")
            if args.cache_teacher == 'off':
                made.stand_in = lean_teacher(made, teacher, device, one)
            if args.teacher_stream:
                made.teach_beside(device)
        with found.listing():
            if made and args.cache_teacher != 'off' and real:
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
            ema, task = make_ema(network, args), distributed.wrap(setup.compiled(made, one), device, one)
            optimizer = make_optimizer(task, args)
            scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
            if len(built) < len(methods):
                run.saved = None  # would not fit, for a reason that is listed already
            elif run.saved:
                origins['student'] = run.origin
            run.restore(model=network, distillers=made.distillers if methods else None, optimizer=optimizer,
                        scaler=scaler, ema=ema, teacher=teacher if methods and made.trains_teacher else None)

    # what they know
    seconds = {}
    for name, network in networks.items():
        with found.listing(f'{name}: '):
            right, n, seconds[name] = score(network, valid, prepare, device, args)
            columns[name]['weights'] = looks.short(str(origins[name] or 'random'))
            if real:
                chance = 1 / len(classes)
                columns[name]['top-1'] = f'{100 * right / n:.1f} % of {n} images (chance {100 * chance:.3g} %)'
                if origins[name] and at_chance(right, n, len(classes)):
                    print(f'{name}: top-1 at the level of chance: wrong weights, images that are normalised otherwise, '
                          'another order of the classes, or a classifier that starts fresh')
    if columns:
        looks.table('networks', looks.side_by_side(columns, args))
    if made and methods:
        looks.table('methods', looks.at_methods(made, probe(student).maps, probe(teacher).maps, args))
    length = len(train.images) if real else batch_size
    order = TrainOrder(length, batch_size, args.accum_steps, run.seed, 0, ranks)
    looks.table('schedule', looks.at_schedule(order, real, run, args))
    check_ranks(order, nodes, student, train.loader, args, found)

    # what it costs
    if task and optimizer:
        how, rows = (task, train.images, prepare_mixed, optimizer, scaler, ema, run, device, one), []
        with found.listing('training: '):
            batch, load = loading(train, one, device)
            batch = batch._replace(target=batch.target % outputs, weight=1.0)
            n, cost = len(batch.target), {'load': load, 'evaluation': seconds['student']}
            if methods:  # before the updates, as in the run
                cost |= preparation(made, train, prepare, min(args.pair_images, length) / ranks, n, load / n, device)
            reached = set()
            for p in task.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(reached.add)
            cost |= measure(batch, how, device)
            if ranks > 1 and (idle := [name for name, p in made.named_parameters()
                                       if p.requires_grad and p not in reached]):
                found.problems.append(f'training over several ranks: {len(idle)} parameters are in no loss, such as '
                                      f'{idle[0]}: freeze them where the network is made, by requires_grad_(False)')
            rows = looks.at_cost(cost, n, order, len(valid.dataset) if real else 0, train.loader, run, args)
            check_disk(run)
        if rows:
            looks.table(f'cost of a batch of {n} images here, {setup.device_name(device)}'
                        + f', {torch.get_num_threads()} threads' * (device.type == 'cpu')
                        + f'; measured with {cost["images"]} of them, scaled' * (cost['images'] < n), rows)
        if real and 0 < length % batch_size < 2 * ranks and one.batch_size > 1 and not args.sync_bn:
            with found.listing('training, on the last batch of an epoch, of which a rank has 1 image: '):
                step(cut(batch, 1), *how)

    found.tell()


# The parts of a run

def find_run(args, device, found: Findings) -> Run:
    """The last of those with --seeds."""
    run = Unwritten(Namespace(**vars(args) | {'overwrite': True, 'resume': 'auto'}), device)
    for single in [together.alone(args, seed, device) for seed in args.seeds] if args.seeds else [args]:
        with found.listing():
            run = Unwritten(single, device)
        with found.listing():
            check_folder('--output', run.folder)
        with found.listing():
            refuse_harm(run.folder, args)
    return run


def find_data(args, one, seed, device, found: Findings) -> tuple:
    """Training data, a loader for the evaluation, the classes, and whether these are the data that were asked for."""
    train, sources = None, {}
    with found.listing():
        train, valid, classes = load_data(one, seed, device)
        sources = {'train': train.images.source, 'valid': valid.dataset.source}
    real = train is not None
    if not real:
        for split in ('train', 'valid'):
            with found.listing():
                sources[split] = load_source(args, split == 'train')
        with found.listing():
            made_up = Namespace(**vars(one) | {'dummy': True, 'data': None, 'num_classes': None})
            train, valid, classes = load_data(made_up, seed, device)
        if args.teacher_resume:
            with suppress(ValueError):  # is listed where its weights are loaded
                file = Path(args.teacher_resume)
                classes = range(checkpoint.outputs_of(checkpoint.read(file), file))
        classes = max((source.classes for source in sources.values()), key=len, default=classes)
        found.notes.append('made-up images stand in for the data')
    if sources:
        rows, wrong = looks.at_data(sources)
        looks.table('data', rows)
        check_images(wrong, sources, args, found)
    return train, valid, classes, real


def find_networks(args, outputs, classes: list[str] | None, run, device, found: Findings) -> tuple[dict, dict, dict]:
    """By name those that can be made, where their weights are from, and what is to be told of them."""
    methods = getattr(args, 'distiller', [])
    learns = any(DISTILLERS[name].trains_teacher for name in methods)
    wanted = {'student': (build_student, run.needs_published(), args.student_resume, f'--arch {args.arch}', None)}
    if methods:
        wanted['teacher'] = (build_teacher, not (args.teacher_resume or args.dummy or learns), args.teacher_resume,
                             f'--teacher-arch {args.teacher_arch}', classes)
    networks, origins, columns = {}, {}, {}
    for name, (build, published, file, flag, known) in wanted.items():
        seed_everything(run.seed, name)
        for pretrained in dict.fromkeys([published, False]):
            with found.listing(f'{name}: '):
                network = build(args, outputs, pretrained, shows=bool(methods))
                columns[name] = looks.at_network(network, args.image_size)
                networks[name] = setup.place(network, device, args)
                origins[name] = 'published' if pretrained else None
                break
        if file and name in networks:
            with found.listing(f'{name}: '):
                checkpoint.load_weights(networks[name], file, flag, known)
                origins[name] = file
    return networks, origins, columns


@torch.no_grad()
def score(network: nn.Module, valid, prepare, device, args) -> tuple[int, int, float]:
    """How many of some validation images are right, of how many, and seconds per image."""
    valid.batch_sampler.samples = spread(len(valid.dataset), SCORED[device.type])
    right, n, seconds = 0, 0, []

    def guess(images):
        with setup.precision(device, args.amp):
            return torch.cat([network(some) for some in parts(images)])

    with evaluating(network):
        for batch in valid:
            ready = prepare(batch)
            if not seconds:
                guess(ready.images)  # the first time it is compiled, or kernels are chosen
            began = now(device)
            logits = guess(ready.images)
            seconds.append((now(device) - began) / len(logits))
            right += hits(logits, ready.target % logits.shape[1])[0].item()
            n += len(logits)
    return right, n, median(seconds)


# What would stop it

def check_folder(flag: str, folder: Path):
    there = checkpoint.existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        sys.exit(f'error: cannot write to {flag} {folder}: {there} is {"read-only" if there.is_dir() else "no folder"}')
    if (folder / '.lock').exists():
        with open(folder / '.lock', 'r+') as lock:
            take(lock, folder)


def check_images(wrong: dict[str, list[str]], sources: dict, args, found: Findings):
    for split, broken in wrong.items():
        expected = len(broken) * max(len(sources[split]) / looks.DECODED, 1)
        # in training others stand in for them
        allowed = bad_allowed(args, len(sources[split]))
        where = found.problems if split == 'valid' or expected > allowed else found.notes
        where += broken[:TOLD]
        if len(broken) > TOLD:
            where.append(f'{split}: {len(broken) - TOLD} more of those decoded cannot be read')


def check_ranks(order: TrainOrder, nodes: int, student: nn.Module | None, loader, args, found: Findings):
    if order.batch < order.world:
        found.problems.append(f'a batch of {order.batch} is smaller than the number of ranks, {order.world}')
    elif order.batch // order.world == 1 and not args.sync_bn and student and any(
            isinstance(m, _BatchNorm) for m in student.modules()):
        found.notes.append('BatchNorm takes its statistics from 1 image per rank: a larger batch, or fewer ranks')
    workers, cores = args.workers * order.world // nodes, os.cpu_count()
    if isinstance(loader, DataLoader) and workers > cores:
        found.notes.append(f'{workers} loader processes share {cores} cores: -j {max(cores * nodes // order.world, 1)} '
                           'may be faster')


def check_disk(run: Run):
    """While a checkpoint is written, the one before it and the one before that are there, too; so with weights."""
    weights, whole = looks.run_files(run)
    there = checkpoint.existing(run.folder)
    if (needed := 3 * whole + 3 * weights) > (free := shutil.disk_usage(there).free):
        sys.exit(f'error: checkpoints need {needed / 1e9:.2f} GB, and {there} has {free / 1e9:.2f} GB free')
