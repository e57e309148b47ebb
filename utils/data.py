"""Images: where they come from, how they are augmented, and the loaders that bring them.

A loader yields Batch: images are uint8 until Prepare has them on the device. Samples are asked for by (epoch, index),
so the augmentation is a function of (seed, epoch, index) whichever process does it, or the device itself.
"""
import os
import sys
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from . import distributed, signals
from .args import beyond_crop_and_flip
from .order import EvalOrder, TrainOrder
from .randomness import generator, seeded
from .resident import CENTRE, Resident, view_number

STATISTICS = {  # mean and std of the normalisation; four digits, as published teachers had them
    'imagefolder': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    'cifar10': ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    'cifar100': ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


class Batch(NamedTuple):
    images: torch.Tensor   # [N, 3, H, W], uint8 from the loader, normalised floats from Prepare
    target: torch.Tensor   # [N] class numbers, or [N, K] shares of the classes where images were mixed
    index: torch.Tensor    # [N] numbers of the samples in their data set
    bad: torch.Tensor      # [N] number of the unreadable sample that this one stands in for, else -1
    weight: float = 1.0    # of the mean over this batch in the update; 0 where it only keeps other ranks company
    view: torch.Tensor | int = -1  # [N] numbers of the views (resident.py), -1 where they are not of those 162


# Sources: len, classes, targets (class number of every sample), load(index) -> (PIL image, class number),
# name(index) for messages.

class Folder:
    """root/class/image, as torchvision's ImageFolder: classes in sorted order."""

    def __init__(self, root: Path):
        self.classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        if not self.classes:
            sys.exit(f'error: {root} has no class folders')
        self.samples = []
        for number, name in enumerate(self.classes):
            before = len(self.samples)
            for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
                self.samples += [(os.path.join(folder, file), number) for file in sorted(files)
                                 if file.lower().endswith(IMG_EXTENSIONS)]
            if len(self.samples) == before:
                sys.exit(f'error: {root / name} has no images ({" ".join(IMG_EXTENSIONS)})')
        self.targets = [target for _, target in self.samples]

    def __len__(self):
        return len(self.samples)

    def name(self, index):
        return self.samples[index][0]

    def load(self, index):
        path, target = self.samples[index]
        with Image.open(path) as image:
            if image.mode.startswith('I'):  # 16-bit grey, which PIL would clip instead of scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert('RGB'), target


class Cifar:
    def __init__(self, name: str, root: str, train: bool):
        kind = {'cifar10': datasets.CIFAR10, 'cifar100': datasets.CIFAR100}[name]
        try:
            if distributed.is_main():  # one rank downloads
                kind(root, train, download=True)
            distributed.agree(0)
            official = kind(root, train)
        except (OSError, RuntimeError) as error:
            sys.exit(f'error: no {name} in {root}, and it cannot be downloaded: {error}')
        self.classes, self.images, self.targets = official.classes, official.data, official.targets
        self.name = f'{name} {"train" if train else "test"} image {{}}'.format

    def __len__(self):
        return len(self.images)

    def load(self, index):
        return Image.fromarray(self.images[index]), self.targets[index]


class Dummy:
    """Noise with labels, each a function of the index."""

    def __init__(self, length: int, classes: int, size: int):
        self.size, self.classes = size, [str(c) for c in range(classes)]
        self.targets = [index % classes for index in range(length)]
        self.name = 'dummy image {}'.format

    def __len__(self):
        return len(self.targets)

    def load(self, index):
        noise = np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), np.uint8)
        return Image.fromarray(noise), self.targets[index]


# Views: (PIL image, epoch, index) -> uint8 tensor [3, size, size]; number(epoch, index) of one sample or several.

def random_extras(args):
    """What may follow crop and flip: a policy, an erased rectangle (in the mean colour, which normalises to 0)."""
    linear = v2.InterpolationMode.BILINEAR
    policy = v2.AutoAugmentPolicy.IMAGENET if args.dataset == 'imagefolder' else v2.AutoAugmentPolicy.CIFAR10
    policies = {'off': lambda: v2.Identity(), 'autoaugment': lambda: v2.AutoAugment(policy, linear),
                'randaugment': lambda: v2.RandAugment(interpolation=linear),
                'trivialaugment': lambda: v2.TrivialAugmentWide(interpolation=linear),
                'augmix': lambda: v2.AugMix(interpolation=linear)}
    mean = [round(255 * m) for m in STATISTICS[args.dataset][0]]
    erasing = v2.RandomErasing(args.random_erasing, value=mean) if args.random_erasing else v2.Identity()
    return v2.Compose([policies[args.auto_augment](), erasing])


class CropView:
    """The ImageNet recipe: a random crop of random size, flip."""

    def __init__(self, args, seed):
        self.seed = seed
        self.transform = v2.Compose([v2.RandomResizedCrop(args.image_size), v2.RandomHorizontalFlip(), v2.PILToTensor(),
                                     random_extras(args)])

    def __call__(self, image, epoch, index):
        with seeded(self.seed, 'view', epoch, index):
            return self.transform(image)

    def number(self, epoch, index):
        return -1


class CenterView:
    """Shorter side to 256/224 of the size, then the centre."""

    def __init__(self, size):
        self.transform = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()])

    def __call__(self, image, epoch, index):
        return self.transform(image)

    def number(self, epoch, index):
        return -1


@lru_cache(maxsize=2)
def shifts(seed: int, epoch: int, length: int) -> torch.Tensor:
    """Row, column (0..8) and flip (0, 1) of every CIFAR image in an epoch: one table, the same on every device."""
    draw = generator(seed, 'shifts', epoch)
    return torch.cat([torch.randint(9, (length, 2), generator=draw), torch.randint(2, (length, 1), generator=draw)], 1)


class ShiftView:
    """The CIFAR recipe: a crop out of the image padded with 4 zeros, flip."""

    def __init__(self, args, seed, length):
        self.seed, self.length, self.numbered = seed, length, not beyond_crop_and_flip(args)
        self.resize = v2.Identity() if args.image_size == 32 else v2.Resize((args.image_size, args.image_size))
        extras = args.auto_augment != 'off' or args.random_erasing
        self.extras = random_extras(args) if extras else None

    def __call__(self, image, epoch, index):
        row, column, flip = shifts(self.seed, epoch, self.length)[index].tolist()
        image = F.pad(v2.functional.pil_to_tensor(image), (4, 4, 4, 4))[:, row:row + 32, column:column + 32]
        image = self.resize(image.flip(2) if flip else image)
        if self.extras is None:
            return image
        with seeded(self.seed, 'view', epoch, index):
            return self.extras(image)

    def number(self, epoch, index):
        return view_number(shifts(self.seed, epoch, self.length)[index]) if self.numbered else -1


class PlainView:
    """A CIFAR image as it is."""

    def __init__(self, size):
        self.size, self.resize = size, v2.Identity() if size == 32 else v2.Resize((size, size))

    def __call__(self, image, epoch, index):
        return self.resize(v2.functional.pil_to_tensor(image))

    def number(self, epoch, index):
        return CENTRE if self.size == 32 else -1


class Images(Dataset):
    """The views of a source's images. Where an image cannot be read the next readable one stands in and is marked."""

    def __init__(self, source, view):
        self.source, self.view = source, view

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key
        for number in chain(range(index, len(self)), range(index)):
            try:
                image, target = self.source.load(number)
            except Exception:  # whatever a decoder makes of a broken file
                continue
            return Batch(self.view(image, epoch, number), target, number, -1 if number == index else index,
                         view=self.view.number(epoch, number))
        raise RuntimeError('not one image can be read')

    def complaint(self, index) -> str:
        """What is wrong with an unreadable image, for the log."""
        try:
            self.source.load(index)
        except Exception as error:
            return f'{self.source.name(index)} cannot be read: {error}'
        return f'{self.source.name(index)} could not be read, and now can'


class Prepare:
    """To the device, normalised with ToTensor's and Normalize's arithmetic, mixed if asked for."""

    def __init__(self, args, device, mix_classes=None):
        mean, std = (torch.tensor(s, device=device).view(3, 1, 1) for s in STATISTICS[args.dataset])
        self.mean, self.std, self.device = mean, std, device
        self.format = torch.channels_last if args.channels_last else torch.contiguous_format
        mixers = [v2.MixUp(alpha=args.mixup, num_classes=mix_classes)] if args.mixup else []
        mixers += [v2.CutMix(alpha=args.cutmix, num_classes=mix_classes)] if args.cutmix else []
        self.mix = v2.RandomChoice(mixers) if mixers and mix_classes else None

    def __call__(self, batch: Batch) -> Batch:
        images, target, index = (x.to(self.device, non_blocking=True) for x in batch[:3])
        images = images.to(memory_format=self.format).float().div_(255).sub_(self.mean).div_(self.std)
        if self.mix:
            images, target = self.mix(images, target)
        return batch._replace(images=images, target=target, index=index)


class ResidentLoader:
    """Yields what a DataLoader would, images and targets on the device already, without having to wait for it."""

    def __init__(self, images: Images, order: TrainOrder | EvalOrder, resident: Resident):
        self.dataset, self.batch_sampler, self.resident = images, order, resident

    def __iter__(self):
        device = self.resident.targets.device
        for keys in self.batch_sampler:
            index = torch.tensor([number for _, number in keys])
            view = torch.as_tensor(self.dataset.view.number(keys[0][0], index)).expand(len(index)).contiguous()
            if device.type == 'cuda':
                index, view = index.pin_memory(), view.pin_memory()
            there = index.to(device, non_blocking=True)
            yield Batch(self.resident.views(there, view.to(device, non_blocking=True)), self.resident.targets[there],
                        index, torch.full_like(index, -1), view=view)


class TrainData:
    def __init__(self, loader: DataLoader | ResidentLoader, plain: DataLoader | ResidentLoader | None = None):
        self.images, self.order = loader.dataset, loader.batch_sampler
        self.loader, self.plain = loader, plain
        self.reported = set()

    def updates(self, epoch: int, start: int):
        """For every update from a sample on: the sample it ends before, and its batches."""
        self.order.at(epoch, start)
        batches = iter(self.loader)
        for end, micro in self.order.plan():
            yield end, [next(batches)._replace(weight=weight) for weight in self.order.weights(micro)]

    def sample(self, epoch: int, count: int):
        """Batches of training images as an evaluation sees images, others in every epoch, split over the ranks."""
        order = torch.randperm(self.order.length, generator=generator(self.order.seed, 'sample', epoch))
        self.plain.batch_sampler.samples = order[:count].tolist()
        return iter(self.plain)

    def report_bad(self, batches) -> int:
        """How many images of an update were replaced; each is named once."""
        bad = [number for batch in batches if batch.weight for number in batch.bad.tolist() if number >= 0]
        for number in set(bad) - self.reported:
            print(self.images.complaint(number), file=sys.stderr, flush=True)
        self.reported.update(bad)
        return len(bad)

    def resident(self, device) -> Resident:
        return getattr(self.loader, 'resident', None) or Resident(self.images.source, device)


def make_loader(images, order, args):
    # Said explicitly, as a spawned rank would spawn its workers too, and each would import torch anew.
    fork = 'fork' if args.workers and sys.platform == 'linux' else None
    loader = DataLoader(images, batch_sampler=order, num_workers=args.workers, persistent_workers=args.workers > 0,
                        pin_memory=torch.cuda.is_available() and not args.no_accel, worker_init_fn=_worker,
                        generator=torch.Generator(), multiprocessing_context=fork)
    distributed.at_end.callback(_dismiss_workers, loader)
    return loader


def _worker(number):
    signals.ignore()


def _dismiss_workers(loader):
    """They ignore signals: they have to be told to go before multiprocessing, at exit, sends them one and waits."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()


def global_batch(args) -> int:
    """Samples of one micro-batch over all ranks: -b counts those of one node, as in pytorch/examples."""
    return args.batch_size * distributed.nodes()


def find_split(root: str, *names: str) -> Path:
    if not Path(root).is_dir():
        sys.exit(f'error: the data folder {root} does not exist')
    for name in names:
        if (Path(root) / name).is_dir():
            return Path(root) / name
    sys.exit(f'error: {root} has no {" or ".join(name + "/" for name in names)}')


def load_source(args, train: bool):
    if args.dummy:
        length = args.dummy_images if train else max(args.dummy_images // 4, 1)
        classes = {'imagefolder': 1000, 'cifar10': 10, 'cifar100': 100}[args.dataset]
        return Dummy(length, classes, args.image_size if args.dataset == 'imagefolder' else 32)
    if args.dataset == 'imagefolder':
        return Folder(find_split(args.data, 'train') if train else find_split(args.data, 'valid', 'val'))
    return Cifar(args.dataset, args.data, train)


def on_device(args) -> bool:
    """Whether the images live on the device: --data-backend, which check() has found to be possible."""
    beyond = beyond_crop_and_flip(args)
    if args.data_backend == 'device' or (args.data_backend == 'auto' and not beyond):
        distributed.say('data: images on the device, cropped and flipped there')
        return True
    distributed.say(f'data: images from {args.workers} loader processes per rank' + f' ({beyond})' * bool(beyond))
    return False


def load_data(args, seed: int, device: torch.device):
    """The training data (None with --evaluate), a loader for the evaluation, and the class names."""
    valid = load_source(args, train=False)
    train = None if args.evaluate else load_source(args, train=True)
    if train and train.classes != valid.classes:
        only = [f'{c} is only in {where}' for where, these, those in
                (('train', train.classes, valid.classes), ('valid', valid.classes, train.classes))
                for c in these if c not in those]
        sys.exit(f'error: the classes of train and valid differ: {", ".join(only[:4])}')
    if args.num_classes and args.num_classes < len(valid.classes):
        sys.exit(f'error: --num-classes {args.num_classes}, but the data has {len(valid.classes)} classes')
    rank, world, batch = distributed.rank(), distributed.world(), global_batch(args)
    if batch < world:
        sys.exit(f'error: a batch of {batch} is smaller than the number of ranks, {world}')
    resident, folder = on_device(args), args.dataset == 'imagefolder'
    plain, share = (CenterView if folder else PlainView)(args.image_size), max(batch // world, 1)

    def loaders(source, *views_and_orders):
        if not resident:
            return [make_loader(Images(source, view), order, args) for view, order in views_and_orders]
        held = Resident(source, device)
        return [ResidentLoader(Images(source, view), order, held) for view, order in views_and_orders]

    evaluation, = loaders(valid, (plain, EvalOrder(range(len(valid)), share, rank, world)))
    if train:
        view = CropView(args, seed) if folder else ShiftView(args, seed, len(train))
        order = TrainOrder(len(train), batch, args.accum_steps, seed, rank, world)
        train = TrainData(*loaders(train, (view, order), (plain, EvalOrder([], share, rank, world))))
    return train, evaluation, valid.classes
