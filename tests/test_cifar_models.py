"""Networks for CIFAR: the published sizes, the structure of their blocks."""
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import assert_same
from torch import nn
from zoo import build, pictures, with_statistics

import models
from models import create_model, imagenet
from models.cifar import NETWORKS
from utils import checkpoint

# parameters with 100 classes, 10^6 multiply-adds at 32x32, (channels, size) of the stages, channels of the head
PUBLISHED = {
    'resnet8': (83_892, 12.5, [(16, 32), (32, 16), (64, 8)], 64),
    'resnet14': (181_108, 26.7, [(16, 32), (32, 16), (64, 8)], 64),
    'resnet20': (278_324, 40.8, [(16, 32), (32, 16), (64, 8)], 64),
    'resnet32': (472_756, 69.1, [(16, 32), (32, 16), (64, 8)], 64),
    'resnet44': (667_188, 97.4, [(16, 32), (32, 16), (64, 8)], 64),
    'resnet56': (861_620, 125.8, [(16, 32), (32, 16), (64, 8)], 64),
    'resnet110': (1_736_564, 253.2, [(16, 32), (32, 16), (64, 8)], 64),
    'resnet8x4': (1_233_540, 177, [(64, 32), (128, 16), (256, 8)], 256),
    'resnet32x4': (7_433_860, 1083, [(64, 32), (128, 16), (256, 8)], 256),
    'cifar_resnet18': (11_220_132, 555, [(64, 32), (128, 16), (256, 8), (512, 4)], 512),
    'cifar_resnet50': (23_705_252, 1298, [(256, 32), (512, 16), (1024, 8), (2048, 4)], 2048),
    'wrn_16_1': (180_916, 26.7, [(16, 32), (32, 16), (64, 8)], 64),
    'wrn_16_2': (703_284, 101, [(32, 32), (64, 16), (128, 8)], 128),
    'wrn_16_4': (2_772_020, 392.6, [(64, 32), (128, 16), (256, 8)], 256),
    'wrn_40_1': (569_780, 83, [(16, 32), (32, 16), (64, 8)], 64),
    'wrn_40_2': (2_255_156, 328, [(32, 32), (64, 16), (128, 8)], 128),
    'wrn_40_4': (8_972_340, 1298.6, [(64, 32), (128, 16), (256, 8)], 256),
    'cifar_vgg8': (3_965_028, 96, [(128, 16), (256, 8), (512, 4), (512, 4)], 512),
    'cifar_vgg11': (9_277_284, 209, [(128, 16), (256, 8), (512, 4), (512, 4)], 512),
    'cifar_vgg13': (9_462_180, 285, [(128, 16), (256, 8), (512, 4), (512, 4)], 512),
    'cifar_vgg16': (14_774_436, 398, [(128, 16), (256, 8), (512, 4), (512, 4)], 512),
    'cifar_vgg19': (20_086_692, 511, [(128, 16), (256, 8), (512, 4), (512, 4)], 512),
    'cifar_mobilenet_v2': (812_836, 6.5, [(12, 16), (16, 8), (48, 4), (160, 2)], 1280),
    'cifar_mobilenet_v2_x1_0': (2_353_060, 22.4, [(24, 16), (32, 8), (96, 4), (320, 2)], 1280),
    'shufflenet_v1': (949_258, 38.7, [(240, 16), (480, 8), (960, 4)], 960),
    'cifar_shufflenet_v2': (1_355_528, 44.5, [(116, 16), (232, 8), (464, 4)], 1024),
    'cifar_shufflenet_v2_x1_5': (2_580_548, 93.8, [(176, 16), (352, 8), (704, 4)], 1024),
}
# the published table

@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes(name):
    parameters, macs, stages, head = PUBLISHED[name]
    with torch.device('meta'):
        model = create_model(name, 100)
        counted = []
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(lambda m, args, out: counted.append(out.numel() * m.weight[0].numel()))
        with torch.no_grad():
            out = model(torch.empty(1, 3, 32, 32), features=True)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(counted) / 1e6 == pytest.approx(macs, abs=0.6 if macs == int(macs) else 0.06)
    assert [(m.shape[1], *m.shape[2:]) for m in out.maps] == [(c, size, size) for c, size in stages]
    assert [p.shape for p in out.preact] == [m.shape for m in out.maps]
    assert model.feature_channels == [c for c, _ in stages]
    assert out.head.shape[1] == out.pooled.shape[1] == model.classifier.in_features == head


def test_the_table_has_all_but_two():
    assert set(NETWORKS) - set(PUBLISHED) == {'cifar_resnet34', 'wrn_28_10'}
    with torch.device('meta'):  # 36.5 M with the 10 classes of the paper
        assert sum(p.numel() for p in create_model('wrn_28_10', 10).parameters()) == 36_479_194


def test_no_name_is_taken():
    assert not set(NETWORKS) & {*imagenet.NETWORKS, *torchvision.models.list_models()}


@pytest.mark.parametrize('name', ['resnet20', 'cifar_resnet18', 'cifar_vgg8'])
def test_torchvision_has_no_weights(name):
    with pytest.raises(ValueError, match=rf'{name}.*checkpoint file'):
        create_model(name, pretrained=True)


# layers as RepDistiller's and mdistiller's files call them, in the networks' order, after the block they are in

BASIC, THREE = 'conv1 bn1 conv2 bn2', 'conv1 bn1 conv2 bn2 conv3 bn3'
SHUFFLED = [(i, j) for i, depth in ((1, 4), (2, 8), (3, 4)) for j in range(depth)]
INVERTED = [(i, j) for i, depth in enumerate((1, 2, 3, 4, 3, 3, 1)) for j in range(depth)]
LAYERS = {
    'resnet8': ['conv1 bn1', f'layer1.0: {BASIC}', f'layer2.0: {BASIC} downsample.0 downsample.1',
                f'layer3.0: {BASIC} downsample.0 downsample.1', 'fc'],
    'cifar_resnet18': ['conv1 bn1', *(f'layer{i}.{j}: {BASIC}' + ' shortcut.0 shortcut.1' * (i > 1 and j == 0)
                                      for i in (1, 2, 3, 4) for j in (0, 1)), 'linear'],
    'wrn_16_2': ['conv1', *(f'block{i}.layer.{j}: bn1 conv1 bn2 conv2' + ' convShortcut' * (j == 0)
                            for i in (1, 2, 3) for j in (0, 1)), 'bn1 fc'],
    'cifar_vgg8': [*(f'block{i}: 0 1' for i in range(5)), 'classifier'],
    'cifar_vgg13': [*(f'block{i}: 0 1 3 4' for i in range(5)), 'classifier'],
    'cifar_mobilenet_v2': ['conv1.0 conv1.1', *(f'blocks.{i}.{j}.conv: 0 1 3 4 6 7' for i, j in INVERTED),
                           'conv2.0 conv2.1 classifier.0'],
    'shufflenet_v1': ['conv1 bn1', *(f'layer{i}.{j}: {THREE}' for i, j in SHUFFLED), 'linear'],
    'cifar_shufflenet_v2': ['conv1 bn1', *(f'layer{i}.{j}: {THREE}' + ' conv4 bn4 conv5 bn5' * (j == 0)
                                           for i, j in SHUFFLED), 'conv2 bn2 linear'],
}


@pytest.mark.parametrize('name', LAYERS)
def test_published_files_load(name, tmp_path):
    own = with_statistics(build(name)).state_dict()
    blocks = [line.rpartition(': ') for line in LAYERS[name]]
    theirs = [f'{block}.{layer}'.lstrip('.') for block, _, layers in blocks for layer in layers.split()]
    called = dict(zip(dict.fromkeys(key.rpartition('.')[0] for key in own), theirs, strict=True))
    published = {}
    for key, value in own.items():
        layer, _, parameter = key.rpartition('.')
        published[f'{called[layer]}.{parameter}'] = value
    for content in {'epoch': 240, 'model': published, 'accuracy': torch.tensor(75.61)}, own:
        torch.save(content, tmp_path / 'ckpt_epoch_240.pth')
        loaded = create_model(name, 10)
        checkpoint.load_weights(loaded, tmp_path / 'ckpt_epoch_240.pth')
        assert_same(loaded.state_dict(), own)


def test_wide_resnets_are_of_any_depth_and_width():
    network = create_model('wrn_22_3', 10)
    assert len(network.blocks) == 9 and network.fc.in_features == 192  # three blocks in each stage, 3 x 64 channels
    for name in ('wrn_23_3', 'wrn_4_1', 'wrn_16_0'):
        with pytest.raises(ValueError, match=f'unknown model .{name}.'):
            create_model(name, 10)


@pytest.mark.parametrize('name', models.NETWORKS)
def test_no_published_name_is_that_of_another_parameter(name):
    """But in MGD's ShuffleNetV2, of which enough others tell that a file is not by the network's own names."""
    with torch.device('meta'):
        network = create_model(name, 10)
    published_name = getattr(network, 'published_name', str)
    theirs = {key: published_name(key) for key in network.state_dict() if 'num_batches' not in key}
    assert len(set(theirs.values())) == len(theirs)
    if name.startswith('shufflenet_v2'):
        assert len(theirs.keys() - {*theirs.values()}) > 10
    else:
        assert all(key == other for key, other in theirs.items() if other in theirs)


# structure: formulas written out

def bn(x, norm):
    mean, var, weight, bias = (t.view(-1, 1, 1) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return (x - mean) / (var + norm.eps).sqrt() * weight + bias


def conv(x, layer, stride=1, groups=1):
    return F.conv2d(x, layer.weight, layer.bias, stride, padding=layer.weight.shape[-1] // 2, groups=groups)


def basic_resnet(model, x):
    x = bn(conv(x, model.conv1), model.bn1).relu()
    for i, stage in enumerate([model.layer1, model.layer2, model.layer3]):
        for j, block in enumerate(stage):
            stride = 2 if i > 0 and j == 0 else 1
            out = bn(conv(x, block.conv1, stride), block.bn1).relu()
            out = bn(conv(out, block.conv2), block.bn2)
            if block.conv1.weight.shape[1] != block.conv1.weight.shape[0]:
                x = bn(conv(x, block.downsample[0], stride), block.downsample[1])
            x = (out + x).relu()
    return model.fc(x.mean((2, 3)))


def wide_resnet(model, x):
    x = conv(x, model.conv1)
    for i, block in enumerate(model.blocks):
        stride = 2 if i in (len(model.blocks) // 3, len(model.blocks) * 2 // 3) else 1
        active = bn(x, block.bn1).relu()
        out = conv(bn(conv(active, block.conv1, stride), block.bn2).relu(), block.conv2)
        widened = block.conv1.weight.shape[1] != block.conv1.weight.shape[0]
        x = out + (conv(active, block.shortcut, stride) if widened else x)
    return model.fc(bn(x, model.bn).relu().mean((2, 3)))


def vgg13(model, x):
    for i, (conv1, bn1, _, conv2, bn2) in enumerate(model.blocks):
        x = bn(conv(bn(conv(x, conv1), bn1).relu(), conv2), bn2).relu()
        if i < 3:
            n, c, h, w = x.shape
            x = x.view(n, c, h // 2, 2, w // 2, 2).amax((3, 5))
    return model.classifier(x.mean((2, 3)))


def mobilenet_v2(model, x):
    x = bn(conv(x, model.stem[0], 2), model.stem[1]).relu()
    strides = iter([1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1])
    for block in [block for stage in model.stages for block in stage]:
        stride = next(strides)
        out = bn(conv(x, block.expand[0]), block.expand[1]).relu()
        out = bn(conv(out, block.depthwise[0], stride, groups=out.shape[1]), block.depthwise[1]).relu()
        out = bn(conv(out, block.project[0]), block.project[1])
        x = x + out if x.shape == out.shape else out
    return model.classifier(bn(conv(x, model.last[0]), model.last[1]).relu().mean((2, 3)))


def shufflenet_v1(model, x):
    x = bn(conv(x, model.conv1), model.bn1).relu()
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage):
            groups, stride = 1 if i == j == 0 else 3, 2 if j == 0 else 1
            out = bn(conv(x, block.conv1, groups=groups), block.bn1).relu()
            width = out.shape[1] // groups
            out = out[:, [k * width + position for position in range(width) for k in range(groups)]]
            out = bn(conv(out, block.conv2, stride, groups=out.shape[1]), block.bn2).relu()
            out = bn(conv(out, block.conv3, groups=3), block.bn3)
            if stride == 2:
                ninths = x.new_full((x.shape[1], 1, 3, 3), 1 / 9)
                x = torch.cat([out, F.conv2d(x, ninths, None, 2, padding=1, groups=len(ninths))], 1).relu()
            else:
                x = (out + x).relu()
    return model.fc(x.mean((2, 3)))


@pytest.mark.parametrize('name, formula', [
    ('resnet14', basic_resnet), ('resnet8x4', basic_resnet), ('wrn_16_1', wide_resnet), ('wrn_16_2', wide_resnet),
    ('cifar_vgg13', vgg13), ('cifar_mobilenet_v2', mobilenet_v2), ('shufflenet_v1', shufflenet_v1),
])
@torch.no_grad()
def test_logits_are_those_of_the_formula(name, formula):
    model = with_statistics(build(name)).double()
    x = pictures(32).double()
    torch.testing.assert_close(model(x), formula(model, x))


@pytest.mark.parametrize('name, source', [
    ('cifar_resnet18', 'resnet18'), ('cifar_shufflenet_v2', 'shufflenet_v2_x1_0'),
])
@torch.no_grad()
def test_stages_are_those_of_torchvision_behind_another_stem(name, source):
    theirs = torchvision.models.get_model(source, num_classes=10)
    theirs.maxpool = nn.Identity()
    if source.startswith('resnet'):
        theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    else:
        theirs.conv1[0] = nn.Conv2d(3, 24, 1, bias=False)
    theirs = with_statistics(theirs)
    ours = build(name).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected = theirs(pictures(32))
    torch.testing.assert_close(ours(pictures(32)), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize('name, std, zero_bias', [
    ('resnet8x4', 1 / math.sqrt(3 * 256), False), ('wrn_16_4', 1 / math.sqrt(3 * 256), True),
    ('cifar_vgg8', 0.01, True), ('cifar_mobilenet_v2', 0.01, True),
])
def test_initialisation(name, std, zero_bias):
    model = build(name, 100)
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 5000:
            k = m.kernel_size[0]
            assert m.weight.std().item() == pytest.approx(math.sqrt(2 / (k * k * m.out_channels)), rel=0.05)
            assert m.bias is None or not m.bias.any()
    assert model.classifier.weight.std().item() == pytest.approx(std, rel=0.05)
    assert bool(model.classifier.bias.any()) != zero_bias
