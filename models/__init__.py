"""Networks by name: our own, which show their `Features`, and those of elsewhere, which `Foreign` makes show them.

    resnet18                   ours, or else torchvision's classification network of this name
    torchvision:resnet18       torchvision's
    timm:resnet18.a1_in1k      timm's
    package.module:function    what function(num_classes=N) returns; the current folder is searched, too

Each of our own has `feature_channels`, `feature_norms` (the last norm before each stage's activation, or None) and
`classifier` (the final linear layer), all read from its modules. Where the files that RepDistiller and mdistiller
published for CIFAR, or MGD's for ImageNet, call a parameter otherwise, `published_name(name)` tells how.
"""
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from types import MethodType

import torchvision
from torch import nn

from . import cifar, imagenet
from .errors import blame, line
from .features import Features
from .foreign import Foreign, Renormalised, refuse_other_outputs

__all__ = ['NETWORKS', 'Features', 'Foreign', 'Renormalised', 'create_model', 'model_names', 'refuse_other_outputs']

NETWORKS = imagenet.NETWORKS | cifar.NETWORKS

# networks of ours whose weights torchvision has under another name
WEIGHTS_OF = {'shufflenet_v2': 'shufflenet_v2_x1_0', 'mobilenet_v2_mgd': 'mobilenet_v2'}


def torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def model_names() -> list[str]:
    return [*NETWORKS, *(name for name in torchvision_names() if name not in NETWORKS)]


def create_model(name: str, num_classes: int = 1000, pretrained: bool = False) -> nn.Module:
    """Network `name`. With `pretrained` and another number of classes than the weights have, the head starts fresh.

    A function of somebody's package knows by itself what weights it starts from.
    """
    source, _, rest = name.rpartition(':')
    cifar.add_wrn(NETWORKS, name)
    if source == 'timm':
        return timm_network(rest, num_classes, pretrained)
    if source not in ('', 'torchvision'):
        return called(source, rest, num_classes)
    names = torchvision_names() if source else model_names()
    if rest not in names:
        raise ValueError(unknown('model', rest, names))
    if not pretrained:
        return build(rest, num_classes, source)

    model = load(rest, source)
    head, layer = last_layer(model)
    if layer.weight.shape[0] != num_classes:
        model.set_submodule(head, build(rest, num_classes, source).get_submodule(head))
    return model


def unknown(what: str, name: str, names) -> str:
    return f'unknown {what} {name!r}, close to it: {", ".join(get_close_matches(name, names)) or "nothing"}'


def timm_network(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f'timm is missing, pip install timm brings it ({error})') from None
    if not timm.is_model(name):
        raise ValueError(unknown('model of timm', name, timm.list_models()))
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    except RuntimeError as error:  # of weights that there are not
        raise ValueError(line(error)) from None


def called(module: str, function: str, num_classes: int) -> nn.Module:
    """What a function of this name returns."""
    make = find_function(module, function)
    try:
        inspect.signature(make).bind(num_classes=num_classes)
    except TypeError as error:
        raise ValueError(f'{function}(num_classes={num_classes}) is what is called, but: {error}') from None
    try:
        network = make(num_classes=num_classes)
    except Exception as error:
        raise ValueError(f'{function} cannot make it: {blame(error)}') from None
    if not isinstance(network, nn.Module):
        raise ValueError(f'{function} returns {type(network).__name__} instead of a torch.nn.Module')
    return plain(network)


def find_function(module: str, function: str) -> Callable:
    if os.getcwd() not in sys.path:  # which holds the folder of the script instead
        sys.path.append(os.getcwd())
    try:
        package = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise ValueError(f'cannot import {module} ({error}); a network is NAME, torchvision:NAME, timm:NAME, or '
                         'package.module:function, in the current folder or installed') from None
    except Exception as error:  # of the package itself
        raise ValueError(f'cannot import {module}: {blame(error)}') from None
    if not hasattr(package, function):
        raise ValueError(unknown(f'function of {package.__file__}', function, dir(package)))
    if not callable(getattr(package, function)):
        raise ValueError(f'{function} of {package.__file__} is no function')
    return getattr(package, function)


def build(name: str, num_classes: int, source: str = '') -> nn.Module:
    if name in NETWORKS and not source:
        return NETWORKS[name](num_classes)
    return of_torchvision(name, num_classes=num_classes)


def load(name: str, source: str = '') -> nn.Module:
    """Network `name` with torchvision's ImageNet weights: version 1, the one published tables use, if there is one."""
    published = WEIGHTS_OF.get(name, name)
    if published not in torchvision_names():
        raise ValueError(f'torchvision has no weights for {name!r}: name a checkpoint file (--student-resume, ...)')
    versions = torchvision.models.get_model_weights(published)
    weights = getattr(versions, 'IMAGENET1K_V1', versions.DEFAULT)

    if name not in NETWORKS or source:
        model = of_torchvision(name, weights=weights)
    else:
        model = build(name, num_classes=len(weights.meta['categories']))
        model.load_state_dict(weights.get_state_dict(check_hash=True))
    model.image_statistics = tuple(weights.transforms().mean), tuple(weights.transforms().std)
    return model


def of_torchvision(name: str, **how) -> nn.Module:
    model = plain(torchvision.models.get_model(name, **how))
    if hasattr(model, 'transform_input'):  # GoogLeNet and Inception v3 with published weights, and no file tells of it
        model.transform_input = True
    return model


def last_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """The last linear layer or convolution (SqueezeNet classifies by one) and its name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]


def plain(model: nn.Module) -> nn.Module:
    """One that makes logits, no more, and loads bare tensors.

    GoogLeNet and Inception v3 have auxiliary heads, and then return more in training. MNASNet wants to be told, with
    its weights, of a version that no file of tensors has.
    """
    if getattr(model, 'aux_logits', False):
        model.aux_logits = False
        for head in {'aux1', 'aux2', 'AuxLogits'} & dict(model.named_children()).keys():
            setattr(model, head, None)
    if isinstance(model, torchvision.models.MNASNet):
        model._load_from_state_dict = MethodType(nn.Module._load_from_state_dict, model)
    return model
