"""Batches, and the loaders that bring them.

A loader yields Batch: images are uint8 until Prepare has them on the device, which a ResidentLoader has do it for many
at once. Samples are asked for by (epoch, index), so the augmentation is a function of (seed, epoch, index) whichever
process does it, or the device itself.
"""
import copy
import hashlib
import os
import sys
import tempfile
import threading
import warnings
from collections import Counter
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from . import distributed, signals, together
from .args import beyond_the_device
from .crops import ResidentImages, stack
from .order import EvalOrder, TrainOrder
from .randomness import generator
from .resident import Resident
from .slots import Slots
from .sources import Shards, load_or_next, load_source, manifest
from .views import CropView, ShiftView, plain_view, statistics

EVALUATED = 512  # CIFAR's images, which are small: an evaluation looks at no fewer at once
PREFETCH = 2  # batches that each loader process is ahead
AT_ONCE = 1024  # images, over all ranks, cropped and normalised by as many kernels as a few would take


class Batch(NamedTuple):
    images: Tensor   # [N, 3, H, W], uint8 before Prepare, normalised floats after
    target: Tensor   # [N] class numbers, or [N, K] shares of the classes where images were mixed
    index: Tensor    # [N] numbers of the samples in their data set
    bad: Tensor      # [N] number of the unreadable sample that this one stands in for, else -1
    weight: float = 1.0    # of the mean over this batch in the update; 0 where it only keeps other ranks company
    view: Tensor | int = -1  # [N] numbers of the views (resident.py), -1 where they are not of those 162

    def seen(self) -> dict[str, Tensor]:
        """What the device is shown of it, by name."""
        return {name: x for name, x in self._asdict().items() if isinstance(x, Tensor) and name != 'bad'}


class Images(Dataset):
    """The views of a source's images. Where an image cannot be read the next readable one stands in and is marked."""

    def __init__(self, source, view):
        self.source, self.view = source, view

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key
        image, target, number = load_or_next(self.source, index)
        return Batch(self.view(image, epoch, number), target, number, -1 if number == index else index,
                     view=self.view.number(epoch, number))

    def complaint(self, index) -> str:
        """What is wrong with an unreadable image, for the log."""
        try:
            self.source.load(index)
        except Exception as error:
            return f'{self.source.name(index)} cannot be read: {error}'
        return f'{self.source.name(index)} could not be read, and now can'


@cache
def copying(device: torch.device) -> torch.cuda.Stream | None:
    """A GPU's stream for batches from the host: one, as there are not many streams, and runs side by side need some."""
    return torch.cuda.Stream(device) if device.type == 'cuda' else None


class Prepare:
    """To the device, normalised with ToTensor's and Normalize's arithmetic, mixed if asked for."""

    def __init__(self, args, device, mix_classes=None):
        mean, std = (torch.tensor(s, device=device).view(3, 1, 1) for s in statistics(args))
        self.mean, self.std, self.device = mean, std, device
        self.format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.copying = copying(device)
        mixers = [v2.MixUp(alpha=args.mixup, num_classes=mix_classes)] if args.mixup else []
        mixers += [v2.CutMix(alpha=args.cutmix, num_classes=mix_classes)] if args.cutmix else []
        self.mix = v2.RandomChoice(mixers) if mixers and mix_classes else None

    def __call__(self, batch: Batch) -> Batch:
        if not batch.images.is_floating_point():
            batch = self.normalised(batch)
        if not self.mix:
            return batch
        images, target = self.mix(batch.images, batch.target)
        return batch._replace(images=images, target=target)

    def normalised(self, batch: Batch) -> Batch:
        with torch.cuda.stream(self.copying):  # while the device still works on the batch before
            there = {name: x.to(self.device, non_blocking=True) for name, x in batch.seen().items()}
        if self.copying:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self.copying)
            for x in there.values():
                x.record_stream(now)
        images = there['images'].to(memory_format=self.format).float().div_(255).sub_(self.mean).div_(self.std)
        return batch._replace(**there | {'images': images})


class ResidentLoader:
    """Yields what a DataLoader would, prepared and on the device already, without having to wait for it."""

    def __init__(self, images: Images, order: TrainOrder | EvalOrder, resident: Resident, prepare=lambda batch: batch):
        self.dataset, self.batch_sampler, self.resident = images, order, resident
        self.prepare = prepare  # called with several batches in one

    def __iter__(self):
        device, batches = self.resident.targets.device, iter(self.batch_sampler)
        while some := list(islice(batches, max(AT_ONCE // self.batch_sampler.batch, 1))):
            index = torch.tensor([number for keys in some for _, number in keys])
            view = torch.as_tensor(self.dataset.view.number(some[0][0][0], index)).expand(len(index)).contiguous()
            if device.type == 'cuda':
                index, view = index.pin_memory(), view.pin_memory()
            there, number = (x.to(device, non_blocking=True) for x in (index, view))
            group = self.prepare(Batch(self.resident.views(there, number), self.resident.targets[there], index,
                                       torch.full_like(index, -1), view=view))
            parts = [x.split([*map(len, some)]) for x in (*group[:4], group.view)]
            for images, target, index, bad, view in zip(*parts):
                yield Batch(images, target, index, bad, view=view)


class CropLoader(ResidentLoader):
    """The same with images of any size, for CropView. On a CPU its batches are those of a DataLoader to the bit."""

    def __iter__(self):
        view, resident, device = self.dataset.view, self.resident, self.resident.targets.device
        for keys in self.batch_sampler:
            asked = torch.tensor([number for _, number in keys])
            index = resident.numbers[asked]
            boxes = view.boxes(keys[0][0], index.tolist(), resident.sizes[asked].tolist())
            if device.type == 'cuda':
                asked, boxes = asked.pin_memory(), boxes.pin_memory()
            targets = resident.targets[asked.to(device, non_blocking=True)]
            yield Batch(resident.crops(asked, boxes, view.size), targets, index,
                        torch.where(index == asked, -1, asked), view=torch.full_like(index, -1))


def bad_allowed(args, images: int) -> int:
    """How many of so many training images an epoch may find unreadable."""
    return max(images // 1000, 1) if args.max_bad_images is None else args.max_bad_images


class TrainData:
    def __init__(self, loader: DataLoader | ResidentLoader, plain: DataLoader | ResidentLoader | None = None):
        self.images, self.order = loader.dataset, loader.batch_sampler
        self.loader, self.plain = loader, plain
        self.reported, self.turns = set(), Counter()

    def updates(self, epoch: int, start: int):
        """For every update from a sample on: the sample it ends before, and its batches."""
        self.order.at(epoch, start)
        batches = iter(self.loader)
        for end, micro in self.order.plan():
            yield end, [next(batches)._replace(weight=weight) for weight in self.order.weights(micro)]

    def sample(self, epoch: int, count: int):
        """Batches of training images as an evaluation sees images, split over the ranks; others each time."""
        drawn = generator(self.order.seed, 'sample', epoch, self.turns[epoch])
        self.turns[epoch] += 1
        order = torch.randperm(self.order.length, generator=drawn)
        self.plain.batch_sampler.samples = order[:count].tolist()
        return iter(self.plain)

    def report_bad(self, batches) -> int:
        """How many images of an update were replaced; each is named once."""
        bad = [number for batch in batches if batch.weight for number in batch.bad.tolist() if number >= 0]
        for number in set(bad) - self.reported:
            distributed.write_line(self.images.complaint(number), sys.stderr)
        self.reported.update(bad)
        return len(bad)

    @torch.no_grad()
    def refuse_single_values(self, task: nn.Module, args):
        """BatchNorm takes no statistics from a map of one pixel of one image; an epoch would end in that."""
        device, order = next(task.parameters()).device, self.order

        def fewest(n: int) -> int:
            """Of a batch, on a rank, or on a replica of DataParallel: all have as many there, but for the last one."""
            part = -(-n // distributed.replicas(device, args))
            return n // order.world if order.world > 1 else n % part or part
        single = [n for n in (order.length % order.batch or order.batch, order.batch) if fewest(n) < 2]
        if not single or args.sync_bn:
            return
        state = copy.deepcopy(task.state_dict())
        image = torch.zeros(1, 3, args.image_size, args.image_size, device=device)
        number = torch.tensor([0], device=device)
        try:
            with torch.compiler.set_stance('force_eager'):
                task.train()(Batch(image, number, number, number))
        except ValueError as error:
            if 'more than 1 value per channel' not in str(error):
                raise
            distributed.stop(f'of the {order.length} images an epoch has a batch of {single[0]}, which leaves 1 to a '
                             'rank or GPU, and from that a BatchNorm cannot take statistics: take another -b')
        task.load_state_dict(state)

    def resident(self, device) -> Resident:
        return getattr(self.loader, 'resident', None) or Resident(self.images.source, device, self.images.view.padding)


def collate(samples: list[Batch], join) -> Batch:
    images, target, index, bad, _, view = zip(*samples)
    return Batch(stack(images, join), *map(default_collate, (target, index, bad)), view=default_collate(view))


def make_loader(images, order, args):
    """A DataLoader of these images. In training, those of an update stay until the batches of the next are asked for.

    Then loader processes write others into the same memory (slots.py).
    """
    warnings.filterwarnings('ignore', 'This DataLoader will create')  # more workers than cores, which load_data told
    # Said explicitly, as a spawned rank would spawn its workers too, and each would import torch anew.
    fork = 'fork' if args.workers and sys.platform == 'linux' else None
    # In a thread (--seeds) nobody is told when a loader process is killed. Without a timeout, torch looks now and then.
    timeout = args.dist_timeout if args.workers and threading.current_thread() is threading.main_thread() else 0
    if args.workers and len(os.fsencode(tempfile.gettempdir())) > 75:  # sockets are named there, in 107 bytes
        sys.exit(f'error: TMPDIR {tempfile.gettempdir()} is too long a path for the sockets of loader processes: '
                 'export a shorter one, or -j 0')
    join = default_collate
    if args.workers and isinstance(order, TrainOrder):  # those on their way, and of each worker its share of an update
        join = Slots(PREFETCH + -(-order.accum // args.workers))
    loader = DataLoader(images, batch_sampler=order, collate_fn=partial(collate, join=join),
                        num_workers=args.workers, prefetch_factor=PREFETCH if args.workers else None,
                        timeout=timeout, persistent_workers=args.workers > 0, worker_init_fn=signals.ignore,
                        generator=torch.Generator(), pin_memory=torch.cuda.is_available() and not args.no_accel,
                        multiprocessing_context=fork)
    distributed.at_end.callback(dismiss_workers, loader)
    return loader


def dismiss_workers(loader):
    """They ignore signals: they have to be told to go before multiprocessing, at exit, sends them one and waits."""
    if loader._iterator is not None:
        workers = loader._iterator._workers
        loader._iterator._shutdown_workers()
        for worker in workers:
            worker.kill()  # one that hangs


def global_batch(args) -> int:
    """Samples of one micro-batch over all ranks: -b counts those of one node, as in pytorch/examples."""
    return args.batch_size * distributed.nodes()


def on_device(args, train, device) -> bool:
    """Whether the images to train with live on the device: --data-backend, which check() has found to be possible."""
    against = beyond_the_device(args) or (why_not(train, device) if args.dataset == 'imagefolder' else '')
    asked = args.data_backend == 'device' and (train or args.dataset != 'imagefolder')  # whose evaluation is PIL's
    if asked or (args.data_backend == 'auto' and not against):
        distributed.say('data: images on the device, cropped and flipped there')
        return True
    crowded = args.workers > os.cpu_count() and not args.inspect  # which has a note of its own
    distributed.say(f'data: images from {args.workers} loader processes per rank'
                    + f', more than the {os.cpu_count()} cores here' * crowded + f' ({against})' * bool(against))
    return False


def why_not(train, device) -> str:
    """What speaks against image folders on the device, if something does."""
    if not isinstance(train, Shards):
        return 'images are not prepared with --format raw' if train else '--evaluate'
    if device.type != 'cuda':
        return 'the files are in its memory anyway'
    size, free = sum(height * width * 3 for height, width in train.sizes), torch.cuda.mem_get_info(device)[0]
    return f'{size / 1e9:.1f} GB of images, {free / 1e9:.1f} GB free on the device' if size > free / 2 else ''


def contents(train: TrainData | None, valid) -> str:
    """What a run on these images is tied to: their number, and a hash of their names and classes."""
    sources = ([train.images.source] if train else []) + [valid.dataset.source]
    digest = hashlib.sha256()
    for source in sources:
        root = str(getattr(source, 'root', ''))  # a copy elsewhere is the same
        made = manifest(Path(root).parent) if root else {}  # a copy by prepare.py is not what it was made from
        names = (source.name(index).removeprefix(root) for index in range(len(source)))
        told = [str(made.get(key)) for key in ('format', 'size', 'quality')]
        digest.update('\n'.join([*told, *source.classes, *names]).encode(errors='surrogateescape'))
    return f'{" + ".join(f"{len(source):,}" for source in sources)} images {digest.hexdigest()[:16]}'


def check_classes(train, valid, args):
    """End where both parts have not the same classes, or the network has fewer outputs; tell what is odd of them.

    train: None with --evaluate
    """
    if train is not None and train.classes != valid.classes:
        only = [f'{c} is only in {where}' for where, these, those in
                (('train', train.classes, valid.classes), ('valid', valid.classes, train.classes))
                for c in these if c not in those]
        sys.exit(f'error: the classes of train and valid differ: {", ".join(only[:4])}')
    if len(valid.classes) == 1:
        distributed.say(f'note: {valid.classes[0]} is the only class: its label teaches nothing')
    if all(map(str.isdecimal, valid.classes)) and valid.classes != sorted(valid.classes, key=int):
        distributed.say(f'note: the classes are numbers, and outputs stand for them in the order of texts: '
                        f'{", ".join(valid.classes[:4])}, ...; weights from elsewhere may have been trained otherwise')
    if args.num_classes and args.num_classes < len(valid.classes):
        sys.exit(f'error: --num-classes {args.num_classes}, but the data has {len(valid.classes)} classes')


def load_data(args, seed: int, device: torch.device):
    """The training data (None with --evaluate), a loader for the evaluation, and the class names."""
    valid = together.shared('valid', lambda: load_source(args, train=False))
    train = None if args.evaluate else together.shared('train', lambda: load_source(args, train=True))
    check_classes(train, valid, args)
    rank, world, batch = distributed.rank(), distributed.world(), global_batch(args)
    if batch < world:
        sys.exit(f'error: a batch of {batch} is smaller than the number of ranks, {world}')
    resident = together.shared('on device', lambda: on_device(args, train, device))  # what is there takes memory
    folder = args.dataset == 'imagefolder'
    plain, share = plain_view(args), max(batch // world, 1)

    @cache
    def held(source):
        """Its images on the device, once for all its loaders."""
        if folder:
            return together.shared('images', lambda: ResidentImages(source, device, args.workers))
        return together.shared(('resident', source is train), lambda: Resident(source, device, args.crop_padding))

    def load(source, view, order):
        images = Images(source, view)
        if not resident or (folder and view is plain):  # what an evaluation sees of a folder is PIL's
            return make_loader(images, order, args)
        if folder:
            return CropLoader(images, order, held(source))
        return ResidentLoader(images, order, held(source), Prepare(args, device))

    at_once = max(share, EVALUATED) if not folder and args.image_size == 32 else share
    evaluation = load(valid, plain, EvalOrder(range(len(valid)), at_once, rank, world))
    if train is None:
        return None, evaluation, valid.classes
    view = CropView(args, seed) if folder else ShiftView(args, seed, len(train))
    order = TrainOrder(len(train), batch, args.accum_steps, seed, rank, world)
    loaders = load(train, view, order), load(train, plain, EvalOrder([], share, rank, world))
    return TrainData(*loaders), evaluation, valid.classes
