"""Very Deep Convolutional Networks for Large-Scale Image Recognition. Simonyan and Zisserman, ICLR 2015.

With batch norm and a single linear layer. Max-pooling between the five blocks stops where it would leave less than 4x4
pixels: at 32x32 the last two blocks have maps of this size. The first block counts as the stem, the others are the
stages, shown before the pooling.
Initialisation: kaiming normal, fan out, for the convolutions, N(0, 0.01^2) for the linear layer, zero biases.
"""
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Features

# convolutions of each block, by the number of layers
DEPTHS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def convolutions(c_in: int, c_out: int, depth: int) -> nn.Sequential:
    """`depth` times convolution, norm and ReLU, without the last ReLU."""
    layers = []
    for _ in range(depth):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        c_in = c_out
    return nn.Sequential(*layers[:-1])


class VGG(nn.Module):
    def __init__(self, depths: tuple[int, int, int, int, int], num_classes: int):
        super().__init__()
        channels = (3, 64, 128, 256, 512, 512)
        self.blocks = nn.ModuleList(map(convolutions, channels[:-1], channels[1:], depths))
        self.classifier = nn.Linear(channels[-1], num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def published_name(self, name: str) -> str:
        return name.replace('blocks.', 'block')

    @property
    def feature_norms(self) -> list[nn.Module | None]:
        return [block[-1] for block in self.blocks[1:]]

    @property
    def feature_channels(self) -> list[int]:
        return [norm.num_features for norm in self.feature_norms]

    def forward(self, x: Tensor, features: bool = False) -> Tensor | Features:
        stem, *blocks = self.blocks
        x = F.relu(stem(x))

        preacts, maps = [], []
        for block in blocks:
            if min(x.shape[2:]) >= 8:
                x = F.max_pool2d(x, 2)
            preact = block(x)
            x = F.relu(preact)
            if features:
                preacts.append(preact)
                maps.append(x)

        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits = self.classifier(pooled)
        return Features(logits, pooled, x, preacts, maps) if features else logits
