"""Train or evaluate a network. `python main_base.py --help` lists the flags, README.md the ways to start it."""
import torch

from distillers import inspection
from distillers.networks import build_student, build_teacher, identity
from utils import checkpoint, distributed, setup
from utils.args import base_parser, check
from utils.data import Prepare, contents, load_data
from utils.engine import Supervised, evaluate, train_one_epoch
from utils.learner import Learner
from utils.optim import make_ema, make_optimizer, total_epochs
from utils.randomness import seed_everything
from utils.run import Run


def main():
    parser = base_parser('Train or evaluate a network.')
    args = check(parser, parser.parse_args())
    if args.teacher_resume and not args.evaluate:
        parser.error('--teacher-resume needs --evaluate here; main_distill.py trains with a teacher')
    if args.optimizer == 'dot':
        parser.error('--optimizer dot weighs distillation against labels: it is for main_distill.py')
    distributed.launch(inspection.worker if args.inspect else worker, args)


def worker(args, device):
    setup.configure(args, device)
    run = Run(args, device)

    # data
    train, valid, classes = load_data(args, run.seed, device)
    run.tie(images=contents(train, valid))
    outputs = args.num_classes or len(classes)
    prepare, prepare_mixed = Prepare(args, device), Prepare(args, device, mix_classes=outputs)

    # network and its weights
    seed_everything(run.seed, 'initial weights')
    student = setup.place(build_student(args, outputs, run.needs_published()), device, args)
    if args.evaluate:
        run.load_evaluated(student, classes)
        networks = {'student': distributed.replicated(student, device, args)}
        if args.teacher_resume:
            teacher = setup.place(build_teacher(args, outputs), device, args)
            checkpoint.load_weights(teacher, args.teacher_resume, f'--teacher-arch {args.teacher_arch}', classes)
            run.tie(teacher=identity(teacher, args))
            networks['teacher'] = distributed.replicated(teacher, device, args)
        run.report(evaluate(networks, valid, prepare, device, args))
        return
    if args.student_resume:
        checkpoint.load_weights(student, args.student_resume, f'--arch {args.arch}')
        run.tie(start=checkpoint.fingerprint(student))

    # what trains it
    ema = make_ema(student, args)
    task = Supervised(student, args.label_smoothing)
    train.refuse_single_values(task, args)
    task = distributed.wrap(setup.compiled(task, args), device, args)
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


if __name__ == '__main__':
    main()
