"""ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design. Ma et al., ECCV 2018.

ImageNet's stages behind a 1x1 stem without max-pooling.
"""
from ..imagenet.shufflenet_v2 import ShuffleNetV2


def cifar_shufflenet_v2(num_classes: int = 100) -> ShuffleNetV2:
    return ShuffleNetV2((116, 232, 464), 1024, num_classes, small_images=True)


def cifar_shufflenet_v2_x1_5(num_classes: int = 100) -> ShuffleNetV2:
    return ShuffleNetV2((176, 352, 704), 1024, num_classes, small_images=True)
