"""Deep Residual Learning for Image Recognition. He et al., CVPR 2016.

The stride sits in the 3x3 convolution of a bottleneck ("v1.5"). Parameter names are torchvision's.
A block returns its residual sum; the network applies the ReLU after it, so that the sum can be seen.
"""
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Features


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


def shortcut(c_in: int, c_out: int, stride: int) -> nn.Module:
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = conv(c_in, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(c_in, width, stride)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.bn2(self.conv2(out)) + self.downsample(x)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int = 1):
        super().__init__()
        c_out = width * self.expansion
        self.conv1 = conv(c_in, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, c_out, 1)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample = shortcut(c_in, c_out, stride)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return self.bn3(self.conv3(out)) + self.downsample(x)


class ResNet(nn.Module):
    """`channels` are the stem's and the widths of the stages. The stem for `small_images` keeps their size."""

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], num_classes: int,
                 channels: tuple[int, ...] = (64, 64, 128, 256, 512), small_images: bool = False):
        super().__init__()
        c_in, *widths = channels
        self.conv1 = conv(3, c_in, 3) if small_images else conv(3, c_in, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.pool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        for i, (width, depth) in enumerate(zip(widths, depths), start=1):
            c_out = width * block.expansion
            rest = (block(c_out, width) for _ in range(depth - 1))
            self.add_module(f'layer{i}', nn.Sequential(block(c_in, width, stride=1 if i == 1 else 2), *rest))
            c_in = c_out
        self.fc = nn.Linear(c_in, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    @property
    def stages(self) -> list[nn.Sequential]:
        return [module for module in self.children() if isinstance(module, nn.Sequential)]

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    def published_name(self, name: str) -> str:
        """In files for CIFAR of 18, 34 and 50 layers."""
        return name.replace('downsample', 'shortcut').replace('fc', 'linear')

    @property
    def feature_norms(self) -> list[nn.Module | None]:
        return [stage[-1].last_norm for stage in self.stages]

    @property
    def feature_channels(self) -> list[int]:
        return [norm.num_features for norm in self.feature_norms]

    def forward(self, x: Tensor, features: bool = False) -> Tensor | Features:
        x = self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True))

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


DEPTHS = {  # blocks of each stage, by the number of layers
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
