"""The command line: pytorch/examples' and MGD's flags under their own names, then what a training script has today."""
import argparse
import math
import os
import shlex
from pathlib import Path

# What may change between a run and its resume: it says where and how fast to run, not what to compute. Images and
# weights may lie elsewhere, as a run is tied to what they are (Run.facts).
NEUTRAL = {'data', 'teacher_resume', 'student_resume', 'workers', 'print_freq', 'resume', 'evaluate', 'overwrite',
           'output', 'save_every', 'tensorboard', 'gpu', 'world_size', 'rank', 'dist_url', 'dist_backend',
           'dist_timeout', 'multiprocessing_distributed', 'procs_per_node', 'no_accel', 'max_bad_images',
           'max_broken_updates', 'start_epoch', 'data_backend', 'cache_dir', 'inspect', 'skip_first_evaluation'}

# What ranks may be told otherwise: each sees its own machine, and rank 0 alone the output.
OWN = {'data', 'teacher_resume', 'student_resume', 'workers', 'resume', 'output', 'gpu', 'rank', 'dist_url', 'no_accel',
       'cache_dir', 'tensorboard', 'overwrite'}

SEEN = {'image_size', 'val_resize_size', 'mean', 'std'}  # how an evaluation sees images


class Formatter(argparse.HelpFormatter):
    """Adds the default where it tells something."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=120)

    def _get_help_string(self, action):
        told = action.default not in (None, False, '', argparse.SUPPRESS) and 'default' not in (action.help or '')
        return (action.help or '') + ' (default: %(default)s)' * told


class Parser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, line):  # of an @file: as in a shell, with comments
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f'{line!r}: {error}')


def switch(text: str) -> bool:
    """A flag that may stand alone or, as in MGD, with 0 or 1 behind it."""
    if text in ('0', '1'):
        return text == '1'
    raise argparse.ArgumentTypeError(f'{text!r} is not 0 or 1 (a folder stands before the flags)')


SWITCH = {'nargs': '?', 'const': True, 'type': switch, 'metavar': '0|1'}  # add_argument's words for it


def compile_mode(text: str) -> str | bool:
    """As a switch, or one of torch.compile's modes."""
    if text in ('default', 'reduce-overhead', 'max-autotune'):
        return text
    try:
        return 'default' if switch(text) else False
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f'{text!r} is not 0, 1, default, reduce-overhead or max-autotune') from None


def number(kind, low, high=math.inf, above=False):
    """A type for argparse: an int or float with low <= value <= high, or low < value where `above`."""
    def parse(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f'{text} is not in {"(" if above else "["}{low}, {high}'
                                             f'{")" if high == math.inf else "]"}')
        return value
    parse.__name__ = kind.__name__  # argparse names it in 'invalid int value'
    return parse


count = number(int, 1)
natural = number(int, 0)
positive = number(float, 0, above=True)
nonnegative = number(float, 0)
fraction = number(float, 0, 1)


def base_parser(description: str) -> argparse.ArgumentParser:
    parser = Parser(description=description, fromfile_prefix_chars='@', formatter_class=Formatter,
                    epilog='@FILE in place of arguments reads them from a file, # starts a comment. Exit codes: '
                           '0 done, 1 an error that one line names, 2 wrong flags, 3 loss, gradient or prediction not '
                           'finite, 75 stopped by a signal after saving (the same command, with --output, goes on).')
    on = SWITCH | {'default': False}

    g = parser.add_argument_group('data')
    g.add_argument('data', metavar='DIR', nargs='?',
                   help='folder with train/ and valid/ or val/, one folder per class in each; or the root of CIFAR')
    g.add_argument('--dataset', choices=('imagefolder', 'cifar10', 'cifar100'), default='imagefolder',
                   help='what DIR holds; the official CIFAR files are downloaded where they are missing')
    g.add_argument('--num-classes', type=count, metavar='N', help='outputs of the network (default: as in the data)')
    g.add_argument('--image-size', type=count, metavar='PIXELS', default=None,
                   help='side of the training and evaluation images (default: 224, CIFAR 32)')
    g.add_argument('--val-resize-size', type=count, metavar='PIXELS',
                   help='shorter side that an image of a folder is resized to before its centre is evaluated (default: '
                        '256 for 224, and in proportion; published weights may ask for another)')
    g.add_argument('--mean', type=fraction, nargs=3, metavar=('R', 'G', 'B'),
                   help="that images are normalised by, from 0 to 1 (default: ImageNet's, or CIFAR's)")
    g.add_argument('--std', type=number(float, 0, 1, above=True), nargs=3, metavar=('R', 'G', 'B'), help='likewise')
    g.add_argument('--dummy', action='store_true',
                   help="made-up images in place of DIR, to benchmark or to check: of 1000 classes, or CIFAR's")
    g.add_argument('--dummy-images', type=count, default=1024, metavar='N',
                   help='training images of --dummy; a quarter as many to evaluate')
    g.add_argument('--data-backend', choices=('auto', 'loader', 'device'), default='auto',
                   help='who crops and flips training images: loader processes, or in batches the device, where the '
                        'images live, if nothing else augments single images; auto: the device for CIFAR of 32 pixels '
                        'and for what scripts/prepare.py --format raw made, where a GPU has room for it')
    g.add_argument('--exact-pixels', action='store_true',
                   help='training images are resized by PIL, to the bit as in classic scripts, instead of by torch, '
                        'which may round a pixel the other way; those to evaluate always are')
    g.add_argument('-j', '--workers', type=natural, default=4, metavar='N',
                   help='loader processes of a rank, for each of training, evaluation and what methods look at')
    g.add_argument('--max-bad-images', type=natural, metavar='N',
                   help='unreadable training images of one epoch to replace before giving up (default: a thousandth of '
                        'all, but one at least)')

    g = parser.add_argument_group('augmentation')
    g.add_argument('--crop', choices=('resized', 'random', 'centre'), default='resized',
                   help='what of a training image of a folder is seen: a part of random size and shape; a square as '
                        'large as that of an evaluation, anywhere or in the middle')
    g.add_argument('--crop-area', type=number(float, 0, 1, above=True), default=0.08, metavar='SHARE',
                   help='least part of the area that --crop resized shows')
    g.add_argument('--flip', type=fraction, default=0.5, metavar='P',
                   help='mirror a training image this often (0 where left and right mean something)')
    g.add_argument('--crop-padding', choices=('zeros', 'reflect'), default='zeros',
                   help='what surrounds a CIFAR image that is cropped')
    g.add_argument('--auto-augment', choices=('off', 'autoaugment', 'randaugment', 'trivialaugment', 'augmix'),
                   default='off', help="one of torchvision's policies, after crop and flip")
    g.add_argument('--random-erasing', type=fraction, default=0.0, metavar='P', help='erase a rectangle this often')
    g.add_argument('--mixup', type=nonnegative, default=0.0, metavar='ALPHA', help='blend pairs of images (0: off)')
    g.add_argument('--cutmix', type=nonnegative, default=0.0, metavar='ALPHA',
                   help='paste a patch of another image (0: off); with --mixup, either of them at even odds')
    g.add_argument('--label-smoothing', type=fraction, default=0.0, metavar='E', help='share of the uniform label')

    g = parser.add_argument_group('network')
    g.add_argument('-a', '--arch', default='resnet18', metavar='ARCH',
                   help='network to train: of models/, or torchvision:NAME (without the prefix, too, where models/ has '
                        'none), timm:NAME, or package.module:function, called with num_classes=N')
    g.add_argument('--pretrained', action='store_true', help="start from the weights of torchvision, or of timm")
    g.add_argument('--student-resume', metavar='PATH', help='start from (or evaluate) the weights in this file')
    g.add_argument('--teacher-arch', metavar='ARCH',
                   help='network of --teacher-resume (default: resnet152 for resnet50, else resnet50)')
    g.add_argument('--teacher-resume', metavar='PATH',
                   help='weights of the teacher; main_base.py scores it in the same pass as the network')
    g.add_argument('--teacher-mean', type=fraction, nargs=3, metavar=('R', 'G', 'B'),
                   help="of the images that the teacher was trained with, from 0 to 1 (default: the student's; with "
                        'published weights, theirs)')
    g.add_argument('--teacher-std', type=number(float, 0, 1, above=True), nargs=3, metavar=('R', 'G', 'B'),
                   help='likewise')
    g.add_argument('--teacher-size', type=count, metavar='PIXELS',
                   help="side of the teacher's images, resized from the student's (default: as these; with timm's "
                        'weights, theirs)')
    g.add_argument('--sync-bn', **on, help='BatchNorm statistics over all ranks (GPUs only)')

    g = parser.add_argument_group('optimization')
    g.add_argument('--epochs', type=count, default=90, metavar='N', help='without those of the warm-up')
    g.add_argument('--start-epoch', type=natural, default=0, metavar='N',
                   help='first epoch of a new run, counted from 0')
    g.add_argument('-b', '--batch-size', type=count, default=256, metavar='N',
                   help='of all devices of one node (a process started by hand is one)')
    g.add_argument('--accum-steps', type=count, default=1, metavar='N', help='batches per update')
    g.add_argument('--optimizer', choices=('sgd', 'adamw', 'dot'), default='sgd',
                   help='dot: SGD with a longer memory for the distillation than for the labels (main_distill.py)')
    g.add_argument('--lr', '--learning-rate', type=nonnegative, default=0.1, metavar='LR',
                   help='for the whole global batch; never rescaled')
    g.add_argument('--momentum', type=fraction, default=0.9, metavar='M', help='of SGD and DOT')
    g.add_argument('--dot-delta', type=fraction, default=0.075, metavar='D',
                   help='of DOT: momentum less D for the labels, and as much more for the distillation')
    g.add_argument('--nesterov', **on, help='of SGD')
    g.add_argument('--wd', '--weight-decay', dest='weight_decay', type=nonnegative, default=1e-4, metavar='W',
                   help='on every parameter, as published recipes have it')
    g.add_argument('--no-bias-decay', **on, help='no weight decay on biases and norms')
    g.add_argument('--clip-grad', type=positive, metavar='NORM', help='largest gradient norm (default: no limit)')
    g.add_argument('--schedule', choices=('step', 'cosine', 'linear', 'constant'), default='step',
                   help='course of the learning rate')
    g.add_argument('--lr-drop-ratio', type=number(float, 0, 1, above=True), default=0.1, metavar='R',
                   help='factor of each drop of --schedule step')
    g.add_argument('--lr-drop-epochs', type=natural, nargs='+', metavar='E',
                   help='epochs, counted from 0, that are the first at a lower rate (default: every 30)')
    g.add_argument('--warmup', **on, help='prepend epochs with a linearly growing rate, starting at a tenth')
    g.add_argument('--warmup-epochs', type=count, default=10, metavar='N', help='their number; all drops shift by it')
    g.add_argument('--warmup-by', choices=('epoch', 'iteration'), default='epoch', help='how often the rate grows')
    g.add_argument('--ema', type=fraction, default=0.0, metavar='DECAY',
                   help='average the weights over updates; the average is what is evaluated and shipped (0: off)')

    g = parser.add_argument_group('speed')
    g.add_argument('--fast', action='store_true',
                   help='--channels-last, --amp bf16 where there are instructions for it, --fold-teacher if the '
                        'teacher stands still')
    g.add_argument('--amp', choices=('off', 'bf16', 'fp16'), default='off', help='mixed precision')
    g.add_argument('--channels-last', **on, help='memory layout of images and weights')
    g.add_argument('--compile', nargs='?', const='default', default=False, type=compile_mode, metavar='MODE',
                   help='torch.compile networks and losses: default, reduce-overhead (on GPUs as CUDA graphs, which '
                        'pays for small ones) or max-autotune')
    g.add_argument('--cuda-graph', **on,
                   help='ask the GPU for a whole update at once: for small networks, whose kernels take less time than '
                        'launching them')
    g.add_argument('--deterministic', **on, help='only algorithms that give the same bits every time')

    g = parser.add_argument_group('run')
    g.add_argument('--output', metavar='DIR', help='the folder of the run; a run found there goes on '
                   '(default: runs/ and a name from script, data, network and time)')
    g.add_argument('--resume', default='auto', metavar='auto|PATH',
                   help='auto: the newest valid checkpoint of --output; or a checkpoint file')
    g.add_argument('--overwrite', action='store_true', help='start anew in an --output that holds another run')
    g.add_argument('--save-every', type=natural, default=0, metavar='UPDATES',
                   help='checkpoints inside an epoch too (0: only after each)')
    g.add_argument('--max-broken-updates', type=natural, default=0, metavar='N',
                   help='updates of one epoch to leave out, as a loss or gradient was not finite, before giving up')
    g.add_argument('-e', '--evaluate', action='store_true', help='only score the network')
    g.add_argument('--inspect', action='store_true',
                   help='only look at what would be done, what it costs here, and all that would stop it')
    g.add_argument('--seed', type=natural, metavar='N', help='of everything (default: drawn, printed and recorded)')
    g.add_argument('--seeds', type=natural, nargs='+', metavar='N',
                   help='train a run with each of them in one process on one device, sharing images and teacher; each '
                        'as if alone with --seed N --output DIR-N')
    g.add_argument('-p', '--print-freq', type=count, default=10, metavar='UPDATES', help='between two lines')
    g.add_argument('--tensorboard', action=argparse.BooleanOptionalAction, default=False,
                   help='scalars for TensorBoard in --output, beside log.jsonl')

    g = parser.add_argument_group('launch')
    g.add_argument('--gpu', type=natural, metavar='N', help='this GPU only (default: all of them)')
    g.add_argument('--no-accel', action='store_true', help='CPU even where GPUs are')
    g.add_argument('--multiprocessing-distributed', action='store_true', help='start one process per GPU')
    g.add_argument('--procs-per-node', type=count, metavar='N',
                   help='processes of --multiprocessing-distributed (default: one per GPU)')
    g.add_argument('--world-size', type=int, default=-1, metavar='NODES', help='number of nodes (default: one)')
    g.add_argument('--rank', type=int, default=-1, metavar='NODE',
                   help='number of this node, from 0, or of a process started by hand (default: none)')
    g.add_argument('--dist-url', metavar='URL', help='where ranks meet, tcp://HOST:PORT')
    g.add_argument('--dist-backend', default='nccl', help='for GPUs; CPUs always use gloo')
    g.add_argument('--dist-timeout', type=number(float, 0, 2e6, above=True), default=1800, metavar='SECONDS',
                   help='a rank, or a loader process, silent for so long ends the run')
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """What can be said of the arguments without looking at data, files or devices."""
    if empty := [name for name, value in vars(args).items() if value == '']:  # as of a shell's variable that is not set
        parser.error('DIR is empty' if empty[0] == 'data' else f'--{empty[0].replace("_", "-")} is empty')
    if args.data is None and not args.dummy:
        parser.error('DIR is missing (or use --dummy)')
    if args.dummy and args.data is not None:
        parser.error('--dummy takes no DIR')
    if args.data and args.output and Path(args.output).resolve() == Path(args.data).resolve():
        parser.error('--output is DIR, the folder of the images: name another one')
    if args.gpu is not None and args.no_accel:
        parser.error(f'--gpu {args.gpu} is asked for, but so is --no-accel')
    if args.gpu is not None and 'TORCHELASTIC_RUN_ID' in os.environ:
        parser.error(f'--gpu {args.gpu} would be that of every process: leave it out, each takes its own')
    if args.multiprocessing_distributed:  # each process takes its own, as in pytorch/examples
        args.gpu = None
    if args.multiprocessing_distributed and (args.dist_url or '').startswith('env://'):
        parser.error("--dist-url env:// is torchrun's; --multiprocessing-distributed takes tcp://HOST:PORT")
    if args.world_size > 1 and (args.rank < 0 or not args.dist_url):
        parser.error(f'--world-size {args.world_size} needs --rank NODE and --dist-url tcp://HOST:PORT')
    if args.rank >= max(args.world_size, 1):
        parser.error(f'--rank {args.rank} needs a --world-size above it, the number of nodes')
    if args.multiprocessing_distributed and 'TORCHELASTIC_RUN_ID' in os.environ:
        parser.error('torchrun has started a process for each rank: leave --multiprocessing-distributed out')
    if args.procs_per_node and not args.multiprocessing_distributed:
        parser.error('--procs-per-node needs --multiprocessing-distributed')
    if args.nesterov and (args.optimizer != 'sgd' or not args.momentum):
        parser.error('--nesterov needs --optimizer sgd and a --momentum')
    if idle := [f'--{name} (needs {need})' for name, need, there in (
            ('momentum', '--optimizer sgd or dot', args.optimizer != 'adamw'),
            ('dot-delta', '--optimizer dot', args.optimizer == 'dot'),
            ('crop-area', '--crop resized of an image folder',
             args.crop == 'resized' and args.dataset == 'imagefolder'),
            ('warmup-epochs', '--warmup', args.warmup), ('warmup-by', '--warmup', args.warmup))
            if not there and getattr(args, name.replace('-', '_')) != parser.get_default(name.replace('-', '_'))]:
        parser.error(f'nothing reads {", ".join(idle)}')
    if args.optimizer == 'dot' and not args.dot_delta <= args.momentum < 1 - args.dot_delta:
        parser.error(f'--optimizer dot: --momentum {args.momentum:g} less and more --dot-delta {args.dot_delta:g} have '
                     'to be at least 0 and below 1')
    if args.optimizer == 'dot' and (args.amp == 'fp16' or args.clip_grad):
        parser.error('--optimizer dot keeps two gradients apart, which --amp fp16 and --clip-grad do not: leave them')
    if args.optimizer == 'dot' and args.compile not in (False, 'default'):
        parser.error(f'--optimizer dot goes back through a graph twice, --compile {args.compile} (CUDA graphs) once')
    if args.ema == 1:
        parser.error('--ema 1 is an average that never takes in new weights: give less, such as 0.999')
    if args.cuda_graph:
        check_graph(parser, args)
    if args.inspect and args.evaluate:
        parser.error('--inspect looks at a training run, --evaluate scores: choose one')
    if args.overwrite and args.evaluate:
        parser.error('--overwrite starts anew, --evaluate scores what is there: choose one')
    if args.overwrite and args.resume != 'auto':
        parser.error('--overwrite starts anew, --resume PATH goes on: choose one')
    if args.seeds:
        check_seeds(parser, args)
    if args.start_epoch >= args.epochs + args.warmup * args.warmup_epochs:
        parser.error('--start-epoch lies behind the last epoch')
    end = max(args.epochs, 91) if args.schedule == 'step' else 91  # others read none
    args.lr_drop_epochs = args.lr_drop_epochs or [*range(30, end, 30)]  # as StepLR(30), without end
    args.image_size = args.image_size or (224 if args.dataset == 'imagefolder' else 32)
    if args.exact_pixels and args.dataset != 'imagefolder':
        parser.error('--exact-pixels is for image folders: nothing is resized in CIFAR')
    if args.dataset != 'imagefolder' and (args.val_resize_size or args.crop != 'resized'):
        parser.error('--crop and --val-resize-size are for image folders: CIFAR images are seen whole, but for shifts')
    if shorter_side(args) < args.image_size:
        parser.error(f'--val-resize-size {args.val_resize_size} is less than --image-size {args.image_size}')
    if args.crop_padding != 'zeros' and args.dataset == 'imagefolder':
        parser.error('--crop-padding is for CIFAR: no image of a folder is padded')
    if args.data_backend == 'device' and (beyond := beyond_the_device(args)):
        whose = 'images' if args.dataset == 'imagefolder' else 'CIFAR images of 32 pixels'
        parser.error(f'--data-backend device crops and flips {whose}, no more than that: {beyond}')
    if bool(args.mean) != bool(args.std):
        parser.error('--mean and --std belong together')
    args.teacher_arch = args.teacher_arch or ('resnet152' if args.arch == 'resnet50' else 'resnet50')
    return args


def completed(arguments: dict) -> dict:
    """With the defaults of flags that the version of an older run did not have, but for those of methods."""
    return vars(base_parser('').parse_args([])) | arguments


def several_processes(args) -> dict[str, bool]:
    """What asks for them, and whether it is there."""
    from . import distributed  # and with it PyTorch, which scripts that read these flags alone can do without
    return {'--world-size': args.world_size > 1, '--multiprocessing-distributed': args.multiprocessing_distributed,
            'torchrun': distributed.under_torchrun(args)}


def check_graph(parser, args):
    others = {f'--optimizer {args.optimizer}': args.optimizer != 'sgd', f'--accum-steps {args.accum_steps}':
              args.accum_steps > 1, '--amp fp16': args.amp == 'fp16', '--no-accel': args.no_accel,
              f'--compile {args.compile}': args.compile not in (False, 'default'), **several_processes(args)}
    if other := first(others):
        parser.error(f'--cuda-graph records the one batch of an update of SGD on one GPU, not together with {other}')


def check_seeds(parser, args):
    if not args.output:
        parser.error('--seeds needs --output DIR: the runs go to DIR-SEED')
    if len(set(args.seeds)) < len(args.seeds):
        parser.error('--seeds names a seed twice')
    others = {'--seed': args.seed is not None, '--evaluate': args.evaluate, **several_processes(args),
              f'--resume {args.resume}': args.resume != 'auto',  # of one seed, by which they would not differ
              f'--compile {args.compile}': args.compile not in (False, 'default')}  # graphs that belong to one thread
    if other := first(others):
        parser.error(f'--seeds trains several runs in one process, not together with {other}')


def first(reasons: dict) -> str:
    """The first that holds; nothing if none does."""
    return next((reason for reason, holds in reasons.items() if holds), '')


def shorter_side(args: argparse.Namespace) -> int:
    """What an image to evaluate is resized to, before its centre is cropped."""
    return args.val_resize_size or round(args.image_size * 256 / 224)


def further_augmentation(args: argparse.Namespace) -> str:
    """What is done to single images beyond crop and flip; nothing if nothing is."""
    reasons = {f'--auto-augment {args.auto_augment}': args.auto_augment != 'off',
               f'--random-erasing {args.random_erasing:g}': args.random_erasing}
    return first(reasons)


def beyond_crop_and_flip(args: argparse.Namespace) -> str:
    """What makes single images something else than CIFAR's, cropped and flipped; nothing if nothing does."""
    reasons = {f'--dataset {args.dataset}': args.dataset == 'imagefolder',
               f'--image-size {args.image_size}': args.image_size != 32}
    return first(reasons) or further_augmentation(args)


def beyond_the_device(args: argparse.Namespace) -> str:
    """What needs loader processes, as the device crops and flips, no more than that."""
    if args.dataset == 'imagefolder':
        return '--exact-pixels' if args.exact_pixels else further_augmentation(args)
    return beyond_crop_and_flip(args)
