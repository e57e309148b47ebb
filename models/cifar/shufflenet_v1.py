"""ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices. Zhang et al., CVPR 2018.

As in the tables of distillation on CIFAR-100: three groups, a 1x1 stem without max-pooling, and a ReLU after the
depthwise convolution, which the paper does without. A block returns its map before the ReLU and the network applies it.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Features

GROUPS = 3


class Block(nn.Module):
    """Where the map shrinks, the pooled input is appended, not added. `groups` are those of the first convolution."""

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int = GROUPS):
        super().__init__()
        self.shrinks = stride > 1
        c_new = c_out - c_in if self.shrinks else c_out
        width = c_new // 4
        self.conv1 = nn.Conv2d(c_in, width, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_new, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(c_new)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.channel_shuffle(out, self.conv1.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1) if self.shrinks else out + x


class ShuffleNetV1(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()

        def stage(c_in: int, c_out: int, depth: int, groups: int = GROUPS) -> nn.Sequential:
            return nn.Sequential(Block(c_in, c_out, 2, groups), *(Block(c_out, c_out, 1) for _ in range(depth - 1)))

        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.stages = nn.ModuleList([
            stage(24, 240, depth=4, groups=1),  # too few channels to be split
            stage(240, 480, depth=8),
            stage(480, 960, depth=4),
        ])
        self.fc = nn.Linear(960, num_classes)

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    def published_name(self, name: str) -> str:
        for i in range(len(self.stages)):
            name = name.replace(f'stages.{i}.', f'layer{i + 1}.')
        return name.replace('fc', 'linear')

    @property
    def feature_norms(self) -> list[nn.Module | None]:
        return [stage[-1].bn3 for stage in self.stages]

    @property
    def feature_channels(self) -> list[int]:
        return [norm.num_features for norm in self.feature_norms]

    def forward(self, x: Tensor, features: bool = False) -> Tensor | Features:
        x = F.relu(self.bn1(self.conv1(x)))

        preacts, maps = [], []
        for stage in self.stages:
            for block in stage:
                preact = block(x)
                x = F.relu(preact)
            if features:
                preacts.append(preact)
                maps.append(x)

        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits = self.fc(pooled)
        return Features(logits, pooled, x, preacts, maps) if features else logits
