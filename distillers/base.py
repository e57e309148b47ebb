"""What a method is, and what trains a student with some of them."""
import copy
import math
from contextlib import contextmanager
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import Features
from utils import distributed, signals
from utils.closely import timed
from utils.data import Batch


class Distiller(nn.Module):
    """A method: `__init__(self, student, teacher, *, ...)` and `forward`.

    The keyword-only arguments are its hyper-parameters, each with a line `name: text` in the class docstring; a line
    `Defaults: text` says where their defaults are from. The networks are there to be read (channels, norms, weights,
    all loaded by then) and are not kept. What the method has to remember is a buffer, what it trains a submodule.
    """

    default_ce_weight = 1.0  # of the cross entropy beside it, where it runs alone
    trains_teacher = False  # whether the second network learns, too
    batch_statistics = False  # whether the teacher's BatchNorms go by the batch and leave their running statistics be
    teacher_reads: tuple[str, ...] | None = None  # fields of the teacher's features that forward reads; None: any
    asks_student = True  # whether start_epoch looks at the student, too
    teacher_kept = ''  # what it takes from the teacher once, before the first epoch; so the teacher must not learn
    pairing: list[tuple[int, int]] = []  # noqa: RUF012, the student's and the teacher's stages that forward compares
    report: list[dict] = []  # noqa: RUF012, rows of what the last start_epoch did, for the log

    def forward(self, s: Features, t: Features, batch) -> dict[str, torch.Tensor]:
        """The weighted losses, means over the batch, by names that are the method's or begin with it and a _."""
        raise NotImplementedError

    def know(self, targets: torch.Tensor):
        """Called once, before any state is restored, with the class of every training sample."""

    def start_epoch(self, epoch: int, pairs):
        """Called before each epoch, counted from 1, and again where a run resumes within one.

        pairs() iterates over (s, t), the features of some training images in eval mode and without gradient; each
        rank sees its share of them. s is None where the method does not ask for it.
        """

    def adapt(self, s: Features) -> Features:
        """What the student shows through the method: one that overrides this is shipped with the student.

        It alone sees these features in forward; to the others the student shows its own, with the logits of these.
        """
        return s


class WarmingUp(Distiller):
    """A method whose losses grow to their full weight in the first epochs: forward has them `warm` times."""

    def __init__(self, warmup: int):
        super().__init__()
        positive(warmup=warmup)
        self.warmup = warmup
        self.register_buffer('warm', torch.tensor(1.0), persistent=False)  # not a number: --compile builds each in

    def start_epoch(self, epoch, pairs):
        self.warm.fill_(min(epoch / self.warmup, 1.0))


class Distillation(nn.Module):
    """Batch -> logits of the student, {'ce': cross entropy, and the losses of the distillers}.

    A teacher that learns has a 'ce_teacher'.

    ce_weight: factor of the cross entropy; None: the distiller's default if it runs alone, else 1
    standardize: whether the distillers see z-scores for logits (Logit Standardization, Sun et al., CVPR 2024)
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, distillers: dict[str, Distiller],
                 ce_weight: float | None = None, label_smoothing: float = 0.0, standardize: bool = False):
        super().__init__()
        self.student, self.distillers = student, nn.ModuleDict(distillers)
        methods = distillers.values()
        self.batch_statistics = any(distiller.batch_statistics for distiller in methods)
        learns = next((name for name, distiller in distillers.items() if distiller.trains_teacher), None)
        self.trains_teacher = learns is not None
        for name, distiller in distillers.items():
            if learns and distiller.teacher_kept:
                raise ValueError(f"{name} goes by the teacher's {distiller.teacher_kept} of the beginning, and under "
                                 f'{learns} the teacher learns: leave one of the two methods out')
        if self.trains_teacher:
            self.teacher = teacher.requires_grad_()
        else:  # not a submodule: no optimizer, checkpoint, DDP or train() ever meets it; whoever built it moves it
            object.__setattr__(self, 'teacher', teacher.eval().requires_grad_(False))
        if ce_weight is None:
            ce_weight = default_ce_weight([*methods])
        self.ce_weight, self.label_smoothing, self.standardize = ce_weight, label_smoothing, standardize
        reads = [distiller.teacher_reads for distiller in methods]
        self.unread = [] if None in reads else [f for f in ('preact', 'maps') if f not in {*chain(*reads)}]
        self.stand_in = None  # to ask in place of the teacher: a TeacherCache or a LeanTeacher
        self.stream = None  # of a GPU, for the teacher alone: it works while the student does

    def forward(self, batch):
        with (torch.set_grad_enabled(self.trains_teacher), by_the_batch(self.teacher, self.batch_statistics),
              beside(self.stream), timed('teacher')):
            t = self.stand_in(batch) if self.stand_in else self.teacher(batch.images, features=True)
        t = t._replace(**{field: [] for field in self.unread})  # frees maps before the student makes its own
        return self.follow(batch, t)

    def follow(self, batch, t: Features):
        with timed('student'):
            own = self.student(batch.images, features=True)
        if self.stream is not None:
            self.wait_for_teacher()
        s = adapt(self.distillers.values(), own)
        logits = s.logits
        losses = {'ce': self.cross_entropy(logits, batch)}
        if self.trains_teacher:
            losses['ce_teacher'] = self.cross_entropy(t.logits, batch)
        if self.standardize:
            s, t = (with_logits(x, z_scores(x.logits)) for x in (s, t))
        own, frozen = with_logits(own, s.logits), detached(t) if self.trains_teacher else t
        for name, distiller in self.distillers.items():
            told = distiller(s if adapts(type(distiller)) else own, t if distiller.trains_teacher else frozen, batch)
            for key in told:
                if key != name and not key.startswith(f'{name}_'):  # it could take the place of another's
                    raise ValueError(f'{name} calls a loss {key}: its losses are {name}, or {name}_ and a word')
            losses |= told
        return logits, losses

    def compile(self, **how):
        """Student and losses as one: else all that the student shows would be given a gradient, if only of zeros.

        Where a method does what cannot be compiled, torch takes what it calls apart from each other.
        """
        self.follow = torch.compile(self.follow, **how)

    def cross_entropy(self, logits, batch) -> torch.Tensor:
        return self.ce_weight * F.cross_entropy(logits.float(), batch.target, label_smoothing=self.label_smoothing)

    def read_of_teacher(self) -> set[str]:
        """The fields of its features, where all distillers tell theirs."""
        return set().union(*(d.teacher_reads for d in self.distillers.values()), {'logits'} if self.standardize else ())

    def shipped(self) -> nn.Module:
        """What is evaluated and given away: the student, with the methods that it predicts through."""
        through = {name: distiller for name, distiller in self.distillers.items() if adapts(type(distiller))}
        return Adapted(self.student, through) if through else self.student

    def teach_beside(self, device: torch.device):
        if device.type != 'cuda' or self.trains_teacher:
            raise ValueError('--teacher-stream is for a GPU, and for a teacher that does not learn')
        self.stream = torch.cuda.Stream(device)

    @torch.compiler.disable  # what is compiled ends here, and begins anew
    def wait_for_teacher(self):
        torch.cuda.current_stream().wait_stream(self.stream)

    @property
    def teacher_stands_still(self) -> bool:
        return not (self.trains_teacher or self.batch_statistics)

    def know(self, targets: torch.Tensor):
        for distiller in self.distillers.values():
            distiller.know(targets)

    def freeze_unreached(self) -> int:
        """Freeze the student's parameters that no loss reaches, and count them.

        There are some where labels do not count, or where it predicts without its own head. Their gradient would be
        zero all along, and weight decay would wear them away.
        """
        if self.ce_weight and self.shipped() is self.student:
            return 0
        images, state = probe_image(self.student).repeat(2, 1, 1, 1), copy.deepcopy(self.distillers.state_dict())
        nothing = torch.zeros(2, dtype=torch.int64, device=images.device)
        with evaluating(self), torch.compiler.set_stance('force_eager'):  # it is for two images, once
            _, losses = self(Batch(images, nothing, nothing, nothing))
        loss = sum(value for name, value in losses.items() if name != 'ce' or self.ce_weight)
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        self.distillers.load_state_dict(state)  # a memory has taken in what it saw
        unreached = [p.requires_grad_(False) for p, gradient in zip(parameters, gradients) if gradient is None]
        return sum(p.numel() for p in unreached)

    def start_epoch(self, epoch: int, batches) -> dict[str, list[dict]] | None:
        """Let the distillers prepare for an epoch, counted from 1; batches() iterates over what forward gets.

        Returns what they report; None where a signal asks to stop, and they have not seen all: they are as before.
        """
        distributed.sync_buffers(self.student)  # with --ema it is not what was evaluated, and each rank has its own
        before = {name: copy.deepcopy(distiller.state_dict()) for name, distiller in self.distillers.items()
                  if type(distiller).start_epoch is not Distiller.start_epoch}
        for name, distiller in self.distillers.items():
            problem = None
            try:
                distiller.start_epoch(epoch, lambda asked=distiller.asks_student: self.pairs(batches(), asked))
            except ValueError as error:  # features to which a method has no answer
                problem = f'{name}: {error}'
            if any(distributed.agree(signals.caught())):
                for prepared, state in before.items():
                    self.distillers[prepared].load_state_dict(state)
                return None
            if problem:
                distributed.stop(problem)
        return {name: distiller.report for name, distiller in self.distillers.items() if distiller.report}

    @torch.no_grad()
    def pairs(self, batches, ask_student: bool = True):
        with evaluating(self.student), evaluating(self.teacher):
            for batch in batches:
                if signals.caught():
                    break
                yield (self.student.forward(batch.images, features=True) if ask_student else None,
                       self.teacher.forward(batch.images, features=True))


class Adapted(nn.Module):
    """The student with what its distillers make of it."""

    def __init__(self, student: nn.Module, distillers: dict[str, Distiller]):
        super().__init__()
        self.student, self.distillers = student, nn.ModuleDict(distillers)

    def forward(self, x, features: bool = False):
        s = adapt(self.distillers.values(), self.student(x, features=True))
        return s if features else s.logits


def default_ce_weight(methods: list) -> float:
    """Of the cross entropy beside them: a method's own where it runs alone."""
    return methods[0].default_ce_weight if len(methods) == 1 else 1.0


OUTPUTS = {'logits', 'pooled'}  # fields of a teacher's features that a TeacherCache keeps


def reads_outputs(method: type[Distiller]) -> bool:
    """Whether it reads no more of a teacher than these."""
    return method.teacher_reads is not None and {*method.teacher_reads} <= OUTPUTS


def adapts(method: type[Distiller]) -> bool:
    return method.adapt is not Distiller.adapt


def adapt(distillers, s: Features) -> Features:
    for distiller in distillers:
        s = distiller.adapt(s)
    return s


def z_scores(logits: torch.Tensor) -> torch.Tensor:
    """Of each sample over its classes; equal logits have none: 0, and no gradient."""
    logits = logits.float()
    deviation = logits.std(1, keepdim=True)
    scores = (logits - logits.mean(1, keepdim=True)) / deviation.clamp(min=1e-6)
    return torch.where(deviation <= 1e-6, 0.0, scores)  # NaN <= 1e-6 is False: NaN stays NaN


def with_logits(x: Features, logits: torch.Tensor) -> Features:
    """Its _replace, which torch 2.8 cannot compile."""
    return Features(logits, x.pooled, x.head, x.preact, x.maps)


def detached(t: Features) -> Features:
    return Features(*([x.detach() for x in field] if isinstance(field, list) else field.detach() for field in t))


@contextmanager
def by_the_batch(network: nn.Module, enabled: bool):
    """BatchNorms normalise by the batch for a while, and learn nothing from it."""
    norms = [m for m in network.modules() if enabled and isinstance(m, _BatchNorm) and not m.training]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True


@contextmanager
def beside(stream):
    """On a stream of its own, after what was asked of the device before; so its memory is free when it starts anew."""
    if stream is None:
        yield
    else:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield


@contextmanager
def evaluating(network: nn.Module):
    """Eval mode for a while; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def probe(network: nn.Module) -> Features:
    """What `network` shows of one image, to read shapes from; leaves no trace in it, nor in the random state.

    The image has the size that the network is used with, if whoever built it has noted that as its `image_size`.
    """
    with evaluating(network):
        shown = network.forward(probe_image(network), features=True)  # without --compile
    return shown if shown.maps else shown._replace(maps=NoMaps(), preact=NoMaps())


class NoMaps:
    """What a transformer shows for maps, until somebody asks for them."""

    def __iter__(self, *_):
        raise ValueError('one of the two has no maps [N, C, H, W], which the method compares; take one that compares '
                         'logits or pooled features')

    __getitem__ = __len__ = __iter__


def probe_image(network: nn.Module) -> torch.Tensor:
    size = getattr(network, 'image_size', 64)
    return torch.zeros(1, 3, size, size, device=next(network.parameters()).device)


def positive(**values: float):
    """Refuse hyper-parameters that would silently switch a method off, or turn it around."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f'{name} is {value}, but has to be above 0' + ', and finite' * (value == math.inf))


def terms(**factors: float):
    """The same of the factors of a method's terms, which are not all needed."""
    for name, value in factors.items():
        if not 0 <= value < math.inf:
            raise ValueError(f'{name} is {value}, but has to be 0 or more, and finite')
    if not any(factors.values()):
        raise ValueError(f'{" and ".join(factors)} are 0: the method would do nothing')
