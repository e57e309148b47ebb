"""Store the images of a folder once, with their shorter side at the size that training needs, to be read faster.

    python scripts/prepare.py /imagenet /imagenet256                              JPEGs, in the same folders
    python scripts/prepare.py /cub /cub256 --format raw                           pixels, 3 bytes each

The main scripts read the copy as any folder. What is in it already is passed over, so the same command goes on with
what was interrupted; it stores an image again whose modification time has changed. Training images that cannot be read
are named in manifest.json and left out, up to a thousandth of all, but one at least; more, one to evaluate, or a class
without any that can, is an error, and the copy is not used until it is mended. Smaller images stay as they are.
Of --size 256 the pixels are those of an evaluation at 224, as it is by default: with --format raw it scores the same to
the digit.
"""
import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import checkpoint, signals
from utils.data import bad_allowed
from utils.sources import Folder, images_in, read

SHARD = 256  # images, some 70 MB


class Damaged(Exception):
    """A file of the copy is not what it should be."""


def shrunk(path: str, size: int) -> Image.Image:
    """As torchvision's Resize makes it, but never larger."""
    image = read(path)
    short, long = sorted(image.size)
    if short <= size:
        return image
    long = int(size * long / short)
    return image.resize((size, long) if image.width <= image.height else (long, size), Image.Resampling.BILINEAR)


def store_jpeg(job: tuple, size: int, quality: int) -> dict:
    """Of one image: {'images': how many are there, 'unreadable': {path: why}}."""
    path, target = job
    image_time = os.stat(path).st_mtime
    if not (whole(target) and same_time(target.stat().st_mtime, image_time)):
        try:
            image = shrunk(path, size)
            with Image.open(path) as original:
                as_it_is = original.format == 'JPEG' and original.size == image.size and whole(Path(path))
        except Exception as error:  # whatever a decoder makes of a broken file
            target.unlink(missing_ok=True)  # of an image that was whole before
            return {'images': 0, 'unreadable': {path: of_the_image(error)}}
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_name(f'{zlib.crc32(target.name.encode()):08x}.tmp')  # no name can be too long for it
        if as_it_is:
            new.write_bytes(Path(path).read_bytes())
        else:
            save(image, new, quality, path)
        if read(new).size != image.size:
            raise Damaged(f'{new} does not read as it was written')
        os.utime(new, (image_time, image_time))  # by which another call knows the image that it is of
        new.rename(target)
    return {'images': 1, 'unreadable': {}}


def same_time(one: float, other: float) -> bool:
    """Some file systems know the time to two seconds."""
    return abs(one - other) <= 2


def of_the_image(error: Exception) -> str:
    """What is wrong with an image; a disk, or rights, that fail are nothing that it could be left out for."""
    if isinstance(error, OSError) and error.errno:
        raise error
    return str(error)


def whole(path: Path) -> bool:
    """Whether a JPEG is there from its first marker to its last; the end may be missing after a power cut."""
    try:
        with open(path, 'rb') as file:
            begin = file.read(2)
            file.seek(-2, os.SEEK_END)
            return begin + file.read() == b'\xff\xd8\xff\xd9'
    except OSError:  # not there, or empty
        return False


def save(image: Image.Image, new: Path, quality: int, source: str):
    try:
        image.save(new, 'JPEG', quality=quality)
    except OSError as error:
        if error.errno:  # of the disk
            raise
        raise Damaged(f'{source} cannot be stored as a JPEG ({error}); remove it, or take --format raw') from None


def store_shard(job: tuple, size: int) -> dict:
    """Of some images: their pixels in a row in one file, then names, classes, heights and widths in another."""
    samples, target = job
    index, times = target.with_suffix('.json'), [os.stat(path).st_mtime for path, *_ in samples]
    if not finished(target, index, samples, times):
        target.parent.mkdir(parents=True, exist_ok=True)
        new, images, unreadable, check = target.with_suffix('.tmp'), [], {}, 0
        with open(new, 'wb') as file:
            for path, name, label in samples:
                try:
                    pixels = np.asarray(shrunk(path, size))
                except Exception as error:
                    unreadable[path] = of_the_image(error)
                    continue
                check = zlib.crc32(pixels.tobytes(), check)
                file.write(pixels.tobytes())
                images.append((name, label, *pixels.shape[:2]))
        if zlib.crc32(new.read_bytes()) != check:
            raise Damaged(f'{new} does not read as it was written')
        new.rename(target)
        write_json(index, {'images': images, 'unreadable': unreadable, 'times': times})
    found = json.loads(index.read_text())
    return {'images': len(found['images']), 'unreadable': found['unreadable']}


def finished(target: Path, index: Path, samples: list, times: list[float]) -> bool:
    """Whether a shard is whole, and of these images; what could not be read may have been mended since."""
    if not index.exists() or not target.exists():
        return False
    try:
        found = json.loads(index.read_text())
        pixels = sum(3 * height * width for *_, height, width in found['images'])
        same = [(name, label) for name, label, *_ in found['images']] == [(name, label) for _, name, label in samples]
        return same and target.stat().st_size == pixels and all(map(same_time, found['times'], times))
    except (ValueError, KeyError, TypeError):  # torn
        return False


def write_json(path: Path, content: dict):
    new = path.with_suffix('.tmp')
    new.write_text(json.dumps(content, indent=1) + '\n')
    new.rename(path)


def jobs_of(source: Path, target: Path, raw: bool) -> tuple[list[str], list]:
    """The classes, and what is to be done for one split."""
    folder = Folder(source)
    names = [os.path.relpath(path, source) for path, _ in folder.samples]
    if not raw:
        named = [name if name.lower().endswith(('.jpg', '.jpeg')) else name + '.jpg' for name in names]
        if twice := [name for name, number in Counter(named).items() if number > 1]:
            sys.exit(f'error: two images of {source} would be {twice[0]} in the copy: rename one')
        return folder.classes, [(path, target / name) for (path, _), name in zip(folder.samples, named)]
    samples = [(path, name, label) for (path, label), name in zip(folder.samples, names)]
    return folder.classes, [(samples[begin:begin + SHARD], target / f'{begin // SHARD:05}.raw')
                            for begin in range(0, len(samples), SHARD)]


def leave_with_parent():
    """A process whose parent was killed, or that kept a signal handler of its parent's, would wait for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the pool ends it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: it is for the parent to tell
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def progress(results, total: int, of: str):
    began = told = time.monotonic()
    for done, result in enumerate(results, 1):
        if time.monotonic() - told > 1 or done == total:
            told = time.monotonic()
            left = (told - began) / done * (total - done)
            print(f'\r{of}: {done:,} of {total:,}, {left / 60:.0f} minutes left ', end='', flush=True)
        yield result
    print()


def stored(target: Path, classes: list[str], raw: bool) -> dict[str, int]:
    """How many images of each class lie in a split of the copy, of all that is there."""
    if raw:
        indexes = [json.loads(path.read_text()) for path in target.glob('*.json')]
        names = [Path(name) for index in indexes for name, *_ in index['images']]
    else:
        names = [Path(path).relative_to(target) for path in (images_in(target) if target.is_dir() else ())]
    found = Counter(name.parts[0] for name in names)
    if others := sorted(found.keys() - {*classes}):
        sys.exit(f'error: {target} holds a class {others[0]}, which is not there any more: remove '
                 f'{target if raw else target / others[0]}')
    return {name: found[name] for name in classes}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path, metavar='SRC', help='folder with train/ and valid/ or val/')
    parser.add_argument('target', type=Path, metavar='DST', help='folder of the copy, new or of an earlier call')
    parser.add_argument('--size', type=int, default=256, metavar='PIXELS', help='of the shorter side (%(default)s)')
    parser.add_argument('--format', choices=('jpeg', 'raw'), default='jpeg',
                        help='JPEGs in the same folders, or pixels, which are read faster and are larger (%(default)s)')
    parser.add_argument('--quality', type=int, default=90, metavar='1..100', help='of the JPEGs (%(default)s)')
    parser.add_argument('--max-bad-images', type=int, metavar='N',
                        help='unreadable training images to leave out (a thousandth of all, but one at least)')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), metavar='N', help='processes (one per core)')
    args = parser.parse_args()
    if args.size < 1 or args.workers < 1 or not 1 <= args.quality <= 100 or (args.max_bad_images or 0) < 0:
        parser.error('--size and --workers must be at least 1, --max-bad-images 0, --quality 1 to 100')
    splits = [name for name in ('train', 'valid', 'val') if (args.source / name).is_dir()]
    if not splits:
        sys.exit(f'error: {args.source} has no train/, valid/ or val/')
    if inside := next((name for name in splits
                       if args.target.resolve().is_relative_to((args.source / name).resolve())), None):
        parser.error(f'{args.target} lies in {args.source / inside}, where it would be one of the classes')
    raw = args.format == 'raw'
    made = {'by': 'scripts/prepare.py', 'format': args.format, 'size': args.size,
            'quality': None if raw else args.quality}
    manifest = args.target / 'manifest.json'
    try:
        if manifest.exists():
            try:
                there = json.loads(manifest.read_text())
            except ValueError:  # torn; what it told of is all looked at again
                there = made
            if not isinstance(there, dict) or {key: there.get(key) for key in made} != made:
                sys.exit(f'error: {args.target} was made otherwise, as its manifest.json tells: remove it, or name '
                         'another folder')
        elif args.target.exists() and not (args.target.is_dir() and {*os.listdir(args.target)} <= {'manifest.tmp'}):
            sys.exit(f'error: {args.target} holds something else: remove it, or name another folder')
        jobs = {split: jobs_of(args.source / split, args.target / split, raw) for split in splits}
        args.target.mkdir(parents=True, exist_ok=True)
        made['source'] = str(args.source.resolve())  # it may be mounted elsewhere the next time
        write_json(manifest, made | {'complete': False})
        convert(args, made, jobs, raw)
    except BrokenProcessPool:
        sys.exit('\nerror: a process was killed, as for want of memory (fewer --workers?); the same command goes on')
    except (OSError, Damaged) as error:
        sys.exit(f'\nerror: {args.source} to {args.target}: {error} ({checkpoint.free(manifest)})')
    except KeyboardInterrupt:
        print('\nstopped; the same command goes on', file=sys.stderr)
        sys.exit(signals.EXIT_INTERRUPTED)


def convert(args, made: dict, jobs: dict, raw: bool):
    store = partial(store_shard, size=args.size) if raw else partial(store_jpeg, size=args.size, quality=args.quality)
    counts, unreadable = {}, {}
    for split, (classes, of_split) in jobs.items():
        with ProcessPoolExecutor(args.workers, initializer=leave_with_parent) as pool:
            try:
                results = list(progress(pool.map(store, of_split, chunksize=1 if raw else 16), len(of_split), split))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        counts[split] = stored(args.target / split, classes, raw)
        expected, found = sum(result['images'] for result in results), sum(counts[split].values())
        if expected != found:
            sys.exit(f'error: {args.target / split} holds {found} images instead of {expected}: remove those that are '
                     'not there any more, or all of it')
        for result in results:
            unreadable |= result['unreadable']
    total = sum(sum(of_split.values()) for of_split in counts.values())
    unscored = [path for path in unreadable if Path(path).relative_to(args.source).parts[0] != 'train']
    left_out, train = len(unreadable) - len(unscored), sum(counts.get('train', {}).values())
    allowed = bad_allowed(args, train + left_out)
    problem = next((f'not one image of {args.source / split / name} can be read' for split, of_split in counts.items()
                    for name, number in of_split.items() if not number), '')
    if unscored and not problem:
        problem = (f'of the images to evaluate {len(unscored)} cannot be read, and a score of the others would be of '
                   'other data: mend or remove them, and start again')
    if left_out > allowed and not problem:
        problem = f'{left_out} training images cannot be read, more than --max-bad-images {allowed} allows'
    write_json(args.target / 'manifest.json', made | {'complete': not problem, 'images': counts,
                                                      'unreadable': dict(sorted(unreadable.items()))})
    for path, why in sorted(unreadable.items()):
        print(f'{path} cannot be read: {why}', file=sys.stderr)
    print(f'{args.target}: {total:,} images' + f', {len(unreadable)} cannot be read' * bool(unreadable))
    if problem:
        sys.exit(f'error: {problem}')


if __name__ == '__main__':
    main()
