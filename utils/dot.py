"""DOT: A Distillation-Oriented Trainer. Zhao et al., ICCV 2023."""
import torch
from torch import Tensor

from . import distributed


class DOT(torch.optim.Optimizer):
    """SGD with a buffer of its own for each of the task's and the distillation's gradient, the latter of longer memory.

        v_ce = (mu - delta) v_ce + g_ce + wd p
        v_kd = (mu + delta) v_kd + g_kd
        p    = p - lr (v_ce + v_kd)

    Before the backward pass of the sum of all losses, `split` is told its two parts. A parameter that only one of them
    reaches has one buffer, with momentum mu and the weight decay.
    """

    def __init__(self, params, lr: float, momentum: float, delta: float, weight_decay: float):
        super().__init__(params, {'lr': lr, 'momentum': momentum, 'delta': delta, 'weight_decay': weight_decay})
        self.g_ce: dict[Tensor, Tensor] = {}  # since the last step, as backward does it with .grad

    def split(self, ce: Tensor, others: Tensor):
        """Add the gradient of ce to that of earlier batches of the update. The graph stays for the backward pass."""
        params = [p for group in self.param_groups for p in group['params']]
        if not self.state:  # who is reached by what holds for the whole run
            reached = (torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
                       for loss in (ce, others))
            for p, by_ce, by_others in zip(params, *reached):
                self.state[p] = {'shared': by_ce is not None and by_others is not None,
                                 'v_ce': torch.zeros_like(p), 'v_kd': torch.zeros_like(p)}
        for p, g in zip(params, torch.autograd.grad(ce, params, retain_graph=True, allow_unused=True)):
            if g is not None:
                self.g_ce[p] = self.g_ce[p] + g if p in self.g_ce else g

    @torch.no_grad()
    def step(self):
        """`found_inf`, set from outside, leaves the update out without waiting for the device."""
        skip = self.found_inf.bool()
        self.average()
        for group in self.param_groups:
            reached = [p for p in group['params'] if p.grad is not None]
            shared, own = ([p for p in reached if self.state[p]['shared'] == both] for both in (True, False))
            self.move(shared, [self.g_ce[p] for p in shared], group, group['delta'], skip)
            self.move(own, [p.grad for p in own], group, 0.0, skip)  # v_kd stays 0
        self.g_ce = {}

    def move(self, params: list[Tensor], g_ce: list[Tensor], group: dict, delta: float, skip: Tensor):
        """One operation for all parameters at a time: there are many, and most are small."""
        if not params:
            return
        v_ce, v_kd = ([self.state[p][name] for p in params] for name in ('v_ce', 'v_kd'))
        ce = torch._foreach_mul(v_ce, group['momentum'] - delta)
        torch._foreach_add_(ce, g_ce)
        torch._foreach_add_(ce, params, alpha=group['weight_decay'])
        kd = torch._foreach_mul(v_kd, group['momentum'] + delta)
        torch._foreach_add_(kd, [p.grad for p in params])
        torch._foreach_sub_(kd, g_ce)
        moved = torch._foreach_add(params, torch._foreach_add(ce, kd), alpha=-group['lr'])
        for old, new in (v_ce, ce), (v_kd, kd), (params, moved):
            torch._foreach_copy_(old, [torch.where(skip, a, b) for a, b in zip(old, new)])

    def average(self):
        """g_ce over ranks, as DDP does it with .grad."""
        if distributed.world() > 1:
            flat = torch.cat([g.flatten() for g in self.g_ce.values()])
            parts = (distributed.total(flat) / distributed.world()).split([g.numel() for g in self.g_ce.values()])
            self.g_ce = {p: part.view_as(p) for p, part in zip(self.g_ce, parts)}
