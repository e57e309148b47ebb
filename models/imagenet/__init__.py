"""Networks for ImageNet-sized images."""
from functools import partial

from .mobilenet_v1 import MobileNetV1
from .mobilenet_v2 import mobilenet_v2, mobilenet_v2_mgd
from .resnet import DEPTHS, ResNet
from .shufflenet_v2 import ShuffleNetV2

NETWORKS = {
    **{f'resnet{layers}': partial(ResNet, *blocks) for layers, blocks in DEPTHS.items()},
    'mobilenet_v1': MobileNetV1,
    'mobilenet_v2': mobilenet_v2,
    'mobilenet_v2_mgd': mobilenet_v2_mgd,
    'shufflenet_v2_x0_5': partial(ShuffleNetV2, (48, 96, 192), 1024),
    'shufflenet_v2_x1_0': partial(ShuffleNetV2, (116, 232, 464), 1024),
    'shufflenet_v2_x1_5': partial(ShuffleNetV2, (176, 352, 704), 1024),
    'shufflenet_v2_x2_0': partial(ShuffleNetV2, (244, 488, 976), 2048),
}
NETWORKS['shufflenet_v2'] = NETWORKS['shufflenet_v2_x1_0']
