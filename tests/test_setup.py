"""What place() makes of a network for its device."""
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from zoo import build, pictures

from utils.setup import StridedDepthwise, place, precision

CPU = torch.device('cpu')
HALF = SimpleNamespace(channels_last=True, compile=False, amp='bf16')


@pytest.mark.parametrize('name, strided', [('mobilenet_v1', 4), ('mobilenet_v2', 4), ('shufflenet_v1', 3),
                                           ('resnet18', 0)])
def test_strided_depthwise_convolutions_learn_in_float32_beside_bf16(name, strided):
    network, seen = deepcopy(place(build(name), CPU, HALF)), []
    assert list(network.state_dict()) == list(build(name).state_dict())
    changed = [m for m in network.modules() if type(m) is StridedDepthwise]
    assert len(changed) == strided and all(m.groups > 1 and m.stride == (2, 2) for m in changed)
    for m in changed:
        m.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with precision(CPU, 'bf16'):
        network(pictures(64)).sum().backward()
        with torch.no_grad():
            network(pictures(64))
    assert seen == [torch.float32] * strided + [torch.bfloat16] * strided  # evaluation stays as fast as it was
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


def test_its_gradients_are_those_of_the_convolution():
    torch.manual_seed(0)
    conv = place(nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False), CPU, HALF)
    exact = nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False).double()
    exact.load_state_dict(conv.state_dict())
    x = torch.randn(2, 6, 9, 9, dtype=torch.bfloat16, requires_grad=True)
    y = x.detach().double().requires_grad_()
    with precision(CPU, 'bf16'):
        conv(x).square().sum().backward()
    exact(y).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad.double(), exact.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-2, atol=1e-2)  # given back in bf16


def test_nothing_is_changed_without_bf16():
    network = place(build('mobilenet_v1'), CPU, SimpleNamespace(channels_last=False, compile=False, amp='off'))
    assert not any(type(m) is StridedDepthwise for m in network.modules())
