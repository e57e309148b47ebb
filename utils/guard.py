"""An update that would break the weights does not happen, on any rank, and nobody has to wait for the device to know.

A loss that isn't finite is multiplied by NaN before its backward pass, so the exchange of gradients tells every rank;
an update whose gradient isn't finite is left out on the device; and so are all after it. The loop reads the meters
now and then, finds what happened, and stops. With --max-broken-updates it goes on: only that update was left out, and
with it what its forward pass did to buffers, such as the statistics of norms. In fp16 the scaler leaves updates out by
itself, and a gradient that overflows is its everyday business: only the loss counts there.
"""
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


class Guard:
    def __init__(self, device: torch.device, buffers: list[torch.Tensor] | None = None):
        """`buffers`: those to bring back, if the run is to go on."""
        self.one = torch.ones((), device=device)  # NaN after the first number that isn't finite: 0 times it is NaN
        self.goes_on, self.buffers = buffers is not None, buffers or []
        self.before = [buffer.clone() for buffer in self.buffers]

    def begin(self):
        """Before the first batch of an update."""
        if self.goes_on:
            self.one.fill_(1)
        if self.buffers:
            torch._foreach_copy_(self.before, self.buffers)

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
        for buffer, before in zip(self.buffers, self.before):
            buffer.copy_(torch.where(norm.isfinite(), buffer, before))  # the norm is the same on all ranks
        return norm
