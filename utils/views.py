"""How images are augmented.

A view maps (image, epoch, index), the image of PIL or a uint8 tensor [3, H, W], to a uint8 tensor [3, size, size];
number(epoch, index) is that of the view, of one sample or of several.
"""
from functools import lru_cache

import torch
from torchvision.transforms import v2

from .args import beyond_crop_and_flip, further_augmentation, shorter_side
from .crops import cut, in_the_middle, random_box, somewhere
from .randomness import generator, seeded
from .resident import CENTRE, PLACES, pad

STATISTICS = {  # mean and std of the normalisation; four digits, as published teachers had them
    'imagefolder': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    'cifar10': ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    'cifar100': ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


def statistics(args) -> tuple[tuple, tuple]:
    """Mean and std that images are normalised by."""
    mean, std = STATISTICS[args.dataset]
    return tuple(args.mean or mean), tuple(args.std or std)


def random_extras(args):
    """What may follow crop and flip: a policy, an erased rectangle (in the mean colour, which normalises to 0)."""
    linear = v2.InterpolationMode.BILINEAR
    policy = v2.AutoAugmentPolicy.IMAGENET if args.dataset == 'imagefolder' else v2.AutoAugmentPolicy.CIFAR10
    policies = {'off': v2.Identity(), 'autoaugment': v2.AutoAugment(policy, linear),
                'randaugment': v2.RandAugment(interpolation=linear),
                'trivialaugment': v2.TrivialAugmentWide(interpolation=linear),
                'augmix': v2.AugMix(interpolation=linear)}
    mean = [round(255 * m) for m in statistics(args)[0]]
    erasing = v2.RandomErasing(args.random_erasing, value=mean) if args.random_erasing else v2.Identity()
    return v2.Compose([policies[args.auto_augment], erasing])


class CropView:
    """The ImageNet recipe: a random crop of random size, flip. Or a square of the size that an evaluation sees."""

    def __init__(self, args, seed):
        self.seed, self.size = seed, args.image_size
        self.crop, self.least, self.flip = args.crop, args.crop_area, args.flip
        self.seen = args.image_size / shorter_side(args)  # by an evaluation, of the shorter side
        self.extras = random_extras(args) if further_augmentation(args) else None

    def box(self, epoch, index, height, width) -> tuple:
        """Top, left, height, width, flip."""
        draw = generator(self.seed, 'view', epoch, index)
        if self.crop == 'resized':
            box = random_box(height, width, draw, self.least)
        else:
            side = max(round(min(height, width) * self.seen), 1)
            place = (somewhere(height, width, side, side, draw) if self.crop == 'random' else
                     in_the_middle(height, width, side, side))
            box = *place, side, side
        return *box, torch.rand(1, generator=draw).item() < self.flip

    def boxes(self, epoch, numbers, sizes) -> torch.Tensor:
        """[B, 5], of images of these numbers, heights and widths."""
        return torch.tensor([self.box(epoch, number, *size) for number, size in zip(numbers, sizes)])

    def __call__(self, image, epoch, index):
        height, width = image.shape[1:] if isinstance(image, torch.Tensor) else (image.height, image.width)
        image = cut(image, *self.box(epoch, index, height, width), self.size)
        if self.extras is None:
            return image
        with seeded(self.seed, 'extras', epoch, index):
            return self.extras(image)

    def number(self, epoch, index):
        return -1


class CenterView:
    """The shorter side resized, then the centre."""

    def __init__(self, size, shorter):
        self.transform = v2.Compose([v2.Resize(shorter), v2.CenterCrop(size), v2.PILToTensor()])

    def __call__(self, image, epoch, index):
        return self.transform(image)

    def number(self, epoch, index):
        return -1


@lru_cache(maxsize=16)  # two of each run that trains beside others
def shifts(seed: int, epoch: int, length: int, flip: float = 0.5) -> torch.Tensor:
    """Row, column (0..8) and flip (0, 1) of every CIFAR image in an epoch: one table, the same on every device."""
    draw = generator(seed, 'shifts', epoch)
    places, flips = torch.randint(9, (length, 2), generator=draw), torch.randint(2, (length, 1), generator=draw)
    if flip != 0.5:
        flips = (torch.rand(length, 1, generator=draw) < flip).long()
    return torch.cat([places, flips], 1)


@lru_cache(maxsize=16)
def view_numbers(seed: int, epoch: int, length: int, flip: float) -> torch.Tensor:
    return shifts(seed, epoch, length, flip) @ PLACES


class ShiftView:
    """The CIFAR recipe: a crop out of the image padded by 4, flip."""

    def __init__(self, args, seed, length):
        self.seed, self.length, self.numbered = seed, length, not beyond_crop_and_flip(args)
        self.padding, self.flip = args.crop_padding, args.flip
        self.resize = v2.Identity() if args.image_size == 32 else v2.Resize((args.image_size, args.image_size))
        self.extras = random_extras(args) if further_augmentation(args) else None

    def __call__(self, image, epoch, index):
        row, column, flip = shifts(self.seed, epoch, self.length, self.flip)[index].tolist()
        image = pad(v2.functional.pil_to_tensor(image), self.padding)[:, row:row + 32, column:column + 32]
        image = self.resize(image.flip(2) if flip else image)
        if self.extras is None:
            return image
        with seeded(self.seed, 'extras', epoch, index):
            return self.extras(image)

    def number(self, epoch, index):
        return view_numbers(self.seed, epoch, self.length, self.flip)[index] if self.numbered else -1


def plain_view(args):
    """How an evaluation sees images."""
    size = args.image_size
    return CenterView(size, shorter_side(args)) if args.dataset == 'imagefolder' else PlainView(size)


class PlainView:
    """A CIFAR image as it is."""

    def __init__(self, size):
        self.size, self.resize = size, v2.Identity() if size == 32 else v2.Resize((size, size))

    def __call__(self, image, epoch, index):
        return self.resize(v2.functional.pil_to_tensor(image))

    def number(self, epoch, index):
        return CENTRE if self.size == 32 else -1
