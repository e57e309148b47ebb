"""From image files to batches that a device could normalise, in CPU time of this process and its workers.

With a GPU also its decoder against the CPU's, in wall-clock time.
"""
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torchvision.io import decode_jpeg

from utils.args import base_parser, check
from utils.crops import ResidentImages
from utils.data import CropLoader, Images, dismiss_workers, make_loader
from utils.order import TrainOrder
from utils.sources import load_source
from utils.views import STATISTICS, CropView

from .harness import ROOT, Case, Limit, Row, Settings, Variant, copy_rate, spent
from .plain import plain_loader


def photo(rng, width: int, height: int) -> Image.Image:
    """Blotches of all sizes, the larger the stronger, and some noise of a sensor: as hard to compress as a photo."""
    pixels = np.full((height, width, 3), 120.0)
    for octave in range(1, 9):
        coarse = rng.normal(0, 70 / octave ** 1.2, (2 ** octave, 2 ** octave, 3)).clip(-128, 127) + 128
        image = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(image, float) - 128
    return Image.fromarray((pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8))


def write_folder(root: Path, images: int, different: int, width: int, height: int):
    """An image folder of two classes, in which each image is there several times."""
    for number in range(different):
        drawn = photo(np.random.default_rng(number), *((width, height) if number % 4 else (height, width)))
        for name in range(number, images, different):
            path = root / 'train' / 'ab'[number % 2] / f'{name}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.save(path, quality=90)
    (root / 'valid').symlink_to('train')


def prepare(source: Path, form: str) -> Path:
    target = source.parent / form
    subprocess.run([sys.executable, ROOT / 'scripts' / 'prepare.py', source, target, '--format', form],
                   check=True, stdout=subprocess.DEVNULL)
    return target


class Colours:
    """Mean and deviation of every channel, from some of the pixels, on a scale to 255."""

    def __init__(self):
        self.pixels = []

    def see(self, images):
        self.pixels.append(images[:, :, ::16, ::16].double().transpose(0, 1).flatten(1).cpu())

    def result(self, mean=(0, 0, 0), std=(1, 1, 1), scale=1) -> dict:
        pixels = torch.cat(self.pixels, 1)
        mean, std = (torch.tensor(x, dtype=torch.float64) for x in (mean, std))
        return {'mean': scale * (pixels.mean(1) * std + mean), 'std': scale * pixels.std(1) * std}


def loader(settings: Settings, images=1024, different=128, width=500, height=375, batch=64) -> Case:
    kept = TemporaryDirectory()
    folder = Path(kept.name) / 'images'
    write_folder(folder, images, different, width, height)

    def classic():
        colours = Colours()
        # By kept, and not by folder: so the temporary folder stays as long as this function does.
        for seen, _ in plain_loader(Path(kept.name) / 'images' / 'train', batch, workers=1):
            colours.see(seen)
        return colours.result(*STATISTICS['imagefolder'], scale=255)

    def ours(root: Path, workers: int, resident=False, flags=()):
        parser = base_parser('')
        args = check(parser, parser.parse_args([str(root), '-j', str(workers), *flags]))
        source, order = load_source(args, train=True), TrainOrder(images, batch, 1, 0, 0, 1)
        data = Images(source, CropView(args, seed=0))
        held = ResidentImages(source, settings.device, 1) if resident else None

        def run():
            colours, loaded = Colours(), CropLoader(data, order, held) if resident else make_loader(data, order, args)
            for seen in loaded:
                colours.see(seen.images)
            if workers:
                dismiss_workers(loaded)  # what they have spent is known when they have gone
            return colours.result()
        return Variant(run, clock=spent)

    jpeg, raw = (prepare(folder, form) for form in ('jpeg', 'raw'))
    variants = {
        'classic': Variant(classic, clock=spent, theirs=True),
        'folder': ours(folder, 1),
        'folder, exact pixels': ours(folder, 1, flags=['--exact-pixels']),
        'prepared': ours(jpeg, 1),
        'raw': ours(raw, 0),
        'raw, on the device': ours(raw, 0, resident=True),
    }
    row = partial(Row, baseline='classic', tolerance=0.05)  # other crops of the same images
    rows = [row('folder', goal=1.9), row('folder, exact pixels', goal=None), row('prepared', goal=3.0),
            row('raw', goal=8.0), row('raw, on the device', goal=None)]

    def limit():
        decoded = {'folder': decoding_time(folder), 'prepared': decoding_time(jpeg)}
        copied = dict.fromkeys(('raw', 'raw, on the device'), 2 * images * 3 * 224**2 / copy_rate(torch.device('cpu')))
        return Limit('JPEGs decoded from memory, nothing else; raw pixels of the batches read and written, at the rate '
                     'of a large copy', decoded | copied)
    if settings.device.type != 'cuda':
        return Case(variants, rows, limit=limit)
    decoders, more, skipped = decoding(folder, settings.device, batch)
    return Case(variants | decoders, rows + more, limit=limit, skipped=skipped)


def in_memory(folder: Path) -> list[torch.Tensor]:
    return [torch.from_numpy(np.fromfile(path, np.uint8)) for path in sorted((folder / 'train').rglob('*.jpg'))]


def decoding_time(folder: Path) -> float:
    files, start = in_memory(folder), spent()
    for file in files:
        decode_jpeg(file)
    return 1e3 * (spent() - start)


def decoding(folder: Path, device: torch.device, batch: int) -> tuple[dict[str, Variant], list[Row], tuple[str, ...]]:
    """JPEGs that lie in memory, to pixels where the decoder has them: in that of the host, or of the device.

    The speed-up over one core is how many cores nvJPEG stands for, while the device does nothing else; over all cores
    it counts what they do at once. Reading, cropping, and the copy of the CPU's pixels are left out.
    """
    files = in_memory(folder)
    parts, cores = [files[i:i + batch] for i in range(0, len(files), batch)], os.cpu_count()
    pool = ThreadPoolExecutor(cores)
    decoders = {'nvJPEG': lambda part: decode_jpeg(part, device=device), 'JPEGs, one core': decode_jpeg,
                f'JPEGs, {cores} cores': lambda part: list(pool.map(decode_jpeg, part))}
    try:
        decoders['nvJPEG'](files[:1])
    except RuntimeError as error:
        return {}, [], (f'nvJPEG: {str(error).splitlines()[0]}',)

    def variant(decode):
        def run():
            for part in parts:
                images = decode(part)
            return {'colours': images[0].float().mean((1, 2)).cpu()}  # of one, which waits for the device to have all
        return Variant(run, clock=time.perf_counter)
    ours, *others = decoders
    rows = [Row(ours, other, None, tolerance=0.02) for other in others]
    return {name: variant(decode) for name, decode in decoders.items()}, rows, ()
