"""The networks of a run, as its flags name them. What is wrong with one ends the run in a line."""
import json
import pickle
import sys
from argparse import Namespace
from pathlib import Path

import torch

from models import NETWORKS, Foreign, Renormalised, create_model, refuse_other_outputs
from models.errors import blame, line
from utils import checkpoint, distributed
from utils.errors import one_line
from utils.folder import arguments_beside
from utils.views import statistics

from . import DISTILLERS
from .base import evaluating


def add_stage_flags(group):
    for whose in ('student', 'teacher'):
        group.add_argument(f'--{whose}-stages', type=lambda text: text.split(','), metavar='PATH,PATH,...',
                           help='modules of a network from elsewhere, by their names in it, whose outputs are its maps '
                                '(default: found by a probe)')


def is_function(arch):
    return ':' in arch and not arch.startswith(('torchvision:', 'timm:'))


def starts_fresh(arch, classes):
    """Whether published weights lack a classifier for so many classes."""
    return classes != 1000 and not is_function(arch)


def build(arch, classes, pretrained=False):
    """A network by name (models/__init__.py)."""
    if pretrained and is_function(arch):
        distributed.say(f'note: the weights of {arch} are those that it returns')
    elif pretrained and starts_fresh(arch, classes):
        distributed.say(f'note: the pretrained classifier of {arch} has 1000 outputs; one with {classes} starts fresh')
    try:
        return create_model(arch, classes, pretrained)
    except ValueError as error:
        sys.exit(f'error: {arch}: {error}')
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if not pretrained:
            raise
        sys.exit(f'error: {arch}: its published weights cannot be had: {line(error)}. Remove a damaged file of them in '
                 f'{torch.hub.get_dir()} (TORCH_HOME), or name another: --student-resume, --teacher-resume')


def tell_namesake(arch, args):
    """Of ImageNet's network where CIFAR's of that name is likely to be meant."""
    if args.dataset != 'imagefolder' and f'cifar_{arch}' in NETWORKS:
        distributed.say(f"note: {arch} is ImageNet's, whose stem leaves a quarter of the side; CIFAR's is cifar_{arch}")


def build_student(args, classes, pretrained=False, shows=False):
    """shows: whether it has to show its features; so with the teacher."""
    network = build(args.arch, classes, pretrained)
    tell_namesake(args.arch, args)
    given = statistics(args)
    published = pretrained and images_of(network, args.image_size)
    if published and published[:2] != given:
        distributed.say(f'note: {args.arch} was published for images of mean {published[0]} and std {published[1]}; '
                        f'as a student it gets those of mean {given[0]} and std {given[1]} (--mean, --std)')
    try_out(network, args.arch, classes, f'--image-size {args.image_size}', args.image_size)
    if not (args.evaluate or any(p.requires_grad for p in network.parameters())):
        sys.exit(f'error: {args.arch} has nothing to train: none of its parameters has requires_grad')
    return showing(network, args.arch, classes, args.student_stages, args.image_size) if shows else network


def build_teacher(args, classes, pretrained=False, shows=False):
    """The teacher, for the student's images: it gets them normalised, and of the size, as it was trained."""
    methods = {name: DISTILLERS[name] for name in getattr(args, 'distiller', [])}
    needy = [name for name, method in methods.items() if 'logits' in (method.teacher_reads or ())]
    if needy and classes < 2:
        sys.exit(f'error: --distiller {" ".join(needy)} compares classes, and there is one')
    needy += [name for name, method in methods.items() if method.teacher_kept == 'classifier']
    if needy and pretrained and starts_fresh(args.teacher_arch, classes):
        sys.exit(f'error: as published {args.teacher_arch} does not know these {classes} classes, but --distiller '
                 f'{" ".join(needy)} goes by its classifier: train it on them (main_base.py --arch {args.teacher_arch} '
                 '--pretrained), and name its weights with --teacher-resume')
    network, given = build(args.teacher_arch, classes, pretrained), statistics(args)
    tell_namesake(args.teacher_arch, args)
    of_student = (*given, args.image_size)
    published = images_of(network, args.image_size) or of_student
    if not pretrained and published != of_student:
        distributed.say(f'note: {args.teacher_arch} was published for images of mean {published[0]}, std '
                        f'{published[1]} and {published[2]} pixels; if its weights are, too, tell it by '
                        '--teacher-mean, --teacher-std, --teacher-size')
    mean, std, size = published if pretrained else of_student  # a file's weights need not be from where the network is
    wanted = tuple(args.teacher_mean or mean), tuple(args.teacher_std or std)
    size = args.teacher_size or size
    tell_other_images(args.teacher_resume, *wanted, size)
    try_out(network, args.teacher_arch, classes, f'--teacher-size {size}', size)
    if shows:
        network = showing(network, args.teacher_arch, classes, args.teacher_stages, size)
    if (wanted, size) == (given, args.image_size):
        return network
    network = Renormalised(network, given, wanted, size)
    distributed.say(f'{args.teacher_arch}{network.identity}')
    return network


def tell_other_images(weights, mean, std, size):
    """Say so where the run that a teacher's file is from had images of another mean, std or size than these."""
    if run := arguments_beside(weights):
        known = *statistics(Namespace(**run)), run['image_size']
        if known != (mean, std, size):
            distributed.say('note: {} was trained on images of mean {}, std {} and {} pixels, '.format(weights, *known)
                            + f'and gets such of mean {mean}, std {std} and {size} pixels here (--teacher-mean, '
                            '--teacher-std, --teacher-size)')


def images_of(network, size):
    """Mean, std and size of the images that a network was published for; torchvision's are for any size."""
    if of_timm := getattr(network, 'pretrained_cfg', None):
        return tuple(of_timm['mean']), tuple(of_timm['std']), of_timm['input_size'][-1]
    statistics = getattr(network, 'image_statistics', None)
    return statistics and (*statistics, size)


@torch.no_grad()
def try_out(network, arch, classes, flag, size):
    """Refuse a network that makes something else than logits of one image, or whose state is more than tensors."""
    if odd := [name for name, value in network.state_dict().items() if not isinstance(value, torch.Tensor)]:
        sys.exit(f'error: {arch}: {odd[0]} of its state is no tensor (get_extra_state), which no file of weights holds')
    with evaluating(network):
        try:
            refuse_other_outputs(network(torch.zeros(1, 3, size, size)), classes)
        except ValueError as error:
            sys.exit(f'error: {arch}: {error}')
        except Exception as error:  # of somebody's forward()
            sys.exit(f'error: {arch} does not take images of {size} pixels ({flag}): {blame(error)}')


def showing(network, arch, classes, stages, image_size):
    """A network that shows its features: itself, or inside an adapter."""
    if hasattr(network, 'feature_channels'):
        if stages:
            sys.exit(f'error: {arch} has stages of its own; torchvision:NAME, timm:NAME and functions take others')
        return network
    with one_line(f'{arch}: '):
        network = Foreign(network, classes, stages, dict.fromkeys([224, image_size]))
    distributed.say(f'{arch}: {network.told}')
    return network


def at_chance(right: float, n: int, classes: int) -> bool:
    """Whether so many of n guesses are no more than luck brings, up to two standard deviations."""
    chance = 1 / classes
    return right < n and right <= n * chance + 2 * (n * chance * (1 - chance)) ** 0.5


def doubt_teacher(score: dict, classes: int, args):
    """Say so where it guesses, or scores otherwise than in the run that its weights are from, on as many images."""
    trained = args.teacher_resume or not starts_fresh(args.teacher_arch, args.num_classes or classes)
    if trained and not args.dummy and classes > 1 and at_chance(score['correct1'], score['n'], classes):
        distributed.say(f'note: the teacher, at top-1 {score["top1"]:.2f}, guesses: wrong weights, images that are '
                        'normalised otherwise, or other classes or another order of them')
    file = Path(args.teacher_resume or '')
    try:
        known = json.loads((file.parent / 'result.json').read_text())[file.stem]  # best.pth, last.pth
        top1 = 100 * known['correct1'] / known['n']
    except (OSError, ValueError, KeyError, TypeError):
        return
    if known['n'] == score['n'] and abs(score['top1'] - top1) > (0.1 if args.amp == 'off' else 0.5):
        distributed.say(f'note: the teacher scores {score["top1"]:.2f} here and {top1:.2f} in {file.parent}: other '
                        'images, or another size or normalisation of them?')


def identity(teacher, args) -> str:
    """What a run under this teacher is tied to: its name, the hash of its weights, what images it gets."""
    return f'{args.teacher_arch} {checkpoint.fingerprint(teacher)}' + getattr(teacher, 'identity', '')
