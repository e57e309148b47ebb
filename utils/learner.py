"""What the device does in an update, from batches to new weights."""
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .closely import LABELS, Closely, timed
from .dot import DOT
from .graph import Recorded
from .guard import Guard
from .meters import hits
from .setup import precision


class Learner:
    """`learn` from every batch of an update, then `step`; or `graph`, both at once from its only one, if asked for."""

    def __init__(self, task: nn.Module, optimizer: torch.optim.Optimizer, scaler, device: torch.device, args):
        self.task, self.optimizer, self.scaler, self.device, self.args = task, optimizer, scaler, device, args
        self.guard = Guard(device, [*task.buffers()] if args.max_broken_updates else None)
        self.names = []  # of what learn() returns
        self.told = torch.compile(told, mode='default', dynamic=False) if args.compile else told
        self.graph = Recorded(self.whole) if args.cuda_graph else None
        if self.graph:
            for group in optimizer.param_groups:
                group['lr'] = torch.tensor(group['lr'], device=device)  # a number would be recorded for ever

    def learn(self, batch, look: Closely | None = None) -> Tensor:
        """Add the gradient of a batch to those before; what the meter counts of it, on the device."""
        # Compiled, a loss gives all parameters a gradient, if only of zeros: DOT could not tell whom it reaches.
        eager = self.args.compile and isinstance(self.optimizer, DOT) and not self.optimizer.state
        with (torch.compiler.set_stance('force_eager') if eager else nullcontext(),
              precision(self.device, self.args.amp), timed('forward')):
            logits, losses = self.task(batch)
        total = sum(losses.values())
        loss = self.guard.loss(batch.weight * total)
        if isinstance(self.optimizer, DOT):
            self.optimizer.split(*(batch.weight * sum(v for k, v in losses.items() if (k in LABELS) == labels)
                                   for labels in (True, False)))
        if look:
            look.at_losses(losses, batch.weight)
        with timed('backward'):
            self.scaler.scale(loss).backward()
        self.names = ['top1', 'top5', 'loss', *(f'loss/{name}' for name in losses)]
        return self.told(logits.detach(), batch.target, [x.detach() for x in (total, *losses.values())])

    def step(self) -> Tensor:
        """New weights, if all is well; the norm of the gradient."""
        return self.guard.update(self.optimizer, self.scaler, self.args.clip_grad)

    def whole(self, batch) -> tuple[Tensor, Tensor]:
        self.guard.begin()
        return self.learn(batch), self.step()


def told(logits: Tensor, target: Tensor, losses: list[Tensor]) -> Tensor:
    """What is counted of a batch: as few kernels, if compiled."""
    return torch.stack([x.float() for x in (*hits(logits, target), *losses)])
