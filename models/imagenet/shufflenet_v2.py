"""ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design. Ma et al., ECCV 2018.

Parameter names are torchvision's. Within a stage a ReLU sits where channels are used, not where they were made, so that
what a block hands on untouched is not rectified either; the network applies the last one to all channels of a stage.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Features

# what files for CIFAR call the layers outside the blocks, and the kinds of layers within
PUBLISHED = {'conv1.0': 'conv1', 'conv1.1': 'bn1', 'conv5.0': 'conv2', 'conv5.1': 'bn2', 'fc': 'linear'}
BRANCHES = {'branch1': ['conv', 'bn', 'conv', 'bn'], 'branch2': ['conv', 'bn', 'relu', 'conv', 'bn', 'conv', 'bn']}


def pointwise(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)]


def depthwise(channels: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class Block(nn.Module):
    """branch2 sees one half of the channels. Where the map shrinks there is a branch1, and both see all of them."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        shrinks = stride > 1
        half = c_out // 2
        self.branch1 = nn.Sequential(*depthwise(c_in, stride), *pointwise(c_in, half)) if shrinks else None
        self.branch2 = nn.Sequential(
            *pointwise(c_in if shrinks else half, half), nn.ReLU(inplace=True),
            *depthwise(half, stride), *pointwise(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.branch1 is None:
            left, right = x.chunk(2, dim=1)
            right = F.relu(right)
        else:
            left, right = self.branch1(x), x
        return F.channel_shuffle(torch.cat([left, self.branch2(right)], dim=1), groups=2)


class ShuffleNetV2(nn.Module):
    """`channels` are those of the stages. The stem for `small_images` keeps their size."""

    def __init__(self, channels: tuple[int, int, int], c_head: int, num_classes: int, small_images: bool = False):
        super().__init__()

        def stage(c_in: int, c_out: int, depth: int) -> nn.Sequential:
            return nn.Sequential(Block(c_in, c_out, stride=2), *(Block(c_out, c_out, 1) for _ in range(depth - 1)))

        self.small_images = small_images
        kernel, stride = (1, 1) if small_images else (3, 2)
        stem = nn.Conv2d(3, 24, kernel, stride, padding=kernel // 2, bias=False)
        self.conv1 = nn.Sequential(stem, nn.BatchNorm2d(24))
        self.pool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        self.stage2 = stage(24, channels[0], depth=4)
        self.stage3 = stage(channels[0], channels[1], depth=8)
        self.stage4 = stage(channels[1], channels[2], depth=4)
        self.conv5 = nn.Sequential(*pointwise(channels[2], c_head))
        self.fc = nn.Linear(c_head, num_classes)

    @property
    def stages(self) -> list[nn.Sequential]:
        return [self.stage2, self.stage3, self.stage4]

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    def published_name(self, name: str) -> str:
        """In files for CIFAR, which number the layers of a block by kind, those of branch1 first; and in MGD's."""
        layer, _, parameter = name.rpartition('.')
        if not self.small_images:  # all but the first block and the stem begin with a ReLU, which has a number there
            path, _, i = layer.rpartition('.')
            begins = path.startswith(('stage', 'conv5')) and not path.startswith('stage2.0.')
            return f'{path}.{int(i) + 1}.{parameter}' if begins else name
        if layer in PUBLISHED:
            return f'{PUBLISHED[layer]}.{parameter}'
        stage, block, branch, i = layer.split('.')
        kinds = BRANCHES[branch][:int(i) + 1]
        before = 2 if (block, branch) == ('0', 'branch2') else 0
        return f'layer{int(stage[-1]) - 1}.{block}.{kinds[-1]}{before + kinds.count(kinds[-1])}.{parameter}'

    @property
    def feature_norms(self) -> list[nn.Module | None]:
        """None: the halves of a map were normalised in different blocks, no single norm covers it."""
        return [None for _ in self.stages]

    @property
    def feature_channels(self) -> list[int]:
        return [2 * stage[-1].branch2[-1].num_features for stage in self.stages]

    def forward(self, x: Tensor, features: bool = False) -> Tensor | Features:
        x = self.pool(F.relu(self.conv1(x), inplace=True))

        preacts, maps = [], []
        for stage in self.stages:
            preact = stage(x)
            x = F.relu(preact)
            if features:
                preacts.append(preact)
                maps.append(x)

        head = F.relu(self.conv5(x))
        pooled = F.adaptive_avg_pool2d(head, 1).flatten(1)
        logits = self.fc(pooled)
        return Features(logits, pooled, head, preacts, maps) if features else logits
