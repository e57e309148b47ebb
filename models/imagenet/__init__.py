"""Networks for ImageNet-sized images."""
from .mobilenet_v1 import mobilenet_v1
from .mobilenet_v2 import mobilenet_v2, mobilenet_v2_mgd
from .resnet import resnet18, resnet34, resnet50, resnet101, resnet152
from .shufflenet_v2 import shufflenet_v2_x0_5, shufflenet_v2_x1_0, shufflenet_v2_x1_5, shufflenet_v2_x2_0

NETWORKS = {
    'resnet18': resnet18,
    'resnet34': resnet34,
    'resnet50': resnet50,
    'resnet101': resnet101,
    'resnet152': resnet152,
    'mobilenet_v1': mobilenet_v1,
    'mobilenet_v2': mobilenet_v2,
    'mobilenet_v2_mgd': mobilenet_v2_mgd,
    'shufflenet_v2': shufflenet_v2_x1_0,
    'shufflenet_v2_x0_5': shufflenet_v2_x0_5,
    'shufflenet_v2_x1_0': shufflenet_v2_x1_0,
    'shufflenet_v2_x1_5': shufflenet_v2_x1_5,
    'shufflenet_v2_x2_0': shufflenet_v2_x2_0,
}
