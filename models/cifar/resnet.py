"""Deep Residual Learning for Image Recognition. He et al., CVPR 2016.

`resnet` is the paper's network for CIFAR with 6n + 2 layers in three stages, its shortcuts 1x1 convolutions where the
shape changes. The `cifar_resnet`s are ImageNet's four stages behind a 3x3 stem without max-pooling.
"""
from ..imagenet.resnet import BasicBlock, ResNet


def resnet(depth: int, channels: tuple[int, int, int, int], num_classes: int = 100) -> ResNet:
    n = (depth - 2) // 6
    return ResNet(BasicBlock, (n, n, n), num_classes, channels, small_images=True)
