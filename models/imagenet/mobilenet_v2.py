"""MobileNetV2: Inverted Residuals and Linear Bottlenecks. Sandler et al., CVPR 2018.

The names in its state dict are torchvision's. Blocks end in a linear bottleneck, so the last ReLU6 of a stage is the
one after the depthwise convolution of its last block: that is where a stage is tapped.
"""
import re

import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Features
from .stages import stage_ends

# expansion, output channels, number of blocks and stride of the first of them
GROUPS = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


def conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int):
        super().__init__()
        width = c_in * expansion
        expand = [conv_bn(c_in, width, 1)] if expansion > 1 else []
        depthwise = conv_bn(width, width, 3, stride, groups=width)
        self.conv = nn.Sequential(*expand, depthwise, nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.stride = stride
        self.residual = stride == 1 and c_in == c_out

    @property
    def depthwise_norm(self) -> nn.Module:
        return self.conv[-3][1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The depthwise map before and after its ReLU6, and the output of the block."""
        *expand, depthwise, project, norm = self.conv
        wide = x
        for layer in expand:
            wide = F.relu6(layer(wide), inplace=True)
        preact = depthwise(wide)
        wide = F.relu6(preact)
        out = norm(project(wide))
        return preact, wide, x + out if self.residual else out


class Classifier(nn.Linear):
    """A linear layer that is saved and loaded as `1.weight` and `1.bias`.

    torchvision's `classifier` is a Sequential of dropout and linear layer. Here it is the linear layer, as in every
    network, and only the state dict tells of the Sequential.
    """

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, f'{prefix}1.', keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, f'{prefix}1.', *args)


class MobileNetV2(nn.Module):
    """`taps` are the blocks in `features` that show their depthwise map, by default the last one at each resolution."""

    def __init__(self, num_classes: int, groups: list[tuple] = GROUPS, taps: list[int] | None = None, dropout=0.2):
        super().__init__()
        blocks = []
        channels = 32
        for expansion, c_out, depth, first_stride in groups:
            for stride in [first_stride] + [1] * (depth - 1):
                blocks.append(InvertedResidual(channels, c_out, stride, expansion))
                channels = c_out
        self.features = nn.Sequential(conv_bn(3, 32, 3, stride=2), *blocks, conv_bn(channels, 1280, 1))
        self.dropout = nn.Dropout(dropout)
        self.classifier = Classifier(1280, num_classes)
        self.taps = taps or stage_ends([2, *(block.stride for block in blocks)])

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def published_name(self, name: str) -> str:
        """In MGD's files, whose first and last layers are blocks, too."""
        name = re.sub(r'^features\.(0|18)\.', r'features.\1.conv.', name)
        return name.replace('classifier.1.', 'classifier.0.')

    @property
    def feature_norms(self) -> list[nn.Module | None]:
        return [self.features[i].depthwise_norm for i in self.taps]

    @property
    def feature_channels(self) -> list[int]:
        return [norm.num_features for norm in self.feature_norms]

    def forward(self, x: Tensor, features: bool = False) -> Tensor | Features:
        stem, *blocks, last = self.features
        x = F.relu6(stem(x))

        preacts, maps = [], []
        for i, block in enumerate(blocks, start=1):
            preact, wide, x = block(x)
            if features and i in self.taps:
                preacts.append(preact)
                maps.append(wide)

        head = F.relu6(last(x))
        pooled = F.adaptive_avg_pool2d(head, 1).flatten(1)
        logits = self.classifier(self.dropout(pooled))
        return Features(logits, pooled, head, preacts, maps) if features else logits


def mobilenet_v2(num_classes: int) -> MobileNetV2:
    return MobileNetV2(num_classes)


def mobilenet_v2_mgd(num_classes: int) -> MobileNetV2:
    """The variant of Yue et al., ECCV 2020 (MGD); same parameters and weights, 38 % more multiply-adds.

    The strides of the 64- and 96-channel groups are swapped and the first blocks of the groups from 32 to 96 channels
    are tapped, so that the second map has 28x28 pixels at 224, like the 192-channel map of the standard network. There
    is no dropout.
    """
    strides = {64: 1, 96: 2}
    groups = [(expansion, c, depth, strides.get(c, stride)) for expansion, c, depth, stride in GROUPS]
    return MobileNetV2(num_classes, groups, taps=[4, 7, 11, 17], dropout=0.0)
