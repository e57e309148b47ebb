"""Draw how two networks see the validation images: t-SNE of their features, correlations of classes, activation maps.

    python scripts/visualize.py DIR --arch S --student-resume A.pth --teacher-arch T --teacher-resume B.pth -o pictures

Both tell the same classes. The flags are those of main_base.py, to evaluate; scripts/plot.py draws the curves of the
training.
"""
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from plot import STYLE, matplotlib, plt
from tsne import tsne

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distillers.base import probe
from distillers.networks import add_stage_flags, build_student, build_teacher
from utils import checkpoint, distributed, setup, signals
from utils.args import base_parser, check, count
from utils.data import Prepare, load_data
from utils.order import spread
from utils.randomness import seed_everything
from utils.run import tell_seen

TSNE_CLASSES, TSNE_IMAGES = 10, 1000  # what colours can tell apart and a CPU places in seconds
COLUMNS = 8  # images in a row of the activation maps


class Seen(NamedTuple):
    """What the networks, the teacher first, make of the validation images."""
    names: list[str]
    classes: list[str]  # of every output
    targets: torch.Tensor  # [N]
    logits: list[torch.Tensor]  # [N, K]
    placed: list[int]  # numbers of the images that t-SNE places
    pooled: list[torch.Tensor]  # their features, [n, C]
    images: torch.Tensor  # a few, [m, 3, H, W] of uint8
    shown: list[int]  # their numbers
    cams: list[torch.Tensor]  # of the class that the teacher takes them for, [m, h, w], if both have some


def main():
    parser = base_parser(f'{__doc__.splitlines()[0]} Of the flags of training those of data, network and launch count.')
    parser.conflict_handler = 'resolve'  # --output is no run's folder here
    g = parser.add_argument_group('pictures')
    g.add_argument('-o', '--output', default='pictures', metavar='DIR', help='folder of the pictures')
    g.add_argument('--images', type=count, default=8, metavar='N', help='images to draw activation maps of')
    add_stage_flags(g)
    args = check(parser, parser.parse_args())
    if not (args.student_resume or args.pretrained or args.dummy):
        parser.error("the student's weights are missing: --student-resume PATH (or --pretrained)")
    if args.seeds:
        parser.error('--seeds: there is nothing to train; --seed is of --dummy')
    args.evaluate = True
    distributed.launch(worker, args)


def worker(args, device):
    if distributed.world() > 1:
        distributed.stop('a single process draws: leave torchrun and --multiprocessing-distributed')
    setup.configure(args, device)
    _, valid, classes = load_data(args, 0, device)
    if len(valid.dataset) < 2:
        sys.exit('error: one validation image is too few to compare anything')
    outputs = args.num_classes or len(classes)

    networks = {}
    for role, arch, build, path, pretrained in (
            ('Teacher', args.teacher_arch, build_teacher, args.teacher_resume, not (args.teacher_resume or args.dummy)),
            ('Student', args.arch, build_student, args.student_resume, args.pretrained)):
        seed_everything(args.seed or 0, role)
        network = setup.place(build(args, outputs, pretrained, shows=True), device, args).eval()
        network.image_size = args.image_size
        networks[f'{role} {arch}'] = network
        if path:
            checkpoint.load_weights(network, path, arch, classes)
    tell_seen(args.student_resume, args)
    classes = [*classes, *(f'output {i}' for i in range(len(classes), outputs))]
    pictures = {'tsne': draw_tsne, 'correlation': draw_correlation, 'cam': draw_cams}
    if outputs < 2:
        del pictures['correlation']
        print('note: no correlation of classes is drawn: there is one')
    if without := [f'{name}: {why}' for name, network in networks.items() if (why := why_no_cams(network))]:
        del pictures['cam']
        print(f'note: no activation maps are drawn; {"; ".join(without)}')

    seen = look(networks, classes, valid, Prepare(args, device), device, 'cam' in pictures, args)
    plt.rcParams.update(STYLE)
    folder = Path(args.output)
    for name, draw in pictures.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draw(seen).savefig(folder / f'{name}.png', dpi=150, bbox_inches='tight')
        except OSError as error:
            sys.exit(f'error: cannot write to {folder}: {error.strerror}')
        print(folder / f'{name}.png', flush=True)


@torch.no_grad()
def look(networks, classes, loader, prepare, device, with_cams, args) -> Seen:
    targets = torch.tensor(loader.dataset.source.targets)
    placed, shown = some_of_some_classes(targets), spread(len(targets), args.images)
    logits, pooled, cams = ([[] for _ in networks] for _ in range(3))
    for batch in loader:
        if signals.caught():
            sys.exit(signals.EXIT_INTERRUPTED)
        if (batch.bad >= 0).any():
            sys.exit(f'error: {loader.dataset.complaint(int(batch.bad.max()))}')
        to_place, to_show = (torch.isin(batch.index.cpu(), torch.tensor(numbers)) for numbers in (placed, shown))
        ready, guess = prepare(batch).images, None
        for i, network in enumerate(networks.values()):
            with setup.precision(device, args.amp):
                features = network(ready, features=True)
            guess = features.logits.argmax(1) if guess is None else guess  # the teacher's
            logits[i].append(features.logits.float().cpu())
            pooled[i].append(features.pooled[to_place].float().cpu())
            if with_cams:
                cams[i].append(cam(network.classifier.weight, features.head[to_show], guess[to_show]).cpu())
    logits, pooled, cams = ([torch.cat(parts) for parts in kind if parts] for kind in (logits, pooled, cams))
    images = torch.stack([loader.dataset[0, number].images for number in shown])
    return Seen(list(networks), classes, targets, logits, placed, pooled, images, shown, cams)


def some_of_some_classes(targets) -> list[int]:
    present = targets.unique()
    kept = present[spread(len(present), TSNE_CLASSES)]
    return sorted(i for c in kept for i in (targets == c).nonzero()[:TSNE_IMAGES // len(kept), 0].tolist())


# t-SNE

def draw_tsne(seen: Seen):
    """Features of the same images side by side, the student's turned and mirrored to resemble the teacher's."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 5.6), layout='constrained')
    targets = seen.targets[seen.placed]
    teacher, student = (y / y.square().mean().sqrt() for y in map(tsne, seen.pooled))
    left, _, right = torch.linalg.svd(student.T @ teacher)
    for axes, name, logits, y in zip(panels, seen.names, seen.logits, (teacher, student @ left @ right)):
        for c, colour in zip(targets.unique().tolist(), matplotlib.colormaps['tab10'].colors):
            axes.scatter(*y[targets == c].T, s=max(4, min(36, 6000 / len(y))), color=colour, alpha=0.8, linewidths=0,
                         label=' ' * seen.classes[c].startswith('_') + seen.classes[c])  # which a legend leaves out
        axes.set_title(f'{name}, top-1 {100 * (logits.argmax(1) == seen.targets).float().mean():.2f} %')
        axes.set(xticks=[], yticks=[], aspect='equal')
        axes.spines[:].set_visible(False)
    legend = figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=5)
    for handle in legend.legend_handles:
        handle.set_sizes([30])
    return figure


# Correlations of classes

def correlation(logits):
    """[N, K] -> [K, K]; a logit that never changes goes with none."""
    return torch.corrcoef(logits.T.double()).nan_to_num(0)


def neighbours_together(r):
    """An order of the classes that brings correlated ones together: by the second eigenvector of the Laplacian."""
    order = torch.linalg.eigh(torch.diag((1 + r).sum(1)) - (1 + r)).eigenvectors[:, 1].argsort()
    return order if order[0] < order[-1] else order.flip(0)  # an eigenvector has no sign


def draw_correlation(seen: Seen):
    teacher, student = map(correlation, seen.logits)
    difference = (teacher - student).abs()
    k = len(difference)
    mean = difference.sum().item() / (k * (k - 1))  # the diagonal is 0 whatever they learned
    order = neighbours_together(teacher)
    figure, panels = plt.subplots(1, 3, figsize=(14, 5), layout='constrained')
    signed, positive = {'cmap': 'RdBu_r', 'vmin': -1, 'vmax': 1}, {'cmap': 'magma_r', 'vmin': 0, 'vmax': 1}
    for axes, title, matrix, scale in ((panels[0], seen.names[0], teacher, signed),
                                       (panels[1], seen.names[1], student, signed),
                                       (panels[2], f'Absolute difference, mean {mean:.4f}', difference, positive)):
        picture = axes.imshow(matrix[order][:, order], interpolation='nearest', **scale)
        figure.colorbar(picture, ax=axes, shrink=0.8, aspect=30).outline.set_visible(False)
        axes.set_title(title)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        few = range(k if k <= 20 else 0)
        axes.set_xticks(few, [seen.classes[order[i]] for i in few], rotation=90)
        axes.set_yticks(few, [seen.classes[order[i]] if axes is panels[0] else '' for i in few])
        axes.set_xlabel('' if few else f'{k} classes, those that the teacher correlates side by side')
    return figure


# Class activation maps

def why_no_cams(network) -> str:
    """What speaks against those of this network, if something does."""
    try:
        network.classifier  # noqa: B018, it may have none that tells
    except ValueError as error:
        return str(error)
    return 'what it classifies is a map of one pixel' if probe(network).head.shape[2:].numel() == 1 else ''


def cam(weight, head, classes):
    """relu(sum_d W[c, d] * F_d) of a class for each image: [K, C], [n, C, h, w], [n] -> [n, h, w]"""
    return torch.einsum('nc,nchw->nhw', weight[classes].float(), head.float()).relu()


def draw_cams(seen: Seen):
    """Each image, and over it where the teacher and the student find the class that the teacher takes it for."""
    n, height, width = len(seen.images), *seen.images.shape[2:]
    columns = min(n, COLUMNS)
    bands = -(-n // columns)
    figure, grid = plt.subplots(3 * bands, columns, figsize=(1.5 * columns + 0.6, 5.1 * bands), squeeze=False,
                                layout='constrained')
    probabilities = [logits[seen.shown].float().softmax(1) for logits in seen.logits]
    guess = probabilities[0].argmax(1)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.grid(False)
    for i, picture in enumerate(seen.images.permute(0, 2, 3, 1)):
        image, *overlays = grid[3 * (i // columns):, i % columns][:3]
        image.imshow(picture)
        image.set_title(seen.classes[seen.targets[seen.shown[i]]], fontsize=8)
        for axes, p, maps in zip(overlays, probabilities, seen.cams):
            axes.imshow(picture.float().mean(2), cmap='gray', vmin=0, vmax=255)
            axes.imshow(maps[i], cmap='inferno', alpha=0.6, vmin=0, vmax=maps[i].max().clamp(min=1e-12),
                        extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation='bilinear')
            axes.set_title(f'{seen.classes[guess[i]]} {100 * p[i, guess[i]]:.0f} %', fontsize=8, fontweight='normal')
    for band in range(bands):
        for axes, name in zip(grid[3 * band:, 0], ('Image', *seen.names)):
            axes.set_ylabel(name.replace(' ', '\n'), fontweight='bold')
    return figure


if __name__ == '__main__':
    main()
