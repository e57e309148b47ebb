"""An update that would break the weights does not happen, on any rank, and nobody has to wait for the device to know.

A loss that isn't finite is multiplied by NaN before its backward pass, so the exchange of gradients tells every rank;
an update whose gradient isn't finite is left out on the device; and so are all after it. The loop reads the meters
now and then, finds what happened, and stops. With --max-broken-updates it goes on: only that update was left out, and
with it what its forward pass did to buffers, such as the statistics of norms. In fp16 the scaler leaves updates out by
itself, and a gradient that overflows is its everyday business: only the loss counts there. (With
--max-broken-updates, the buffers of such an update are brought back, too.)
"""
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


class Guard:
    def __init__(self, device: torch.device, buffers: list[torch.Tensor] | None = None):
        """`buffers`: those to bring back, if the run is to go on."""
        self.one = torch.ones((), device=device)  # NaN after the first number that isn't finite: 0 times it is NaN
        self.goes_on = buffers is not None
        self.groups = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype for b in buffers or []}]
        self.before = []

    def begin(self):
        """Before the first batch of an update."""
        if self.goes_on:
            self.one.fill_(1)
            self.before = [joined(group) for group in self.groups]

    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        self.one += 0 * loss.detach()
        return loss * self.one

    def update(self, optimizer, scaler, clip=None) -> torch.Tensor:
        """One optimizer step if all is well; returns the norm of the gradient."""
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        if clip:
            clip_grads_with_norm_(parameters, clip, norm)
        if not scaler.is_enabled():
            self.one += 0 * norm
            optimizer.found_inf = self.one.isnan().float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        for group, before in zip(self.groups, self.before):
            kept = torch.where(norm.isfinite(), joined(group), before)  # the norm is the same on all ranks
            kept = kept.split([b.numel() for b in group])
            torch._foreach_copy_(group, [x.view(b.shape) for x, b in zip(kept, group)])
        return norm


def joined(buffers: list[torch.Tensor]) -> torch.Tensor:
    """Many are small: as one they take few kernels."""
    return torch.cat([b.flatten() for b in buffers])
