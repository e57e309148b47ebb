"""Distil a student from a teacher: main_base.py plus the teacher and the distillers.

    torchrun main_distill.py /imagenet --arch mobilenet_v1 --distiller mgd
"""
import argparse

import torch

from distillers import (
    DISTILLERS,
    Distillation,
    adapts,
    add_flags,
    describe,
    drop_foreign,
    from_flags,
    inspection,
    reads_outputs,
)
from distillers.cache import TeacherCache
from distillers.lean import lean_teacher
from distillers.networks import add_stage_flags, build_student, build_teacher, doubt_teacher, identity
from utils import checkpoint, distributed, setup, together
from utils.args import SWITCH, base_parser, beyond_crop_and_flip, check, count, nonnegative
from utils.data import Prepare, ResidentLoader, contents, load_data
from utils.engine import evaluate, train_one_epoch
from utils.errors import one_line
from utils.learner import Learner
from utils.optim import make_ema, make_optimizer, total_epochs
from utils.randomness import seed_everything
from utils.run import Run


def make_parser() -> argparse.ArgumentParser:
    parser = base_parser('Distil a student from a teacher.')
    on = SWITCH | {'default': False}
    g = parser.add_argument_group('distillation')
    g.add_argument('--distiller', nargs='+', choices=DISTILLERS, default=['mgd'], metavar='NAME',
                   help=f'methods, whose losses add up: {", ".join(DISTILLERS)}')
    g.add_argument('--ce-weight', type=nonnegative, metavar='W',
                   help="factor of the labels' cross entropy (default: the method's own if it runs alone, else 1)")
    add_stage_flags(g)
    g.add_argument('--logit-standardize', **on, help='methods see the z-scores of each logit vector (LSKD)')
    g.add_argument('--pair-images', type=count, default=20000, metavar='N',
                   help='training images that a method may look at before an epoch')
    g.add_argument('--cache-teacher', choices=('off', 'lazy', 'full'), default='off',
                   help="keep the teacher's logits (and pooled features, if needed) of all 162 views of each CIFAR "
                        'image, in float16: as they come up, or all of them before the first epoch')
    g.add_argument('--cache-dir', metavar='DIR', help='keep them in files there, too, which runs share')
    g.add_argument('--fold-teacher', **SWITCH,
                   help='train under a copy of the teacher with its BatchNorms in its convolutions (--fast does, if it '
                        'is not 0)')
    g.add_argument('--teacher-amp', choices=('off', 'bf16', 'fp16'),
                   help='precision of the teacher that trains the student (default: as --amp)')
    g.add_argument('--teacher-stream', **on,
                   help='the teacher works beside the student on the GPU: for small networks, with --cuda-graph')
    g.add_argument('--skip-first-evaluation', action='store_true', help='do not score both networks at the start')
    g.add_argument('--list-distillers', action='store_true', help='print every method with its paper and flags')
    add_flags(parser, DISTILLERS)
    g = parser.add_argument_group("MGD's own spellings")
    g.add_argument('--use-pretrained', dest='pretrained', **on | {'default': argparse.SUPPRESS}, help='as --pretrained')
    g.add_argument('--loss-factor', dest='mgd_loss_factor', type=float, default=argparse.SUPPRESS, metavar='X',
                   help='as --mgd-loss-factor')
    g.add_argument('--mgd-with-kd', **on, help='as --distiller mgd kd --kd-temperature 1.5 --kd-weight 1')
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    if args.list_distillers:
        print(describe(DISTILLERS))
        return
    check(parser, args)
    check_distillation(parser, args)
    distributed.launch(inspection.worker if args.inspect else worker, args)


def worker(args, device):
    setup.configure(args, device)
    run = Run(args, device)

    # data
    train, valid, classes = load_data(args, run.seed, device)
    run.tie(images=contents(train, valid))
    outputs = args.num_classes or len(classes)
    prepare, prepare_mixed = Prepare(args, device), Prepare(args, device, mix_classes=outputs)

    # teacher and its weights
    seed_everything(run.seed, 'teacher')
    learns = any(DISTILLERS[name].trains_teacher for name in args.distiller)
    teacher = build_teacher(args, outputs, not (args.teacher_resume or args.dummy or learns), shows=True)
    teacher = setup.place(teacher, device, args)
    if args.teacher_resume:
        checkpoint.load_weights(teacher, args.teacher_resume, f'--teacher-arch {args.teacher_arch}', classes)
    elif args.dummy:
        distributed.say('note: made-up images, made-up teacher: its weights are random')
    run.tie(teacher=identity(teacher, args))
    if not learns:  # runs of several --seeds share one of these weights
        teacher = together.shared(run.facts['teacher'], lambda: teacher)

    # student and its weights
    seed_everything(run.seed, 'initial weights')
    student = setup.place(build_student(args, outputs, run.needs_published(), shows=True), device, args)
    if args.student_resume and not args.evaluate:
        checkpoint.load_weights(student, args.student_resume, f'--arch {args.arch}')
        run.tie(start=checkpoint.fingerprint(student))

    # distillers, which probe both at this size; an evaluation needs only those that the student predicts through
    student.image_size = teacher.image_size = args.image_size
    seed_everything(run.seed, 'distillers')
    names = [name for name in args.distiller if adapts(DISTILLERS[name]) or not args.evaluate]
    with one_line(f'{args.arch} under {args.teacher_arch}: '):  # a pair, or data, that a method cannot work with
        distillers = from_flags(DISTILLERS, names, args, student, teacher)
        distillation = Distillation(student, distributed.replicated(teacher, device, args), distillers, args.ce_weight,
                                    args.label_smoothing, args.logit_standardize).to(device)
        if train:
            distillation.know(torch.tensor(train.images.source.targets, device=device))
            if unreached := distillation.freeze_unreached():
                distributed.say(f"note: {unreached:,} of the student's parameters are in no loss, and stay as they are")
            train.refuse_single_values(distillation, args)
        if args.cache_teacher == 'off' and not args.evaluate:
            distillation.stand_in = lean_teacher(distillation, teacher, device, args)
        if args.teacher_stream and not args.evaluate:
            distillation.teach_beside(device)
    network = distillation.shipped()
    both = {'student': distributed.replicated(network, device, args),
            'teacher': distributed.replicated(teacher, device, args)}
    if args.evaluate:
        if learns and not args.teacher_resume:  # it has learned beside the student, or is random
            if run.saved and 'teacher' in run.saved:
                checkpoint.fill(teacher, run.saved['teacher'], run.origin, f'--teacher-arch {args.teacher_arch}')
            else:
                del both['teacher']
        run.load_evaluated(network, classes)
        run.report(evaluate(both, valid, prepare, device, args))
        return

    # what trains them
    run.told = {'ce_weight': distillation.ce_weight,
                'stages': {name: distiller.pairing for name, distiller in distillers.items() if distiller.pairing}}
    cache = None
    if args.cache_teacher != 'off':
        cache = together.shared(('cache', teacher), lambda: TeacherCache(
            distillation.teacher, run.facts['teacher'], distillation.read_of_teacher(), train, prepare, device, args))
        distillation.stand_in, prepare_mixed = cache, cache.prepare
        if device.type == 'cuda' and isinstance(train.loader, ResidentLoader):
            # One batch takes the teacher less than the launching of its kernels: it has many at once.
            train.loader.prepare, prepare_mixed = cache.prepare, prepare
        distributed.say(f'teacher cache: {cache}')
    ema = make_ema(network, args)
    task = distributed.wrap(setup.compiled(distillation, args), device, args)
    optimizer = make_optimizer(task, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    run.restore(model=network, distillers=distillation.distillers, optimizer=optimizer, scaler=scaler, ema=ema,
                teacher=teacher if distillation.trains_teacher else None)
    run.begin(network, train, valid)
    distributed.say(f'labels count {distillation.ce_weight:g} times' + ''.join(
        f'; {name} compares stages {" ".join(f"{i}-{j}" for i, j in pairs)} (student-teacher)'
        for name, pairs in run.told['stages'].items()))
    if not (args.skip_first_evaluation or run.resumed):
        scores = evaluate(both, valid, prepare, device, args)
        run.report(scores, 'start.json')
        if args.teacher_resume or not learns:
            doubt_teacher(scores['teacher'], len(classes), args)
        run.progress['teacher'] = scores['teacher']

    if args.cache_teacher == 'full' and run.progress['epoch'] < total_epochs(args) and not cache.fill():
        run.interrupt()

    # epochs
    learner = Learner(task, optimizer, scaler, device, args)
    while run.progress['epoch'] < total_epochs(args):
        def look(epoch=run.progress['epoch']):
            return map(prepare, train.sample(epoch, args.pair_images))
        news = distillation.start_epoch(run.progress['epoch'] + 1, look)  # without --amp: its rounding would flip ties
        if news is None:
            run.interrupt()
        run.tell(news)
        train_one_epoch(learner, train, prepare_mixed, ema, run, device, args)
        if cache:
            cache.save()
        networks = both if distillation.trains_teacher else {}
        run.end_epoch(evaluate(networks | {'student': distributed.replicated(run.shipped(), device, args)}, valid,
                               prepare, device, args))
    run.finish()


def check_distillation(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """What check() does, for methods and the flags that go with them; --mgd-with-kd is spelt out in args."""
    if len({*args.distiller}) < len(args.distiller):
        parser.error('--distiller names a method twice')
    if idle := drop_foreign(DISTILLERS, args.distiller, args):
        parser.error(f'{", ".join(idle)}: of a method that --distiller ({" ".join(args.distiller)}) does not name')
    if args.mgd_with_kd:
        if args.distiller != ['mgd']:
            parser.error('--mgd-with-kd names the methods by itself: leave --distiller out')
        args.distiller, args.kd_temperature, args.kd_weight = ['mgd', 'kd'], 1.5, 1.0
    if args.logit_standardize and not any('logits' in (DISTILLERS[name].teacher_reads or ['logits'])
                                          for name in args.distiller):
        parser.error(f'--logit-standardize: --distiller {" ".join(args.distiller)} sees no logits')
    if args.teacher_stream and args.compile not in (False, 'default'):
        parser.error(f'--compile {args.compile}: CUDA graphs of both networks share memory, so --teacher-stream cannot '
                     'let them work at the same time')
    if args.cache_dir and args.cache_teacher == 'off':
        parser.error('--cache-dir needs --cache-teacher lazy or full')
    if args.cache_teacher != 'off':
        if beyond := beyond_crop_and_flip(args) or ('--mixup, --cutmix' if args.mixup or args.cutmix else ''):
            parser.error(f'--cache-teacher knows CIFAR images of 32 pixels, cropped and flipped, no more: {beyond}')
        if needy := [name for name in args.distiller if not reads_outputs(DISTILLERS[name])]:
            parser.error("--cache-teacher keeps a frozen teacher's logits and pooled features, but more is read by "
                         f'--distiller {" ".join(needy)}')
        if args.fold_teacher or args.teacher_amp or args.teacher_stream:
            parser.error('--cache-teacher spares the teacher that --fold-teacher, --teacher-amp and --teacher-stream '
                         'would make faster')


if __name__ == '__main__':
    main()
