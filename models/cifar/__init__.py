"""Networks for small images, as CIFAR's 32x32, by the names that tables of distillation on CIFAR-100 use.

`cifar_` stands before a name where there is a network for ImageNet of the same name, or one of the same family.
"""
import re
from functools import partial

from ..imagenet.resnet import DEPTHS as LAYERS
from ..imagenet.resnet import ResNet
from ..imagenet.shufflenet_v2 import ShuffleNetV2
from .mobilenet_v2 import MobileNetV2
from .resnet import resnet
from .shufflenet_v1 import ShuffleNetV1
from .vgg import DEPTHS, VGG
from .wrn import WideResNet

NETWORKS = {
    **{f'resnet{depth}': partial(resnet, depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f'resnet{depth}x4': partial(resnet, depth, (32, 64, 128, 256)) for depth in (8, 32)},
    **{f'cifar_resnet{layers}': partial(ResNet, *LAYERS[layers], small_images=True) for layers in (18, 34, 50)},
    **{f'wrn_{depth}_{widen}': partial(WideResNet, depth, widen) for depth in (16, 40) for widen in (1, 2, 4)},
    'wrn_28_10': partial(WideResNet, 28, 10),
    **{f'cifar_vgg{layers}': partial(VGG, depths) for layers, depths in DEPTHS.items()},
    'cifar_mobilenet_v2': partial(MobileNetV2, 0.5),
    'cifar_mobilenet_v2_x1_0': partial(MobileNetV2, 1.0),
    'shufflenet_v1': ShuffleNetV1,
    'cifar_shufflenet_v2': partial(ShuffleNetV2, (116, 232, 464), 1024, small_images=True),
    'cifar_shufflenet_v2_x1_5': partial(ShuffleNetV2, (176, 352, 704), 1024, small_images=True),
}


def add_wrn(networks: dict, name: str):
    """WRNs are of any depth 6n + 4, and of any width: those that have no entry get one when somebody names them."""
    if found := re.fullmatch(r'wrn_(\d+)_(\d+)', name):
        depth, widen = map(int, found.groups())
        if depth >= 10 and depth % 6 == 4 and widen:
            networks.setdefault(name, partial(WideResNet, depth, widen))
