"""A frozen teacher for the training step alone: the same function with less to compute."""
from contextlib import suppress
from copy import deepcopy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models import Features
from utils import distributed, setup, together
from utils.randomness import generator

from .base import Distillation, probe_image


class LeanTeacher:
    """In place of the teacher while a student trains: with norms folded, or weights in the precision they are used in.

    The teacher itself is what is scored and matched.
    """

    def __init__(self, distillation: Distillation, teacher: nn.Module, device: torch.device, args):
        if not distillation.teacher_stands_still:
            raise ValueError('--fold-teacher and --teacher-amp need a teacher whose weights and norms stand still')
        network = copied(teacher, args)
        self.device, self.amp = device, args.teacher_amp or args.amp
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(setup.PRECISIONS[self.amp])
        self.network = distributed.replicated(setup.place(network, device, args), device, args)

    def __call__(self, batch) -> Features:
        with setup.precision(self.device, self.amp):
            return self.network(batch.images, features=True)


def lean_teacher(distillation: Distillation, teacher: nn.Module, device: torch.device, args) -> LeanTeacher | None:
    """If flags ask for one; runs of several --seeds share it."""
    fast = args.fast and args.fold_teacher is None and distillation.teacher_stands_still
    if args.fold_teacher or args.teacher_amp or fast:
        return together.shared(('lean', teacher), lambda: LeanTeacher(distillation, teacher, device, args))
    return None


def copied(teacher: nn.Module, args) -> nn.Module:
    """Folded if asked for; --fast only asks for what can be done."""
    if args.fold_teacher:
        return folded(teacher)
    if args.fast and args.fold_teacher is None:
        with suppress(ValueError):
            network = folded(teacher)
            distributed.say('fast: --fold-teacher')
            return network
    return deepcopy(teacher)


@torch.no_grad()
def folded(teacher: nn.Module) -> nn.Module:
    """A copy whose BatchNorms are part of the convolutions before them; ValueError where that shows other features."""
    image = torch.randn(probe_image(teacher).shape, generator=generator('fold')).to(next(teacher.parameters()))
    network = deepcopy(teacher).eval()
    for conv, norm in pairs(network, image):
        network.set_submodule(conv, fuse_conv_bn_eval(network.get_submodule(conv), network.get_submodule(norm)))
        network.set_submodule(norm, nn.Identity())
    with setup.full_float32():
        shown = [x.forward(image, features=True) for x in (teacher, network)]
    for field, wanted, got in zip(Features._fields, *shown):
        for x, y in zip(*(x if isinstance(x, list) else [x] for x in (wanted, got))):
            if not (x - y).abs().max() <= 1e-3 * x.abs().max():
                raise ValueError(f'--fold-teacher: with its norms in its convolutions the teacher shows other {field}')
    return network


def pairs(network: nn.Module, image: torch.Tensor) -> list[tuple[str, str]]:
    """Names of each convolution and BatchNorm that run once, the one on what the other has just made."""
    names = {module: name for name, module in network.named_modules()}
    made, calls, found = {}, [], []

    def after(conv, inputs, output):
        calls.append(conv)
        made[id(output), output._version] = conv, output  # kept, so that no other tensor gets its id

    def before(norm, inputs):
        calls.append(norm)
        if key := made.get((id(inputs[0]), inputs[0]._version)):
            found.append((key[0], norm))

    handles = [m.register_forward_hook(after) for m in names if isinstance(m, nn.Conv2d)]
    handles += [m.register_forward_pre_hook(before) for m in names if isinstance(m, _BatchNorm)
                and type(m).forward is _BatchNorm.forward]  # timm's may have an activation in them
    network.forward(image)
    for handle in handles:
        handle.remove()
    return [(names[conv], names[norm]) for conv, norm in found if calls.count(conv) == calls.count(norm) == 1]
