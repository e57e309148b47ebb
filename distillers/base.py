"""What a method is, what trains a student with some of them, and how a method's arguments become flags."""
import inspect
import re
from contextlib import contextmanager
from typing import Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import nn

from models import Features
from utils.args import switch


class Distiller(nn.Module):
    """A method: `__init__(self, student, teacher, *, ...)` and `forward`.

    The keyword-only arguments are its hyper-parameters, each with a line `name: text` in the class docstring. The
    networks are there to be read (channels, norms, weights, all loaded by then) and are not kept. What the method has
    to remember is a buffer, what it trains a submodule.
    """

    default_ce_weight = 1.0  # of the cross entropy beside it, where it runs alone
    report: list[dict] = []  # noqa: RUF012, rows of what the last start_epoch did, for the log

    def forward(self, s: Features, t: Features, batch) -> dict[str, torch.Tensor]:
        """The weighted losses by name, means over the batch."""
        raise NotImplementedError

    def start_epoch(self, epoch: int, pairs):
        """Called before each epoch, counted from 1, and again where a run resumes within one.

        pairs() iterates over (s, t), the features of some training images in eval mode and without gradient; each
        rank sees its share of them.
        """


class Distillation(nn.Module):
    """Batch -> logits of the student, {'ce': cross entropy, and the losses of the distillers}.

    ce_weight: factor of the cross entropy; None: the distiller's default if it runs alone, else 1
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, distillers: dict[str, Distiller],
                 ce_weight: float | None = None, label_smoothing: float = 0.0):
        super().__init__()
        self.student, self.distillers = student, nn.ModuleDict(distillers)
        # Not a submodule: no optimizer, checkpoint, DDP or train() ever meets it; whoever built it moves it.
        object.__setattr__(self, 'teacher', teacher.eval().requires_grad_(False))
        if ce_weight is None:
            ce_weight = next(iter(distillers.values())).default_ce_weight if len(distillers) == 1 else 1.0
        self.ce_weight, self.label_smoothing = ce_weight, label_smoothing

    def forward(self, batch):
        with torch.no_grad():
            t = self.teacher(batch.images, features=True)
        s = self.student(batch.images, features=True)
        ce = F.cross_entropy(s.logits.float(), batch.target, label_smoothing=self.label_smoothing)
        losses = {'ce': self.ce_weight * ce}
        for distiller in self.distillers.values():
            losses |= distiller(s, t, batch)
        return s.logits, losses

    def start_epoch(self, epoch: int, batches) -> dict[str, list[dict]]:
        """Let the distillers prepare for an epoch, counted from 1; batches() iterates over what forward gets."""
        for distiller in self.distillers.values():
            distiller.start_epoch(epoch, lambda: self.pairs(batches()))
        return {name: distiller.report for name, distiller in self.distillers.items() if distiller.report}

    @torch.no_grad()
    def pairs(self, batches):
        with evaluating(self.student):
            for batch in batches:
                yield self.student(batch.images, features=True), self.teacher(batch.images, features=True)


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
def probe(network: nn.Module, size: int = 64) -> Features:
    """What `network` shows of one image, to read shapes from; leaves no trace in it, nor in the random state."""
    with evaluating(network):
        return network(torch.zeros(1, 3, size, size, device=next(network.parameters()).device), features=True)


def positive(**values: float):
    """Refuse hyper-parameters that would silently switch a method off, or turn it around."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f'{name} is {value}, but has to be above 0')


# Flags

def hyper_parameters(method: type[Distiller]) -> dict[str, tuple[inspect.Parameter, str]]:
    """name: (parameter, text of its docstring line)."""
    texts = dict(re.findall(r'^ *(\w+): (.+)$', inspect.getdoc(method), re.MULTILINE))
    parameters = inspect.signature(method).parameters.values()
    return {p.name: (p, texts[p.name]) for p in parameters if p.kind is p.KEYWORD_ONLY}


def options(parameter: inspect.Parameter) -> dict:
    """add_argument's words: Literal is a choice, a tuple takes several values, else the default tells the type."""
    kind, inner = get_origin(parameter.annotation), get_args(parameter.annotation)
    if kind is Literal:
        return {'choices': inner}
    if kind is tuple:
        return {'nargs': '+', 'type': inner[0], 'metavar': 'X'}
    if isinstance(parameter.default, bool):
        return {'nargs': '?', 'const': True, 'type': switch, 'metavar': '0|1'}
    return {'type': type(parameter.default), 'metavar': 'N' if isinstance(parameter.default, int) else 'X'}


def add_flags(parser, table: dict[str, type[Distiller]]):
    """--NAME-HYPER-PARAMETER for each of each method in the table."""
    for name, method in table.items():
        group = parser.add_argument_group(f'--distiller {name}', inspect.getdoc(method).partition('\n')[0])
        for key, (parameter, text) in hyper_parameters(method).items():
            group.add_argument(f'--{name}-{key}'.replace('_', '-'), default=parameter.default, help=text,
                               **options(parameter))


def from_flags(table: dict[str, type[Distiller]], names: list[str], args, student, teacher) -> dict[str, Distiller]:
    """The named methods, built with the values of their flags."""
    return {name: table[name](student, teacher, **{key: getattr(args, f'{name}_{key}')
                                                   for key in hyper_parameters(table[name])}) for name in names}
