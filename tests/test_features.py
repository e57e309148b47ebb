"""What our networks show of themselves: the contract of `Features`."""
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from zoo import build, norms_of, pictures, with_statistics

from models import Features

# one network of each kind of block, each variant of a path
NAMES = ['resnet18', 'resnet50', 'mobilenet_v1', 'mobilenet_v2', 'mobilenet_v2_mgd', 'shufflenet_v2_x0_5',
         'resnet8', 'resnet8x4', 'cifar_resnet18', 'wrn_16_1', 'wrn_16_2', 'cifar_vgg13', 'cifar_mobilenet_v2',
         'shufflenet_v1', 'cifar_shufflenet_v2']


def activation(name):
    if name == 'cifar_mobilenet_v2':  # its stages end without one
        return nn.Identity()
    return F.relu6 if name.startswith('mobilenet_v2') else F.relu


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('height, width', [(32, 32), (64, 64), (97, 65)])
@torch.no_grad()
def test_they_belong_together(name, height, width):
    model = with_statistics(build(name))
    x = 10 * pictures(height, width)  # large enough to tell ReLU from ReLU6
    out = model(x, features=True)
    assert isinstance(out, Features)
    assert torch.equal(out.logits, model(x))
    assert out.logits.shape == (2, 10)
    torch.testing.assert_close(out.pooled, out.head.mean((2, 3)))
    assert isinstance(model.classifier, nn.Linear)
    torch.testing.assert_close(model.classifier(out.pooled), out.logits)

    assert len(out.preact) == len(out.maps) == len(model.feature_channels) == len(model.feature_norms)
    assert [m.shape[1] for m in out.maps] == model.feature_channels
    for preact, after in zip(out.preact, out.maps, strict=True):
        assert preact.min() < 0 and torch.equal(activation(name)(preact), after)
        if height > 32:  # less is one pixel
            assert (preact.amin((0, 2, 3)) < 0).float().mean() > 0.6  # no half of the channels is rectified already
    sizes = [m.shape[2] for m in out.maps]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize('name', NAMES)
def test_a_training_step(name):
    """Every norm runs once, nothing is changed in place, gradients reach every map."""
    model = build(name).train()
    norms, calls = norms_of(model), Counter()
    for norm in norms:
        norm.register_forward_hook(lambda module, args, output: calls.update([module]))
    out = model(pictures(64), features=True)
    assert calls == Counter(norms)
    assert all(norm.num_batches_tracked == 1 for norm in norms)

    tensors = [*out.preact, *out.maps, out.head, out.pooled]
    assert all(t._version == 0 for t in [out.logits, *tensors])
    loss = out.logits.square().sum() + sum(p.square().mean() for p in out.preact)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize('name', [name for name in NAMES if name.startswith(('mobilenet', 'wrn', 'cifar_vgg'))])
@torch.no_grad()
def test_norms_give_the_preactivations(name):
    model, seen = with_statistics(build(name)), {}
    for norm in norms_of(model):
        norm.register_forward_hook(lambda module, args, output: seen.update({module: output.clone()}))
    out = model(pictures(64), features=True)
    assert all(torch.equal(seen[norm], preact) for norm, preact in zip(model.feature_norms, out.preact, strict=True))


@pytest.mark.parametrize('name', [name for name in NAMES if 'shufflenet_v2' not in name])
@torch.no_grad()
def test_nothing_but_a_residual_sum_follows_the_norms(name):
    """So what is added to the bias of a norm is added to the pre-activation, and to nothing before it."""
    model = with_statistics(build(name))
    before = model(pictures(64), features=True).preact
    for i, norm in enumerate(model.feature_norms):
        bias = norm.bias.clone()
        norm.bias += 1
        after = model(pictures(64), features=True).preact
        torch.testing.assert_close(after[i], before[i] + 1, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(after[j], before[j]) for j in range(i))
        norm.bias.copy_(bias)


@torch.no_grad()
def test_what_a_shuffled_block_hands_on_is_not_rectified():
    """torchvision's blocks, their last ReLUs left to whoever uses the map."""
    theirs = with_statistics(torchvision.models.shufflenet_v2_x0_5(num_classes=10))
    ours = build('shufflenet_v2_x0_5').eval()
    ours.load_state_dict(theirs.state_dict())
    x, expected = theirs.maxpool(theirs.conv1(pictures(64))), []
    for stage in (theirs.stage2, theirs.stage3, theirs.stage4):
        for block in stage:
            kept, used = x.chunk(2, dim=1) if block.stride == 1 else (block.branch1[:-1](x.relu()), x)
            x = torch.stack([kept, block.branch2[:-1](used.relu())], dim=2).flatten(1, 2)
        expected.append(x)
    out = ours(pictures(64), features=True)
    for preact, wanted in zip(out.preact, expected, strict=True):
        torch.testing.assert_close(preact, wanted)
    torch.testing.assert_close(out.logits, theirs(pictures(64)))
    assert ours.feature_norms == [None] * 3  # those of the halves are in different blocks
