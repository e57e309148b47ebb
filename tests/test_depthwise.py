"""Strided depthwise convolutions in bf16 on a CPU."""
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import build, pictures, with_statistics

from distillers.lean import folded
from utils.depthwise import StridedDepthwise
from utils.setup import place, precision

CPU = torch.device('cpu')
HALF = SimpleNamespace(channels_last=True, compile=False, amp='bf16')


def replaced(network):
    return [m for m in network.modules() if type(m) is StridedDepthwise]


@pytest.mark.parametrize('name, strided', [('mobilenet_v1', 4), ('mobilenet_v2', 4), ('shufflenet_v1', 3),
                                           ('resnet18', 0)])
def test_those_of_a_network_are_replaced_and_nothing_else_changes(name, strided):
    before, after = build(name), deepcopy(place(build(name), CPU, HALF))
    assert len(replaced(after)) == strided and all(m.stride == (2, 2) for m in replaced(after))
    assert list(after.state_dict()) == list(before.state_dict())
    shown = []
    for network in before.to(memory_format=torch.channels_last), after:
        torch.manual_seed(0)  # of dropout
        with precision(CPU, 'bf16'):
            shown.append(network.train()(pictures(64)))
    assert torch.equal(*shown)
    shown[1].sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in after.parameters())


def test_padding_in_words_is_left_alone():
    """The gradient's own kernels know numbers only."""
    conv = place(nn.Conv2d(6, 6, 3, 2, 'valid', groups=6, bias=False), CPU, HALF)
    with precision(CPU, 'bf16'):
        conv(torch.randn(1, 6, 9, 9)).sum().backward()
    assert conv.weight.grad.isfinite().all()


@pytest.mark.parametrize('half', [True, False])
@pytest.mark.parametrize('compile', [False, True])
def test_gradients_are_those_of_the_convolution(half, compile):
    torch.manual_seed(0)
    conv = place(nn.Conv2d(6, 12, 3, 2, 1, groups=6, bias=False), CPU, HALF)
    exact = nn.Conv2d(6, 12, 3, 2, 1, groups=6, bias=False).double()
    exact.load_state_dict(conv.state_dict())
    x = torch.randn(2, 6, 9, 9, dtype=torch.bfloat16 if half else torch.float32, requires_grad=True)
    y = x.detach().double().requires_grad_()
    if compile:
        conv.compile(backend='aot_eager')
    with precision(CPU, 'bf16' if half else 'off'):
        made = conv(x)
    assert made.dtype == x.dtype
    weight = torch.linspace(-1, 1, made.numel()).view(made.shape)
    (made * weight).sum().backward()
    (exact(y) * weight).sum().backward()
    close = {'rtol': 0, 'atol': 0.02} if half else {'rtol': 1e-5, 'atol': 1e-5}
    torch.testing.assert_close(x.grad.double(), y.grad, **close)
    torch.testing.assert_close(conv.weight.grad.double(), exact.weight.grad, rtol=close['rtol'],
                               atol=close['atol'] * (10 if half else 1))


def test_the_gradient_of_the_input_is_computed_in_float32(monkeypatch):
    """That of the weight is not."""
    conv, seen, backward = place(nn.Conv2d(4, 4, 3, 2, 1, groups=4, bias=False), CPU, HALF), [], \
        torch.ops.aten.convolution_backward

    def watched(grad, *args):
        seen.append((grad.dtype, args[-1]))
        return backward(grad, *args)
    monkeypatch.setattr(torch.ops.aten, 'convolution_backward', watched)
    x = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    with precision(CPU, 'bf16'):
        F.relu(conv(x)).sum().backward()
    assert seen == [(torch.float32, (True, False, False)), (torch.bfloat16, (False, True, False))]
    assert x.grad.dtype == torch.bfloat16 and conv.weight.grad.dtype == torch.float32


def test_a_teacher_of_them_is_folded():
    """Which gives them a bias."""
    teacher = place(with_statistics(build('mobilenet_v2')), CPU, HALF).requires_grad_(False)
    teacher.image_size = 64
    lean = folded(teacher)
    assert len(replaced(lean)) == 4 and all(m.bias.any() for m in replaced(lean))
    torch.testing.assert_close(lean(pictures(64)), teacher(pictures(64)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('amp, conv', [('off', nn.Conv2d(4, 4, 3, 2, groups=4, bias=False)),
                                       ('bf16', nn.Conv2d(4, 4, 3, 1, groups=4, bias=False)),
                                       ('bf16', nn.Conv2d(4, 4, 3, 2, groups=2, bias=False)),
                                       ('bf16', nn.Conv2d(4, 4, 3, 2, groups=4)),
                                       ('bf16', nn.Conv2d(1, 4, 3, 2, bias=False))])
def test_all_others_stay(amp, conv):
    assert not replaced(place(conv, CPU, SimpleNamespace(channels_last=False, compile=False, amp=amp)))
