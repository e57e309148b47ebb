"""Train or evaluate a network. `python main_base.py --help` lists the flags, README.md the ways to start it."""
import sys
from functools import partial

import torch

from distillers import inspection
from models import Foreign, Renormalised, create_model
from utils import checkpoint, distributed, setup
from utils.args import base_parser, check
from utils.data import Prepare, load_data
from utils.engine import Supervised, evaluate, train_one_epoch
from utils.learner import Learner
from utils.optim import make_ema, make_optimizer, total_epochs
from utils.randomness import seed_everything
from utils.run import Run
from utils.views import STATISTICS


def main():
    parser = base_parser('Train or evaluate a network.')
    args = check(parser, parser.parse_args())
    if args.teacher_resume and not args.evaluate:
        parser.error('--teacher-resume needs --evaluate here; main_distill.py trains with a teacher')
    if args.optimizer == 'dot':
        parser.error('--optimizer dot weighs distillation against labels: it is for main_distill.py')
    distributed.launch(partial(inspection.worker, build, build_teacher, showing) if args.inspect else worker, args)


def worker(args, device):
    setup.configure(args, device)
    run = Run(args, device)

    # data
    train, valid, classes = load_data(args, run.seed, device)
    outputs = args.num_classes or len(classes)
    prepare, prepare_mixed = Prepare(args, device), Prepare(args, device, mix_classes=outputs)

    # network and its weights
    seed_everything(run.seed, 'initial weights')
    student = setup.place(build(args.arch, outputs, args.pretrained), device, args)
    if args.evaluate:
        load_evaluated(student, run, args)
        networks = {'student': distributed.replicated(student, device, args)}
        if args.teacher_resume:
            teacher = setup.place(build_teacher(args, outputs), device, args)
            checkpoint.load_weights(teacher, args.teacher_resume, classes)
            networks['teacher'] = distributed.replicated(teacher, device, args)
        run.report(evaluate(networks, valid, prepare, device, args))
        return
    if args.student_resume:
        checkpoint.load_weights(student, args.student_resume)

    # what trains it
    ema = make_ema(student, args)
    task = distributed.wrap(Supervised(student, args.label_smoothing), device, args)
    optimizer = make_optimizer(task, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    run.restore(model=student, optimizer=optimizer, scaler=scaler, ema=ema)
    run.begin(student, train, valid)

    # epochs
    learner = Learner(task, optimizer, scaler, device, args)
    while run.progress['epoch'] < total_epochs(args):
        train_one_epoch(learner, train, prepare_mixed, ema, run, device, args)
        shipped = distributed.replicated(run.shipped(), device, args)
        run.end_epoch(evaluate({'student': shipped}, valid, prepare, device, args))
    run.finish()


def build(arch, classes, pretrained=False):
    """A network by name (models/__init__.py), or one line that says why not."""
    if pretrained and ':' in arch and not arch.startswith(('torchvision:', 'timm:')):
        distributed.say(f'note: the weights of {arch} are those that it returns')
    elif pretrained and classes != 1000:
        distributed.say(f'note: the pretrained classifier has 1000 outputs; one with {classes} starts fresh')
    try:
        return create_model(arch, classes, pretrained)
    except (ValueError, OSError) as error:  # an unknown name, weights that cannot be downloaded
        sys.exit(f'error: {arch}: {error}')


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


def load_evaluated(network, run, args):
    """What --evaluate scores: the weights named by --student-resume, else those of the run."""
    if args.student_resume:
        checkpoint.load_weights(network, args.student_resume)
    elif run.saved:
        checkpoint.fill(network, run.saved, run.origin)
    elif not args.pretrained:
        distributed.say('note: random weights are scored (--student-resume, --resume or --output name others)')


if __name__ == '__main__':
    main()
