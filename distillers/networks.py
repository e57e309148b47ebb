"""The networks of a run, as its flags name them. What is wrong with one ends the run in a line."""
import sys

from models import Foreign, Renormalised, create_model
from utils import checkpoint, distributed
from utils.views import STATISTICS


def add_stage_flags(group):
    for whose in ('student', 'teacher'):
        group.add_argument(f'--{whose}-stages', type=lambda text: text.split(','), metavar='PATH,PATH,...',
                           help='modules of a network from elsewhere, by their names in it, whose outputs are its maps '
                                '(default: found by a probe)')


def build(arch, classes, pretrained=False):
    """A network by name (models/__init__.py)."""
    if pretrained and ':' in arch and not arch.startswith(('torchvision:', 'timm:')):
        distributed.say(f'note: the weights of {arch} are those that it returns')
    elif pretrained and classes != 1000:
        distributed.say(f'note: the pretrained classifier has 1000 outputs; one with {classes} starts fresh')
    try:
        return create_model(arch, classes, pretrained)
    except (ValueError, OSError) as error:  # an unknown name, weights that cannot be downloaded
        sys.exit(f'error: {arch}: {error}')


def build_student(args, classes, pretrained=False, shows=False):
    """shows: whether it has to show its features; so with the teacher."""
    network = build(args.arch, classes, pretrained)
    return showing(network, args.arch, classes, args.student_stages, args.image_size) if shows else network


def build_teacher(args, classes, pretrained=False, shows=False):
    """The teacher, for the student's images: it gets them normalised, and of the size, as it was trained."""
    network, given = build(args.teacher_arch, classes, pretrained), STATISTICS[args.dataset]
    mean, std, size = published = images_of(network) or (*given, args.image_size)
    if not pretrained:  # weights from a file need not be from where the network is
        mean, std, size = *given, args.image_size
        if published != (mean, std, size):
            distributed.say(f'note: {args.teacher_arch} was published for images of mean {published[0]}, std '
                            f'{published[1]} and {published[2]} pixels; if its weights are, too, tell it by '
                            '--teacher-mean, --teacher-std, --teacher-size')
    wanted, size = (tuple(args.teacher_mean or mean), tuple(args.teacher_std or std)), args.teacher_size or size
    if shows:
        network = showing(network, args.teacher_arch, classes, args.teacher_stages, size)
    if (wanted, size) == (given, args.image_size):
        return network
    network = Renormalised(network, given, wanted, size)
    distributed.say(f'{args.teacher_arch}{network.identity}')
    return network


def images_of(network):
    """Mean, std and size of the images that a network of timm was published for."""
    published = getattr(network, 'pretrained_cfg', None)
    return published and (tuple(published['mean']), tuple(published['std']), published['input_size'][-1])


def showing(network, arch, classes, stages, image_size):
    """A network that shows its features: itself, or inside an adapter."""
    if hasattr(network, 'feature_channels'):
        if stages:
            sys.exit(f'error: {arch} has stages of its own; torchvision:NAME, timm:NAME and functions take others')
        return network
    try:
        network = Foreign(network, classes, stages, dict.fromkeys([224, image_size]))
    except ValueError as error:
        sys.exit(f'error: {arch}: {error}')
    distributed.say(f'{arch}: {network.told}')
    return network


def identity(teacher, args) -> str:
    """What a run under this teacher is tied to: its name, the hash of its weights, what images it gets."""
    return f'{args.teacher_arch} {checkpoint.fingerprint(teacher)}' + getattr(teacher, 'identity', '')
