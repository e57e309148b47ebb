"""Draw a small image folder to learn from: DIR/train/<class>/<n>.jpg and DIR/valid/<class>/<n>.jpg.

    python scripts/make_images.py data/shapes

A class is a shape and a texture: `ring_striped` resembles `ring_checked` and `disc_striped`, so a teacher has something
to tell beyond the label. Place, size, turn, colours, background, clutter, noise and JPEG quality say nothing about the
class. Every picture is a function of (seed, split, class, n) and of nothing else, so the order of drawing is free.
"""
import argparse
import json
from pathlib import Path

import numpy as np
from logs import refuse
from PIL import Image

RECIPE = 1  # raise it when the drawing changes: a folder of the old drawing is then no longer taken for the new one
OVERSAMPLE = 3  # each pixel is the mean of 3 x 3 samples, which smooths the edges


def polygon(x, y, sides):
    """Inside a regular polygon with its corners on the unit circle."""
    wedge = 2 * np.pi / sides
    angle = np.arctan2(x, -y) % wedge - wedge / 2  # from the upper corner, y points down
    return np.hypot(x, y) * np.cos(angle) < np.cos(wedge / 2)


def star(x, y, points=5, inner=0.45):
    """Inside a star: folded to half a point, it is one side of the line from the tip to the inner corner."""
    half = np.pi / points
    angle, radius = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half), np.hypot(x, y)
    tip_x, tip_y = inner * np.cos(half) - 1, inner * np.sin(half)
    return tip_x * radius * np.sin(angle) - tip_y * (radius * np.cos(angle) - 1) > 0


# A shape lives in the unit circle. Areas differ less by shape than by radius, so the mean colour tells little.
SHAPES = {
    'disc': lambda x, y: np.hypot(x, y) < 0.85,
    'ring': lambda x, y: np.abs(np.hypot(x, y) - 0.72) < 0.26,
    'square': lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.75,
    'triangle': lambda x, y: polygon(x, y, 3),
    'star': star,
    'cross': lambda x, y: (np.minimum(np.abs(x), np.abs(y)) < 0.32) & (np.maximum(np.abs(x), np.abs(y)) < 0.92),
    'hexagon': lambda x, y: polygon(x, y, 6),
    'moon': lambda x, y: (np.hypot(x, y) < 0.95) & (np.hypot(x - 0.5, y) > 0.65),
}

# A texture tells where the first of the two colours goes; its period is 1.
TEXTURES = {
    'plain': lambda x, y: np.ones_like(x, dtype=bool),
    'striped': lambda x, y: x % 1 < 0.5,
    'checked': lambda x, y: (x % 1 < 0.5) ^ (y % 1 < 0.5),
    'dotted': lambda x, y: np.hypot(x % 1 - 0.5, y % 1 - 0.5) > 0.31,
}

BRIGHTNESS = np.array([[0.85], [0.45], [0.15]])  # of the two colours of a thing, and of the ground

CLASSES = [f'{shape}_{texture}' for shape in SHAPES for texture in TEXTURES]


def tilted(x, y, rng):
    """A little askew: at any angle, learning needs far more images."""
    return turned(x, y, rng.uniform(-0.4, 0.4))


def turned(x, y, angle):
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def paint(canvas, rng, shape, texture, centre, radius, colours):
    """Paint one thing onto the canvas [H, W, 3], in place. Centre and radius are in widths of the canvas."""
    size = len(canvas)
    low = np.clip(np.floor((centre - radius) * size), 0, size).astype(int)  # nothing is computed outside this window
    high = np.clip(np.ceil((centre + radius) * size), 0, size).astype(int)
    axes = (np.arange(a * OVERSAMPLE, b * OVERSAMPLE) for a, b in zip(low, high, strict=True))
    x, y = (((axis + 0.5) / OVERSAMPLE / size - c) / radius for axis, c in zip(axes, centre, strict=True))
    x, y = tilted(*np.meshgrid(x, y), rng)
    inside = SHAPES[shape](x, y)
    u, v = tilted(x, y, rng)
    period = rng.uniform(0.45, 0.65)
    first = TEXTURES[texture](u / period + rng.random(), v / period + rng.random())

    window = canvas[low[1]:high[1], low[0]:high[0]]
    height, width = window.shape[:2]

    def coverage(mask):
        return mask.reshape(height, OVERSAMPLE, width, OVERSAMPLE).mean((1, 3))[..., None]

    one, two = coverage(inside & first), coverage(inside & ~first)
    window[:] = window * (1 - one - two) + one * colours[0] + two * colours[1]


def background(rng, size, colour):
    """A colour that drifts across the picture, under soft blotches."""
    x, _ = turned(*np.meshgrid(*[np.linspace(-0.5, 0.5, size)] * 2), rng.uniform(-np.pi, np.pi))
    drift = x[..., None] * rng.uniform(-0.3, 0.3, 3)
    coarse = Image.fromarray(rng.normal(0, 0.06, (6, 6)).astype(np.float32))
    return colour + drift + np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))[..., None]


def draw(seed, split, label, n, size):
    """The n-th picture of a class, and its JPEG quality."""
    rng = np.random.default_rng([seed, split, label, n])
    # Any hue, but always light on dark: with free brightness as well, a small training does not get away from chance.
    first, second, ground = np.clip(BRIGHTNESS + rng.uniform(-0.25, 0.25, (3, 3)), 0, 1)
    canvas = background(rng, size, ground)
    for _ in range(rng.integers(2, 7)):  # clutter: small things of any class
        scrap = rng.choice(CLASSES).split('_')
        paint(canvas, rng, *scrap, rng.random(2), rng.uniform(0.05, 0.11), ground + rng.uniform(-0.35, 0.35, (2, 3)))
    radius = rng.uniform(0.26, 0.45)
    paint(canvas, rng, *CLASSES[label].split('_'), rng.uniform(radius, 1 - radius, 2), radius, (first, second))
    canvas += rng.normal(0, rng.uniform(0.01, 0.05), canvas.shape)
    pixels = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels), int(rng.integers(60, 96))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('dir', type=Path, metavar='DIR')
    parser.add_argument('--classes', type=int, default=20, help=f'at most {len(CLASSES)} (%(default)s)')
    parser.add_argument('--train', type=int, default=60, help='training images per class (%(default)s)')
    parser.add_argument('--valid', type=int, default=20, help='validation images per class (%(default)s)')
    parser.add_argument('--size', type=int, default=64, help='width and height in pixels (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='another seed, other images (%(default)s)')
    args = parser.parse_args()
    if not 2 <= args.classes <= len(CLASSES):
        parser.error(f'--classes must be 2 to {len(CLASSES)}')
    if min(args.train, args.valid) < 1 or args.size < 16 or args.seed < 0:
        parser.error('--train and --valid must be at least 1, --size at least 16, --seed at least 0')

    root = args.dir
    jobs = {f'{split}/{CLASSES[label]}/{n}.jpg': (number, label, n)
            for number, (split, count) in enumerate([('train', args.train), ('valid', args.valid)])
            for label in range(args.classes)
            for n in range(count)}
    recipe = {'recipe': RECIPE} | {name: value for name, value in vars(args).items() if name != 'dir'}
    drawing, made_by, manifest = root / 'drawing.json', root / 'made_by.json', json.dumps(recipe) + '\n'

    def says(path):
        return path.is_file() and path.read_text() == manifest

    try:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            # The manifest gets its name last: it vouches for its images unless somebody added or removed some since.
            found = {path.relative_to(root).as_posix() for path in root.glob('*/*/*')}
            if says(made_by) and found == set(jobs):
                print(f'{root}: {len(jobs)} images in {args.classes} classes are there already')
                return
            if not says(drawing):  # else we were stopped while drawing, and draw again
                refuse(f'{root} holds something else than these images: remove it, or name another folder')
        root.mkdir(parents=True, exist_ok=True)
        drawing.write_text(manifest)
        for path, job in jobs.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            image, quality = draw(args.seed, *job, args.size)
            image.save(root / path, quality=quality)
        drawing.rename(made_by)
    except OSError as error:
        refuse(f'{error.filename or root}: {error.strerror}')
    print(f'{root}: {len(jobs)} images in {args.classes} classes')


if __name__ == '__main__':
    main()
