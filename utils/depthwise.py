"""Strided depthwise convolutions on a CPU in bf16, which has no kernel of its own for the gradient of their input.

What stands in for it takes 10 to 150 times as long as the same in float32.
"""
import torch
import torch.nn.functional as F
from torch import nn


class Convolution(torch.autograd.Function):
    """In whatever precision it is asked for; the gradient of its input is computed in float32."""

    @staticmethod
    def forward(ctx, x, weight, *how):
        ctx.save_for_backward(x, weight)
        ctx.how = how
        return F.conv2d(x, weight, None, *how)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        how = None, stride, padding, dilation, False, (0, 0), groups
        backward, like_x = torch.ops.aten.convolution_backward, torch.empty_like(x, dtype=torch.float32)
        of_x = backward(grad.float(), like_x, weight.float(), *how, (True, False, False))[0]
        of_weight = backward(grad, x.to(grad.dtype), weight.to(grad.dtype), *how, (False, True, False))[1]
        return of_x.to(x.dtype), of_weight.to(weight.dtype), *[None] * len(ctx.how)


class StridedDepthwise(nn.Conv2d):
    def forward(self, x):
        if self.bias is not None:  # of a norm that was folded into it since, in a teacher: nothing goes back
            return super().forward(x)
        return Convolution.apply(x, self.weight, self.stride, self.padding, self.dilation, self.groups)


def replace_strided_depthwise(network: nn.Module):
    """In place, as are their weights."""
    for module in network.modules():
        if (type(module) is nn.Conv2d and 1 < module.groups == module.in_channels and max(module.stride) > 1
                and module.bias is None and module.padding_mode == 'zeros' and isinstance(module.padding, tuple)):
            module.__class__ = StridedDepthwise
