"""Where images come from.

A source has len, classes, targets (class number of every sample), load(index) -> (image, class number), and name(index)
for messages. An image is PIL's, or uint8 [3, H, W]. Where both will do the tensor is taken: torchvision crops and
resizes it in a third of the time.
"""
import json
import os
import sys
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor

from . import distributed
from .args import shorter_side

CIFAR = {'cifar10': datasets.CIFAR10, 'cifar100': datasets.CIFAR100}


class Folder:
    """root/class/image, as torchvision's ImageFolder: classes in sorted order.

    What is hidden, like .ipynb_checkpoints or the ._* of a Mac, is neither a class nor an image.
    """

    def __init__(self, root: Path, by_pil=False):
        self.root, self.by_pil, self.samples = root, by_pil, []
        try:
            entries = [entry for entry in root.iterdir() if entry.name[0] != '.']
            if gone := [entry for entry in entries if entry.is_symlink() and not entry.exists()]:
                sys.exit(f'error: {gone[0]} is a link to what is not there')  # it may have been a class
            self.classes = sorted(entry.name for entry in entries if entry.is_dir())
            if not self.classes:
                sys.exit(f'error: {root} has no class folders')
            for number, name in enumerate(self.classes):
                images = list(images_in(root / name))
                if not images:
                    sys.exit(f'error: {root / name} has no images ({" ".join(IMG_EXTENSIONS)})')
                self.samples += [(path, number) for path in images]
        except OSError as error:
            sys.exit(f'error: {error.filename} cannot be read: {error.strerror}')
        self.targets = [target for _, target in self.samples]

    def __len__(self):
        return len(self.samples)

    def name(self, index):
        return self.samples[index][0]

    def load(self, index):
        path, target = self.samples[index]
        if self.by_pil:
            return read(path), target
        jpeg = read_jpeg(path)
        return pil_to_tensor(read(path)) if jpeg is None else jpeg, target


def images_in(root: Path):
    """Paths of the images in a folder, and in those below it."""
    def fail(error):
        raise error

    found = []
    for folder, inner, files in os.walk(root, onerror=fail, followlinks=True):
        here = os.path.realpath(folder) + os.sep
        inner[:] = [name for name in inner if name[0] != '.'  # nor a link to a folder above, which would have no end
                    and not here.startswith(os.path.realpath(os.path.join(folder, name)) + os.sep)]
        found.append((folder, files))
    for folder, files in sorted(found):
        yield from (os.path.join(folder, file) for file in sorted(files)
                    if file[0] != '.' and file.lower().endswith(IMG_EXTENSIONS))


def read(path) -> Image.Image:
    with Image.open(path) as image:
        if image.mode == 'F' or (image.mode == 'I' and image.format == 'TIFF'):  # which PIL would clip
            raise ValueError('its pixels are floats or 32-bit integers of an unknown range: store them in 8 or 16 bits')
        if image.mode.startswith('I'):  # 16-bit grey, which PIL would clip instead of scale
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert('RGB')


def read_jpeg(path) -> torch.Tensor | None:
    """A JPEG's pixels, as read() has them; None where it is for PIL: another format, other colours, a damaged file."""
    content = np.fromfile(path, np.uint8)
    if content[:3].tobytes() != b'\xff\xd8\xff':
        return None
    try:
        pixels = decode_jpeg(torch.from_numpy(content))
    except RuntimeError:
        return None
    return pixels.expand(3, -1, -1) if len(pixels) in (1, 3) else None


class Shards:
    """What scripts/prepare.py --format raw leaves: the pixels of many images to a file, which is mapped into memory."""

    def __init__(self, root: Path, classes: list[str], by_pil=False):
        self.root, self.classes, self.by_pil, self.samples, self.sizes = root, classes, by_pil, [], []
        self.shards = [path.stem for path in sorted(root.glob('*.json'))]
        for shard, stem in enumerate(self.shards):
            offset = 0
            for name, target, height, width in images_of_shard(root / f'{stem}.json'):
                self.samples.append((name, target, shard, offset))
                self.sizes.append((height, width))
                offset += height * width * 3
            file = root / f'{stem}.raw'
            if not file.is_file() or file.stat().st_size != offset:
                sys.exit(f'error: {file} is damaged: start scripts/prepare.py again, which makes it anew')
        self.targets = [target for _, target, _, _ in self.samples]
        if empty := sorted({*range(len(classes))} - {*self.targets}):
            sys.exit(f'error: {root} has no images of {classes[empty[0]]}')

    def __len__(self):
        return len(self.samples)

    def name(self, index):
        return f'{self.root}: {self.samples[index][0]}'

    @cached_property
    def files(self) -> list[torch.Tensor]:
        paths = [self.root / f'{stem}.raw' for stem in self.shards]
        return [torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8) for path in paths]

    def load(self, index):
        (_, target, shard, offset), (height, width) = self.samples[index], self.sizes[index]
        pixels = self.files[shard][offset:offset + height * width * 3].view(height, width, 3)
        return Image.fromarray(pixels.numpy()) if self.by_pil else pixels.permute(2, 0, 1), target


def images_of_shard(index: Path) -> list:
    try:
        return json.loads(index.read_text())['images']
    except (ValueError, KeyError, TypeError):
        sys.exit(f'error: {index} is damaged: start scripts/prepare.py again, which makes it anew')


class Cifar:
    def __init__(self, name: str, root: str, train: bool):
        def official(**how):
            return CIFAR[name](root, train, **how)  # each time it reads all files, for their checksums
        try:
            if distributed.is_main():  # one rank downloads
                try:
                    found = official()
                except RuntimeError:
                    found = official(download=True)
            distributed.agree(0)
            if not distributed.is_main():
                found = official()
        except (OSError, RuntimeError) as error:
            there = (Path(root) / CIFAR[name].base_folder).is_dir()
            sys.exit(f'error: {f"{name} in {root} is damaged" if there else f"no {name} in {root}"}, and it cannot be '
                     f'downloaded: {error}')
        self.classes, self.pixels, self.targets = found.classes, found.data, found.targets
        self.name = f'{name} {"train" if train else "test"} image {{}}'.format

    def __len__(self):
        return len(self.pixels)

    def load(self, index):
        return Image.fromarray(self.pixels[index]), self.targets[index]


class Dummy:
    """Noise with labels, each a function of the index."""

    def __init__(self, length: int, classes: int, size: int, by_pil=True):
        self.size, self.by_pil, self.classes = size, by_pil, [f'output {c}' for c in range(classes)]
        self.targets = [index % classes for index in range(length)]
        self.name = 'dummy image {}'.format

    def __len__(self):
        return len(self.targets)

    def noise(self, index) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), np.uint8)

    @cached_property
    def pixels(self) -> np.ndarray:
        return np.stack([self.noise(index) for index in range(len(self))])

    def load(self, index):
        image = Image.fromarray(self.noise(index))
        return image if self.by_pil else pil_to_tensor(image), self.targets[index]


def load_or_next(source, index: int) -> tuple:
    """Image, class and number of a sample or, where it cannot be read, of the next one that can."""
    for number in chain(range(index, len(source)), range(index)):
        try:
            return *source.load(number), number
        except Exception as error:  # whatever a decoder makes of a broken file
            why = error
    raise RuntimeError(f'not one image can be read: {source.name(number)}: {why}')


def find_split(root: str, *names: str) -> Path:
    if not Path(root).is_dir():
        sys.exit(f'error: the data folder {root} ' + ('is a file' if Path(root).exists() else 'does not exist'))
    for name in names:
        if (Path(root) / name).is_dir():
            return Path(root) / name
    cifar = next((name for name, kind in CIFAR.items() if (Path(root) / kind.base_folder).is_dir()), None)
    sys.exit(f'error: {root} has no {" or ".join(name + "/" for name in names)}'
             + f'; it holds CIFAR: --dataset {cifar}' * bool(cifar))


def load_source(args, train: bool):
    by_pil = args.exact_pixels or not train or args.dataset != 'imagefolder'  # published scores are of PIL's pixels
    if args.dummy:
        length = args.dummy_images if train else max(args.dummy_images // 4, 1)
        classes = {'imagefolder': 1000, 'cifar10': 10, 'cifar100': 100}[args.dataset]
        return Dummy(length, classes, args.image_size if args.dataset == 'imagefolder' else 32, by_pil)
    if args.dataset != 'imagefolder':
        return Cifar(args.dataset, args.data, train)
    root = find_split(args.data, 'train') if train else find_split(args.data, 'valid', 'val')
    made = manifest(args.data)
    if not train and made and made['size'] != (wanted := shorter_side(args)):
        done = 'enlarged' if made['size'] < wanted else 'resized twice'
        distributed.say(f'note: {args.data} was prepared with --size {made["size"]}, and an evaluation resizes to '
                        f'{wanted}: images are {done}, and score otherwise (--val-resize-size says to what)')
    if made.get('format') == 'raw':
        return Shards(root, list(made['images'][root.name]), by_pil)
    return Folder(root, by_pil)


def manifest(root: str) -> dict:
    """What scripts/prepare.py noted about a folder it made; of any other, nothing."""
    path = Path(root) / 'manifest.json'
    try:
        made = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        sys.exit(f'error: {path} is damaged: start scripts/prepare.py again')
    if not isinstance(made, dict) or made.get('by') != 'scripts/prepare.py':
        return {}
    if not made['complete']:
        sys.exit(f'error: {root} is not complete: start scripts/prepare.py again')
    return made
