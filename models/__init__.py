"""Networks by name: our own, which show their `Features`, and every classification network of torchvision.

Each of our own has `feature_channels`, `feature_norms` (the last norm before each stage's activation, or None) and
`classifier` (the final linear layer), all read from its modules.
"""
from difflib import get_close_matches

import torchvision
from torch import nn

from . import cifar, imagenet
from .features import Features

__all__ = ['NETWORKS', 'Features', 'create_model', 'model_names']

NETWORKS = imagenet.NETWORKS | cifar.NETWORKS

# networks of ours whose weights torchvision has under another name
WEIGHTS_OF = {'shufflenet_v2': 'shufflenet_v2_x1_0', 'mobilenet_v2_mgd': 'mobilenet_v2'}


def torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def model_names() -> list[str]:
    return [*NETWORKS, *(name for name in torchvision_names() if name not in NETWORKS)]


def create_model(name: str, num_classes: int = 1000, pretrained: bool = False) -> nn.Module:
    """Network `name`. With `pretrained` and another number of classes than the weights have, the head starts fresh."""
    if name not in model_names():
        close = ', '.join(get_close_matches(name, model_names())) or 'nothing'
        raise ValueError(f'unknown model {name!r}, close to it: {close}')
    if not pretrained:
        return build(name, num_classes)

    model = load(name)
    head, layer = find_head(model)
    if layer.weight.shape[0] != num_classes:
        model.set_submodule(head, build(name, num_classes).get_submodule(head))
    return model


def build(name: str, num_classes: int) -> nn.Module:
    if name in NETWORKS:
        return NETWORKS[name](num_classes)
    return drop_auxiliary_heads(torchvision.models.get_model(name, num_classes=num_classes))


def load(name: str) -> nn.Module:
    """Network `name` with torchvision's ImageNet weights: version 1, the one published tables use, if there is one."""
    source = WEIGHTS_OF.get(name, name)
    if source not in torchvision_names():
        raise ValueError(f'torchvision has no weights for {name!r}, pass a checkpoint file instead of pretrained=True')
    versions = torchvision.models.get_model_weights(source)
    weights = getattr(versions, 'IMAGENET1K_V1', versions.DEFAULT)

    if name not in NETWORKS:
        return drop_auxiliary_heads(torchvision.models.get_model(name, weights=weights))
    model = build(name, num_classes=len(weights.meta['categories']))
    model.load_state_dict(weights.get_state_dict(check_hash=True))
    return model


def find_head(model: nn.Module) -> tuple[str, nn.Module]:
    """The last linear layer or convolution (SqueezeNet classifies by one) and its name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]


def drop_auxiliary_heads(model: nn.Module) -> nn.Module:
    """GoogLeNet and Inception v3 have them, and then return more than the logits in training."""
    if getattr(model, 'aux_logits', False):
        model.aux_logits = False
        for head in {'aux1', 'aux2', 'AuxLogits'} & dict(model.named_children()).keys():
            setattr(model, head, None)
    return model
