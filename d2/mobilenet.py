"""MobileNetV2 of ../models as a backbone; its norms are frozen, like those of Detectron2's ResNets."""
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from models.imagenet.mobilenet_v2 import mobilenet_v2


class MobileNetV2(Backbone):
    """Shows the outputs of the last blocks at strides 4 to 32: 24, 32, 96 and 320 channels."""

    linear = True  # a block ends in a norm

    def __init__(self, freeze_at: int):
        super().__init__()
        network = mobilenet_v2(1000)
        self.features = network.features[:-1]
        self.ends = dict(zip(network.taps[-4:], ('res2', 'res3', 'res4', 'res5')))
        self._out_features = list(self.ends.values())
        self._out_feature_channels = {name: self.features[i].conv[-1].num_features for i, name in self.ends.items()}
        self._out_feature_strides = {name: 4 * 2 ** k for k, name in enumerate(self._out_features)}
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        for module in self.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.num_batches_tracked = None  # it counts nothing
        if freeze_at:  # 1: the stem, 2: up to res2, ...
            last = 0 if freeze_at == 1 else [*self.ends][freeze_at - 2]
            self.features[:last + 1].requires_grad_(False)

    def forward(self, x):
        stem, *blocks = self.features
        x, outputs = F.relu6(stem(x)), {}
        for i, block in enumerate(blocks, start=1):
            *_, x = block(x)
            if i in self.ends:
                outputs[self.ends[i]] = x
        return outputs


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_fpn_backbone(cfg, input_shape):
    fpn = cfg.MODEL.FPN
    return FPN(MobileNetV2(cfg.MODEL.BACKBONE.FREEZE_AT), fpn.IN_FEATURES, fpn.OUT_CHANNELS, fpn.NORM,
               LastLevelMaxPool(), fpn.FUSE_TYPE)
