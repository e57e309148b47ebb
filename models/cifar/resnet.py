"""Deep Residual Learning for Image Recognition. He et al., CVPR 2016.

The paper's network for CIFAR, 6n + 2 layers in three stages. Shortcuts are 1x1 convolutions where the shape changes.
"""
from ..imagenet.resnet import BasicBlock, ResNet


def resnet(depth: int, channels: tuple[int, int, int, int], num_classes: int) -> ResNet:
    n = (depth - 2) // 6
    return ResNet(BasicBlock, (n, n, n), num_classes, channels, small_images=True)
