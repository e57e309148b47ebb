"""The tables of --inspect: what there is, in rows of text."""
import textwrap
from collections import Counter
from datetime import timedelta
from statistics import median

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from utils.args import shorter_side
from utils.cost import memory
from utils.optim import learning_rate, total_epochs
from utils.order import TrainOrder, spread
from utils.run import Run
from utils.sources import Folder
from utils.views import statistics

from .base import Distillation, evaluating, probe_image
from .flags import first_line, flag, hyper_parameters

WIDTH = 112  # of what is printed
DECODED = 64  # images of each split


def at_data(sources: dict) -> tuple[list[tuple], dict[str, list[str]]]:
    """The rows of the table, and for each split what is wrong with images that cannot be read."""
    columns, wrong = [], {}
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
        wrong[split] = broken
        counts = dict.fromkeys(source.classes, 0) | Counter(source.classes[target] for target in source.targets)
        least, most = (f(counts, key=counts.get) for f in (min, max))
        sides = ['/'.join(f'{f(side):g}' for f in (min, median, max)) for side in zip(*sizes)] or ['-', '-']
        columns.append((split, f'{len(source):,}', str(len(source.classes)), f'{counts[least]:,} ({short(least)})',
                        f'{counts[most]:,} ({short(most)})', str(len(picked)), *sides,
                        ', '.join(f'{mode} {number}' for mode, number in modes.most_common()) or '-', str(len(broken))))
    names = ('', 'images', 'classes', 'smallest class', 'largest class', 'decoded', 'width (min/median/max)',
             'height', 'mode', 'unreadable')
    return list(zip(names, *columns)), wrong


@torch.no_grad()
def at_network(network: nn.Module, image_size: int) -> dict[str, str]:
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


def side_by_side(columns: dict[str, dict[str, str]], args) -> list[tuple]:
    """What at_network and a score told of each network."""
    heads = [f'{name}: {args.teacher_arch if name == "teacher" else args.arch}' for name in columns]
    longest = sorted(columns.values(), key=len, reverse=True)  # which has all of its stages in their place
    rows = dict.fromkeys(row for column in longest for row in column)
    return [('', *heads), *((row, *(column.get(row, '') for column in columns.values())) for row in rows)]


def at_methods(made: Distillation, maps_s: list, maps_t: list, args) -> list[tuple]:
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


def at_schedule(order: TrainOrder, real: bool, run: Run, args) -> list[tuple]:
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
    rows.append(('images', how_seen(args)))
    if real:
        rows.insert(1, ('updates', f'{order.updates():,} per epoch, {order.updates() * epochs:,} in all'))
    return rows


def how_seen(args) -> str:
    mean, std = statistics(args)
    square = f'a square of {args.image_size / shorter_side(args):.0%} of the shorter side'
    train = {'resized': f'{args.crop_area:.0%} to 100 % of the area', 'random': f'{square}, anywhere',
             'centre': f'{square} in the middle'}[args.crop]
    valid = f'shorter side to {shorter_side(args)} pixels, of which the middle'
    if args.dataset != 'imagefolder':
        train, valid = 'shifted by up to 4 pixels', 'as they are'
    return f'training {train}, {args.flip:.0%} mirrored; evaluation {valid}; mean {mean}, std {std}'


def at_cost(cost: dict, n: int, order: TrainOrder, scored: int, loader, run: Run, args) -> list[tuple]:
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


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def size(content) -> int:
    """Bytes of the tensors in a state dict."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return sum(map(size, parts))


def run_files(run: Run) -> tuple[int, int]:
    """Bytes of the weights alone, and of a checkpoint."""
    return size(run.shipped().state_dict()), sum(size(part.state_dict()) for part in run.parts.values())
