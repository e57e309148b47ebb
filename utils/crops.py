"""Boxes of images, drawn and resized: image by image, or in batches on a device that holds all images."""
import math
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch.utils.data import default_collate
from torchvision.transforms.v2 import functional as v2

from .sources import load_or_next

AT_ONCE = 64  # images, which bounds the memory that a batch takes on its way
RATIO = 3 / 4, 4 / 3  # of a random box, its width by its height
LOG_RATIO = torch.tensor(RATIO).log().tolist()
TRIES = 10


def random_box(height: int, width: int, draw: torch.Generator, least: float) -> tuple[int, int, int, int]:
    """Top, left, height, width, as RandomResizedCrop draws them, four times faster. least: share of the area."""
    for _ in range(TRIES):
        area = height * width * torch.empty(1).uniform_(least, 1.0, generator=draw).item()
        ratio = torch.empty(1).uniform_(*LOG_RATIO, generator=draw).exp_().item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return *somewhere(height, width, h, w, draw), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))  # the largest
    return *in_the_middle(height, width, h, w), h, w


def somewhere(height: int, width: int, h: int, w: int, draw: torch.Generator) -> tuple[int, int]:
    """Top and left of a box."""
    top, left = (torch.randint(room + 1, (1,), generator=draw).item() for room in (height - h, width - w))
    return top, left


def in_the_middle(height: int, width: int, h: int, w: int) -> tuple[int, int]:
    return (height - h) // 2, (width - w) // 2


def as_tensor(image) -> torch.Tensor:
    return image if isinstance(image, torch.Tensor) else v2.pil_to_tensor(image)


def cut(image, top, left, height, width, flip, size) -> torch.Tensor:
    """A box of an image, resized and perhaps flipped: what v2's resized_crop and hflip give, in half the time.

    Colours lie beside each other, as decoders leave them: torch resizes that layout fastest, if there are no gaps.
    """
    if isinstance(image, torch.Tensor):
        box = image[None, :, top:top + height, left:left + width].contiguous(memory_format=torch.channels_last)
        image = F.interpolate(box, (size, size), mode='bilinear', antialias=True)[0]
    else:
        image = v2.pil_to_tensor(v2.resized_crop(image, top, left, height, width, [size, size]))
    return image.flip(2) if flip else image


def stack(images: list[torch.Tensor], join=default_collate) -> torch.Tensor:
    """[3, H, W] each -> [B, 3, H, W], channels_last as cut() leaves them, which copies each in one piece."""
    return join([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def shares(length: torch.Tensor, longest: int, size: int) -> torch.Tensor:
    """[B, size, longest]: how much each of `length` pixels in a row counts in each of the `size` that come of them.

    A triangle around the place of the new pixel, as wide as both its neighbours but no narrower than two old ones.
    """
    scale = length.view(-1, 1, 1) / size
    new, old = (torch.arange(n, device=length.device) + 0.5 for n in (size, longest))
    share = 1 - (old - new.view(-1, 1) * scale).abs() / scale.clamp(min=1)
    share = share.clamp(min=0) * (old < length.view(-1, 1, 1))
    return share / share.sum(2, keepdim=True)


class ResidentImages:
    """Images of any size in one row of pixels."""

    def __init__(self, source, device: torch.device, threads: int):
        with ThreadPoolExecutor(max(threads, 1)) as pool:
            loaded = list(pool.map(lambda number: load_or_next(source, number), range(len(source))))
        images, targets, numbers = zip(*((as_tensor(image), *rest) for image, *rest in loaded))
        self.numbers = torch.tensor(numbers)  # of the images that are there: another's where one could not be read
        self.targets = torch.tensor(targets, device=device)
        self.sizes = torch.tensor([image.shape[1:] for image in images])
        lengths = self.sizes.prod(1)
        self.widths, self.starts = self.sizes[:, 1].to(device), (lengths.cumsum(0) - lengths).to(device)
        self.pixels = torch.empty(int(lengths.sum()), 3, dtype=torch.uint8, device=device)
        for image, place in zip(images, self.pixels.split(lengths.tolist())):
            place.copy_(image.permute(1, 2, 0).reshape(-1, 3))

    def crops(self, numbers: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
        """[B], [B, 5] as CropView draws them, both on the host -> [B, 3, size, size], uint8."""
        device = self.pixels.device
        if device.type == 'cpu':
            ends = [self.starts[n] + self.sizes[n].prod() for n in numbers]
            images = [self.pixels[self.starts[n]:end].view(*self.sizes[n], 3).permute(2, 0, 1)
                      for n, end in zip(numbers, ends)]
            return stack([cut(image, *box, size) for image, box in zip(images, boxes.tolist())])
        return torch.cat([self.resample(n, b, size) for n, b in zip(numbers.split(AT_ONCE), boxes.split(AT_ONCE))])

    def resample(self, numbers: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
        """As cut(), by two products of matrices, each rounded. One pixel in a hundred differs by 1, few by 2."""
        longest = boxes[:, 2:4].amax(0).tolist()
        numbers, boxes = (x.to(self.pixels.device, non_blocking=True) for x in (numbers, boxes))
        top, left, height, width, flip = boxes.unbind(1)
        row, column = (torch.arange(n, device=boxes.device) for n in longest)
        row = top.view(-1, 1) + row.minimum(height.view(-1, 1) - 1)  # those beyond the box count nothing
        column = left.view(-1, 1) + column.minimum(width.view(-1, 1) - 1)
        row = self.starts[numbers].view(-1, 1) + row * self.widths[numbers].view(-1, 1)
        image = self.pixels[row.unsqueeze(2) + column.unsqueeze(1)].permute(0, 3, 1, 2).float()  # [B, 3, H, W]
        down, across = (shares(x, n, size).unsqueeze(1) for x, n in zip((height, width), longest))
        across = torch.where(flip.view(-1, 1, 1, 1) == 1, across.flip(2), across)
        return (down @ (image @ across.mT).round_()).round_().byte()
