"""Small networks, pairs of them that stand in every relation of shapes a method may meet, and ours with statistics."""
import torch
import torch.nn.functional as F
from torch import nn

from models import Features, create_model
from utils.data import Batch

CLASSES = 5


class Tiny(nn.Module):
    """A stem, then one convolution per stage, norm and ReLU; optionally a convolution between last stage and head."""

    def __init__(self, channels, strides, norm=True, head=0):
        super().__init__()
        self.image_size = 16
        self.feature_channels = list(channels)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride, padding=1, bias=not norm)
                                   for a, b, stride in zip([4, *channels], channels, strides))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels) if norm else [None] * len(channels)
        self.feature_norms = list(self.norms)
        self.last = nn.Conv2d(channels[-1], head, 1) if head else None
        self.classifier = nn.Linear(head or channels[-1], CLASSES)

    def forward(self, x, features=False):
        x, preacts, maps = self.stem(x), [], []
        for conv, norm in zip(self.convs, self.norms):
            x = conv(x)
            preacts.append(x if norm is None else norm(x))
            maps.append(x := F.relu(preacts[-1]))
        head = F.relu(self.last(x)) if self.last else x
        pooled = head.mean((2, 3))
        logits = self.classifier(pooled)
        return Features(logits, pooled, head, preacts, maps) if features else logits


THREE = {'channels': (8, 12, 16), 'strides': (1, 2, 2)}
PAIRS = {  # name: (student, teacher)
    'same': (THREE, THREE),
    'narrower': ({'channels': (4, 6, 8), 'strides': (1, 2, 2)}, THREE),
    'wider': ({'channels': (12, 16, 24), 'strides': (1, 2, 2)}, THREE),
    'smaller maps': ({'channels': (8, 12, 16), 'strides': (2, 2, 2)}, THREE),
    'larger maps': ({'channels': (8, 12, 16), 'strides': (1, 1, 2)}, THREE),
    'more stages': ({'channels': (4, 8, 8, 10), 'strides': (1, 2, 1, 2)}, THREE),
    'fewer stages': ({'channels': (6, 10), 'strides': (2, 2)}, THREE),
    'no norm': ({'channels': (4, 6, 8), 'strides': (1, 2, 2)}, THREE | {'norm': False}),
    'one pixel': ({'channels': (8, 12), 'strides': (16, 1)},) * 2,
    'later head': (THREE | {'head': 20}, THREE),
}


def make(which: str, seed: int = 0) -> tuple[Tiny, Tiny]:
    """Student and teacher of a pair; the teacher's norms are not those of a fresh network."""
    torch.manual_seed(seed)
    student, teacher = (Tiny(**how) for how in PAIRS[which])
    for norm in teacher.norms:
        if norm is not None:
            for values, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.5, 0.5),
                                      (norm.running_mean, -0.2, 0.2), (norm.running_var, 0.1, 0.4)):
                nn.init.uniform_(values, low, high)
    return student, teacher.eval().requires_grad_(False)


def make_batch(n: int = 6, size: int = 16, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 3, size, size, generator=generator), torch.arange(n) % CLASSES, torch.arange(n),
                 torch.full((n,), -1))


def build(name: str, num_classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, num_classes)


def pictures(height: int, width: int = 0, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, height, width or height, generator=torch.Generator().manual_seed(0))


def norms_of(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def with_statistics(network: nn.Module, size: int = 64) -> nn.Module:
    """Eval mode, with the running statistics of one batch and weights of the norms that differ."""
    for norm in norms_of(network):
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.5)
    with torch.no_grad():
        network.train()(pictures(size))
    return network.eval()
