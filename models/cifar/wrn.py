"""Wide Residual Networks. Zagoruyko and Komodakis, BMVC 2016.

The sum that ends a stage is normalised and activated by what comes next: the first block of the next stage, or the norm
before the classifier. There the stage is shown, so the network itself applies the first norm of every block.
Initialisation: kaiming normal, fan out, for the convolutions, zero for the bias of the linear layer.
"""
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Features


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.shrinks = stride > 1
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """`active` is relu(bn1(x)). A shortcut by convolution starts from it, too."""
        out = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """`depth` is 6n + 4, `widen` the factor of the widths."""

    def __init__(self, depth: int, widen: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        channels = 16
        for width, first_stride in (16, 1), (32, 2), (64, 2):
            for stride in [first_stride] + [1] * ((depth - 4) // 6 - 1):
                self.blocks.append(Block(channels, width * widen, stride))
                channels = width * widen
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        nn.init.zeros_(self.fc.bias)

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    def published_name(self, name: str) -> str:
        if not name.startswith('blocks.'):
            return name.replace('bn.', 'bn1.')
        _, number, rest = name.split('.', 2)
        stage, block = divmod(int(number), len(self.blocks) // 3)
        return f'block{stage + 1}.layer.{block}.{rest}'.replace('shortcut', 'convShortcut')

    @property
    def feature_norms(self) -> list[nn.Module | None]:
        return [block.bn1 for block in self.blocks if block.shrinks] + [self.bn]

    @property
    def feature_channels(self) -> list[int]:
        return [norm.num_features for norm in self.feature_norms]

    def forward(self, x: Tensor, features: bool = False) -> Tensor | Features:
        x = self.conv1(x)
        preacts, maps = [], []
        for block in self.blocks:
            preact = block.bn1(x)
            active = F.relu(preact)
            if features and block.shrinks:  # the first block of a stage shows the stage before
                preacts.append(preact)
                maps.append(active)
            x = block(x, active)

        preact = self.bn(x)
        head = F.relu(preact)
        pooled = F.adaptive_avg_pool2d(head, 1).flatten(1)
        logits = self.fc(pooled)
        return Features(logits, pooled, head, [*preacts, preact], [*maps, head]) if features else logits
