"""MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications. Howard et al., 2017.

Parameter names are those of the widely used public checkpoints (`model.0.0.weight` .. `model.13.4.bias`, `fc.weight`).
As in them, the activation is ReLU, and the initialisation the framework's. A block ends in its last norm; the network
applies the ReLU after it.
"""
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Features
from .stages import stage_ends

# (output channels, stride) of each depthwise separable block
BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


def separable(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_in, 3, stride, padding=1, groups=c_in, bias=False), nn.BatchNorm2d(c_in),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out),
    )


class MobileNetV1(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32)))
        channels = 32
        for c_out, stride in BLOCKS:
            self.model.append(separable(channels, c_out, stride))
            channels = c_out
        self.fc = nn.Linear(channels, num_classes)
        self.ends = stage_ends([block[0].stride[0] for block in self.model])

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    @property
    def feature_norms(self) -> list[nn.Module | None]:
        return [self.model[i][-1] for i in self.ends]

    @property
    def feature_channels(self) -> list[int]:
        return [norm.num_features for norm in self.feature_norms]

    def forward(self, x: Tensor, features: bool = False) -> Tensor | Features:
        preacts, maps = [], []
        for i, block in enumerate(self.model):
            preact = block(x)
            x = F.relu(preact)
            if features and i in self.ends:
                preacts.append(preact)
                maps.append(x)

        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits = self.fc(pooled)
        return Features(logits, pooled, x, preacts, maps) if features else logits
