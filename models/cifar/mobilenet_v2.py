"""MobileNetV2: Inverted Residuals and Linear Bottlenecks. Sandler et al., CVPR 2018.

As in the tables of distillation on CIFAR-100: ReLU in place of ReLU6, no stride in the group of 24 channels, a 1x1
convolution in front of the first depthwise one, no dropout. A stage, all blocks of one resolution, ends in a linear
bottleneck: its map and its pre-activation are the same tensor.
Initialisation: kaiming normal, fan out, for the convolutions, N(0, 0.01^2) and bias 0 for the linear layer.
"""
from itertools import chain

import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Features
from ..imagenet.mobilenet_v2 import conv_bn

# of each stage, its groups: expansion, output channels, number of blocks and stride of the first of them
STAGES = [
    [(1, 16, 1, 1), (6, 24, 2, 1)],
    [(6, 32, 3, 2)],
    [(6, 64, 4, 2), (6, 96, 3, 1)],
    [(6, 160, 3, 2), (6, 320, 1, 1)],
]


class InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int):
        super().__init__()
        width = c_in * expansion
        self.expand = conv_bn(c_in, width, 1)
        self.depthwise = conv_bn(width, width, 3, stride, groups=width)
        self.project = conv_bn(width, c_out, 1)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.depthwise(F.relu(self.expand(x), inplace=True)), inplace=True)
        out = self.project(out)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    def __init__(self, width: float, num_classes: int):
        super().__init__()
        channels = int(32 * width)
        self.stem = conv_bn(3, channels, 3, stride=2)
        self.stages = nn.ModuleList()
        for groups in STAGES:
            stage = nn.Sequential()
            for expansion, c, depth, first_stride in groups:
                for stride in [first_stride] + [1] * (depth - 1):
                    stage.append(InvertedResidual(channels, int(c * width), stride, expansion))
                    channels = int(c * width)
            self.stages.append(stage)
        self.last = conv_bn(channels, 1280, 1)
        self.classifier = nn.Linear(1280, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def published_name(self, name: str) -> str:
        """There a group has a list of its own, and a block is one sequence: three times convolution, norm, ReLU."""
        if not name.startswith('stages.'):
            return name.replace('stem', 'conv1').replace('last', 'conv2').replace('classifier', 'classifier.0')
        own = [f'stages.{i}.{j}' for i, stage in enumerate(self.stages) for j in range(len(stage))]
        theirs = [f'blocks.{i}.{j}' for i, (_, _, depth, _) in enumerate(chain(*STAGES)) for j in range(depth)]
        block, part, i, parameter = name.rsplit('.', 3)
        layer = 3 * ['expand', 'depthwise', 'project'].index(part) + int(i)
        return f'{theirs[own.index(block)]}.conv.{layer}.{parameter}'

    @property
    def feature_norms(self) -> list[nn.Module | None]:
        return [stage[-1].project[1] for stage in self.stages]

    @property
    def feature_channels(self) -> list[int]:
        return [norm.num_features for norm in self.feature_norms]

    def forward(self, x: Tensor, features: bool = False) -> Tensor | Features:
        x = F.relu(self.stem(x))
        maps = []
        for stage in self.stages:
            x = stage(x)
            if features:
                maps.append(x)

        head = F.relu(self.last(x))
        pooled = F.adaptive_avg_pool2d(head, 1).flatten(1)
        logits = self.classifier(pooled)
        return Features(logits, pooled, head, maps, list(maps)) if features else logits
