"""A few updates of each epoch are looked at closely: where their time goes, and how labels and distillation pull.

Which ones is a function of the place in the epoch, so all ranks look at the same ones, and so does a resumed run.
Looking changes no bit of what is trained.
"""
import time
from contextlib import contextmanager

import torch

from . import distributed

LABELS = {'ce', 'ce_teacher'}  # names of the losses that come from the labels
LOOKS, APART = 4, 50  # per epoch, and updates between two: a look costs a backward pass through the student

_looking = None  # the Closely whose update is looked at now


@torch.compiler.disable
def now(device: torch.device) -> float:
    """When the device has done all that it was told to."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def timed(name: str):
    """Add what the block takes to the times of the update, if it is looked at."""
    look = None if torch.compiler.is_compiling() else _looking
    began = look and now(look.device)
    yield
    if look:
        look.spent[name] = look.spent.get(name, 0.0) + now(look.device) - began


class Closely:
    def __init__(self, student, updates: int, device: torch.device, args):
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        # An update that is looked at is not a recorded one, and takes several times as long.
        self.every, self.device = updates if args.cuda_graph else min(max(updates // LOOKS, APART), updates), device
        self.on = False  # for the update under way
        self.compiled = args.compile  # so that student and losses may be one
        self.one_backward = args.compile or args.amp == 'fp16'  # graphs are used up by it; gradients are scaled

    def begin(self, update: int):
        """The update with this number, counted from 1, begins."""
        global _looking
        self.on = update % self.every == self.every // 2
        _looking = self if self.on else None
        self.spent, self.by_labels = {}, None

    def at_losses(self, losses: dict, weight: float):
        """Before a backward pass: keep the gradient of the labels' part. The graph stays."""
        labels = [loss for name, loss in losses.items() if name in LABELS]
        if self.on and len(labels) < len(losses) and not self.one_backward:
            grads = torch.autograd.grad(weight * sum(labels), self.parameters, retain_graph=True, allow_unused=True)
            flat = self.flat(grads)
            self.by_labels = flat if self.by_labels is None else self.by_labels + flat

    def end(self, meter):
        """After the last backward pass, before anything is clipped: tell the meter."""
        global _looking
        if not self.on:
            return
        _looking = None
        rest = self.spent.pop('forward') - self.spent.get('teacher', 0.0) - self.spent.get('student', 0.0)
        as_one = self.compiled and 'student' not in self.spent
        meter.add_times(self.spent | {'student' if as_one else 'losses': rest})
        if self.by_labels is not None:
            labels = distributed.total(self.by_labels) / distributed.world()
            others = self.flat([p.grad for p in self.parameters]) - labels
            norms = labels.norm(), others.norm()
            meter.add_balance(torch.stack([*norms, labels @ others / (norms[0] * norms[1]).clamp(min=1e-30)]))

    def flat(self, grads) -> torch.Tensor:
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().float()
                          for p, g in zip(self.parameters, grads)])
