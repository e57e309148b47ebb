"""Optimizers, the learning rate as a pure function of the epoch, and the average of the weights."""
import math

import torch
from torch import nn

from .dot import DOT
from .setup import compiled


def make_optimizer(task: nn.Module, args) -> torch.optim.Optimizer:
    """One that leaves out an update where a tensor on the device says so (guard.py), as fused optimizers and DOT do."""
    parameters = [p for p in task.parameters() if p.requires_grad]
    if args.no_bias_decay:
        groups = [{'params': [p for p in parameters if p.ndim > 1]},
                  {'params': [p for p in parameters if p.ndim <= 1], 'weight_decay': 0.0}]
    else:
        groups = [{'params': parameters}]
    if args.optimizer == 'adamw':
        return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)
    if args.optimizer == 'dot':
        return DOT(groups, args.lr, args.momentum, args.dot_delta, args.weight_decay)
    optimizer = torch.optim.SGD(groups, args.lr, momentum=args.momentum, nesterov=args.nesterov,
                                weight_decay=args.weight_decay, fused=True)
    if args.momentum:
        # Made here, as zeros: where the very first update is left out (usual in fp16), fused SGD of torch 2.8 to 2.15
        # allocates its buffer, does not fill it, and trusts it from the second update on.
        for p in parameters:
            optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict):
    """Its state from a checkpoint; its hyper-parameters stay those of the command line."""
    asked = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, values in zip(optimizer.param_groups, asked):
        group.update(values)
    # Fused steps rely on state that is laid out in memory as its parameter is, which it may not be where it was saved
    # (--channels-last).
    for p, state in optimizer.state.items():
        state.update((key, torch.empty_like(p).copy_(value)) for key, value in state.items()
                     if isinstance(value, torch.Tensor) and value.shape == p.shape)


def total_epochs(args) -> int:
    return args.epochs + args.warmup * args.warmup_epochs


def learning_rate(epoch: float, args) -> float:
    """The rate at a moment of the run; epoch is fractional and counts from 0."""
    if args.warmup:
        at = epoch if args.warmup_by == 'iteration' else math.floor(epoch)
        if at < args.warmup_epochs:
            return args.lr * (0.1 + 0.9 * at / args.warmup_epochs)
        epoch -= args.warmup_epochs
    if args.schedule == 'step':
        return args.lr * args.lr_drop_ratio ** sum(epoch >= drop for drop in args.lr_drop_epochs)
    done = min(epoch / args.epochs, 1.0)
    courses = {'cosine': 0.5 * (1 + math.cos(math.pi * done)), 'linear': 1 - done, 'constant': 1.0}
    return args.lr * courses[args.schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float):
    for group in optimizer.param_groups:
        if isinstance(group['lr'], torch.Tensor):  # a graph reads it (learner.py)
            group['lr'].fill_(rate)
        else:
            group['lr'] = rate


class Average(torch.optim.swa_utils.AveragedModel):
    """Exponential, of weights and statistics, from the first it is shown on; counters are taken as they are.

    AveragedModel's own update has the host wait for the device.
    """

    def __init__(self, student: nn.Module, decay: float):
        super().__init__(student)
        self.decay = decay
        both = (*self.module.parameters(), *self.module.buffers())
        self.moves = [x.is_floating_point() and bool(x.isfinite().all()) for x in both]  # but counters, masks of -inf

    @torch.no_grad()
    def update_parameters(self, student: nn.Module):
        pairs = [*zip(self.module.parameters(), student.parameters()),
                 *zip(self.module.buffers(), student.buffers())]
        averaged = [pair for pair, moves in zip(pairs, self.moves) if self.n_averaged and moves]
        if averaged:
            torch._foreach_lerp_(*map(list, zip(*averaged)), 1 - self.decay)
        for (old, new), moves in zip(pairs, self.moves):
            if not (self.n_averaged and moves):
                old.copy_(new)
        self.n_averaged += 1


def make_ema(student: nn.Module, args) -> Average | None:
    if not args.ema:
        return None
    average = Average(student, args.ema)
    compiled(average.module, args)  # a copy is not
    return average
