"""Networks from elsewhere, made to show their `Features`. The state dict stays that of the network inside.

A hook notes what some modules take and give. It writes to the module that it is called for, so a copy, or a replica of
DataParallel, has its own notes. Where something is changed in place after it was noted, the version counter of the
tensor tells: once when a network is taken in, which then notes a copy instead, and again in each forward pass.
"""
from collections import Counter
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .errors import Unfit, line, only_logits
from .features import Features

INPUT, OUTPUT, LEFT = range(3)  # of a call; LEFT: its output as the rest of the network left it


class Wrapper(nn.Module):
    """A network inside another, of which no state dict tells."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.training = network, network.training

    def state_dict(self, *args, **kwargs):
        return self.network.state_dict(*args, **kwargs)

    @property
    def published_name(self):
        return self.network.published_name

    def _load_from_state_dict(self, state_dict, prefix, *args):
        own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        state_dict.update((f'{prefix}network.{key[len(prefix):]}', value) for key, value in own.items())
        super()._load_from_state_dict(state_dict, prefix, *args)


class Renormalised(Wrapper):
    """A network that gets the images of another: normalised by other statistics, of another size, or both.

    given, wanted: mean and std of the channels
    size: side of the images that the network wants
    """

    def __init__(self, network: nn.Module, given, wanted, size: int):
        super().__init__(network)
        (mean, std), (mean_t, std_t) = (torch.tensor(x, dtype=torch.float64).view(2, 3, 1, 1) for x in (given, wanted))
        self.register_buffer('scale', (std / std_t).float(), persistent=False)
        self.register_buffer('shift', ((mean - mean_t) / std_t).float(), persistent=False)
        self.size = size
        self.identity = f', images of mean {wanted[0]}, std {wanted[1]} and {size} pixels'

    @property
    def classifier(self) -> nn.Module:
        return self.network.classifier

    @property
    def feature_norms(self) -> list[nn.Module | None]:
        return self.network.feature_norms

    @property
    def feature_channels(self) -> list[int]:
        return self.network.feature_channels

    def forward(self, x: Tensor, features: bool = False) -> Tensor | Features:
        x = x * self.scale + self.shift
        if list(x.shape[2:]) != [self.size, self.size]:
            x = F.interpolate(x, (self.size, self.size), mode='bilinear', antialias=True)
        return self.network(x, features=True) if features else self.network(x)  # the network may be a bare one


class Tap(NamedTuple):
    """Where a tensor is found: at the module of this path, in the call of this number."""
    path: str
    number: int
    what: int  # INPUT, OUTPUT or LEFT


class Note(NamedTuple):
    tensor: Tensor
    version: int | None = None  # how often it had been changed in place, if it must not be any more


Notes = dict[str, list[list[Note]]]  # by the path of a module: of each of its calls those of INPUT, OUTPUT and LEFT


def at(notes: Notes, tap: Tap) -> Note:
    return notes[tap.path][tap.number][tap.what]


class Foreign(Wrapper):
    """A network of another package. Its module paths are found by one forward pass of an image, or given.

    stages: paths of the modules whose outputs are the maps; by default the last output of each size below the stem's
    sizes: of the image, to try one after the other

    A stage that ends in a module for its activation shows the input of this as `preact`. A network whose classifier
    sees something else than the mean of a map shows that as a `head` of one pixel.
    """

    def __init__(self, network: nn.Module, num_classes: int, stages: list[str] | None = None, sizes=(224,)):
        super().__init__(network)
        refuse_compiled(network)
        modes = [(module, module.training) for module in network.modules()]
        network.eval()
        image, logits, root, calls = trace(network, sizes, num_classes)
        last = find_classifier(calls, logits)
        self.classifier_path = last.path
        self.tells_logits = isinstance(last.module, nn.Linear) and torch.equal(last.output, logits) and (
            nearly_equal(F.linear(last.input, last.module.weight, last.module.bias), logits))
        before = [call for call in calls if isinstance(call.module, _DropoutNd) and call.output is last.input]
        self.pooled = (before or [last])[-1].tap(INPUT)
        self.head = find_head(calls, mean(last.input))
        ends = named(network, root, calls, stages) if stages else found(root, image.shape[-1], last)
        activations = [find_activation(calls, end) for end in ends]
        self.maps = [end.tap(OUTPUT) for end in ends]
        self.preact = [act.tap(INPUT) if act else end.tap(OUTPUT) for end, act in zip(ends, activations)]
        self.feature_channels = [end.output.shape[1] for end in ends]
        self.norm_paths = [find_norm(calls, act.began if act else end.ended, end.output.shape[1])
                           for end, act in zip(ends, activations)]
        self.image_size = image.shape[-1]
        self.told = self.describe(ends)

        self.paths, self.copied = list(dict.fromkeys(tap.path for tap in self.taps())), []
        dropouts = [module for module in network.modules() if isinstance(module, _DropoutNd)]  # which the pass skips
        for module in [*dropouts, *map(network.get_submodule, self.paths)]:
            if getattr(module, 'inplace', False):
                module.inplace = False
        with torch.no_grad():
            self.copied = self.changed(self.observe(image)[1])
        for path in self.copied:
            network.get_submodule(path).copies = True
        for module, mode in modes:
            module.training = mode

    @property
    def classifier(self) -> nn.Linear:
        if not self.tells_logits:
            raise ValueError(f'its logits are not just what {self.classifier_path}, its last linear layer, makes')
        return self.network.get_submodule(self.classifier_path)

    @property
    def feature_norms(self) -> list[nn.Module | None]:
        return [path and self.network.get_submodule(path) for path in self.norm_paths]

    def taps(self) -> list[Tap]:
        return [self.pooled, *[self.head] * bool(self.head), *self.preact, *self.maps]

    def describe(self, ends) -> str:
        """For the log."""
        stages = ', '.join(f'{end.path} {list(end.output.shape[1:])}' + f' after {tap.path}' * (tap.what == INPUT)
                           for end, tap in zip(ends, self.preact))
        return (f'stages {stages or "none (no maps)"}; head {self.head.path if self.head else "what is classified"}; '
                f'classifier {self.classifier_path}')

    def forward(self, x: Tensor, features: bool = False) -> Tensor | Features:
        if not features:
            return self.network(x)
        logits, notes = self.observe(x)
        if spoiled := self.changed(notes):
            raise Unfit(f'the network changed in place what was seen at {", ".join(spoiled)}: name other stages')
        pooled = mean(at(notes, self.pooled).tensor)
        head = at(notes, self.head).tensor if self.head else pooled[:, :, None, None]
        preact, maps = ([at(notes, tap).tensor for tap in taps] for taps in (self.preact, self.maps))
        return Features(logits, pooled, head, preact, maps)

    def observe(self, x: Tensor) -> tuple[Tensor, Notes]:
        """A forward pass: the logits, and the notes of it."""
        modules = {path: self.network.get_submodule(path) for path in self.paths}
        for path, module in modules.items():
            if not hasattr(module, 'copies'):  # in the first pass, and where a norm was folded or made one of all ranks
                module.copies = path in self.copied
                module.register_forward_pre_hook(note_input)
                module.register_forward_hook(note_output)
            module.notes = []
        logits = only_logits(self.network(x))
        notes = {path: module.notes for path, module in modules.items()}
        for module in modules.values():
            module.notes = None
        return logits, notes

    def changed(self, notes: Notes) -> list[str]:
        """Paths of the tensors that were changed in place since they were noted."""
        seen = ((tap.path, at(notes, tap)) for tap in self.taps())
        return sorted({path for path, (tensor, before) in seen if before is not None and tensor._version != before})


def note_input(module: nn.Module, inputs):
    if module.notes is not None:
        module.notes.append([note_of(module, inputs[0] if inputs else None)])


def note_output(module: nn.Module, inputs, output):
    if module.notes is not None:
        module.notes[-1] += [note_of(module, output), Note(output)]


def note_of(module: nn.Module, x) -> Note:
    """Compiled, a network does what it did before, and has no versions."""
    if not isinstance(x, Tensor):
        return Note(x)
    x = x.clone() if module.copies else x
    return Note(x, None if torch.compiler.is_compiling() or x.is_inference() else x._version)


def refuse_compiled(network: nn.Module):
    for module in network.modules():
        if module._compiled_call_impl or '_orig_mod' in module._modules or isinstance(module, torch.jit.ScriptModule):
            raise ValueError('it is compiled already, which hides its insides; build it as it is and pass --compile')


def refuse_other_outputs(logits, num_classes: int):
    """Of one image."""
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        shown = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f'it makes {shown} of an image, instead of logits of {num_classes} classes')


# What one image tells of a network

@dataclass(eq=False)
class Call:
    """Of a module, in the one forward pass."""
    path: str
    module: nn.Module
    number: int  # of its calls
    began: int
    ended: int = 0
    input: Tensor | None = None
    output: Tensor | None = None
    inner: list['Call'] = field(default_factory=list)

    def tap(self, what: int) -> Tap:
        return Tap(self.path, self.number, what)


def trace(network: nn.Module, sizes, num_classes: int) -> tuple[Tensor, Tensor, Call, list[Call]]:
    """An image of the first size that the network takes, its logits, the call of the network, all calls as they end."""
    for size in sizes:
        image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            logits, root, calls = traced(network, image)
            refuse_other_outputs(logits, num_classes)  # of a larger image some make several rows, by view(-1, channels)
            return image, logits, root, calls
        except Exception as error:  # of somebody's forward()
            trouble = line(error)
    raise ValueError(f'it does not take images of {" or ".join(map(str, sizes))} pixels: {trouble}')


@torch.no_grad()
def traced(network: nn.Module, image: Tensor) -> tuple[Tensor, Call, list[Call]]:
    clock, numbers, stack, calls = count(), Counter(), [], []

    def enter(path):
        def hook(module, inputs):
            call = Call(path, module, numbers[path], next(clock), input=inputs[0] if inputs else None)
            numbers[path] += 1
            if stack:
                stack[-1].inner.append(call)
            stack.append(call)
        return hook

    def leave(module, inputs, output):
        call = stack.pop()
        call.ended, call.output = next(clock), output
        calls.append(call)

    handles = []
    for path, module in network.named_modules():
        handles += [module.register_forward_pre_hook(enter(path)), module.register_forward_hook(leave)]
    try:
        logits = network(image)
    finally:
        for handle in handles:
            handle.remove()
    return logits, calls[-1], calls


def side(x) -> int:
    """Of a square map [N, C, H, W] of more than one pixel, else 0."""
    return x.shape[3] if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == x.shape[3] > 1 else 0


def trunk(call: Call):
    """The layers, blocks and stages that a network is a sequence of: down to what no more than halves a map."""
    for inner in call.inner:
        shrinks = side(inner.input) / side(inner.output) if side(inner.output) else 0
        if inner.inner and not 1 <= round(shrinks) <= 2:
            yield from trunk(inner)
        elif side(inner.output) and (inner.output is not inner.input or is_activation(inner.module)):
            yield inner


def found(root: Call, image_side: int, classifier: Call) -> list[Call]:
    """The last call of each size of maps before the classifier, except for sizes at which nothing has parameters.

    The first size is the stem's. It is that of a stage only where blocks follow the stem at it, and where it is not
    half the image's.
    """
    groups = {}
    for call in trunk(root):
        if call.began < classifier.began:
            groups.setdefault(side(call.output), []).append(call)
    stem = next(iter(groups), 0)
    if stem and (round(image_side / stem) == 2 or not any(call.inner for call in groups[stem][1:])):
        del groups[stem]
    return [calls[-1] for calls in groups.values() if any(list(call.module.parameters()) for call in calls)]


def named(network: nn.Module, root: Call, calls: list[Call], stages: list[str]) -> list[Call]:
    """The last calls of the modules at these paths, in the order of the pass."""
    could, ends = [call.path for call in trunk(root)], []
    for path in stages:
        of_path = [call for call in calls if call.path == path]
        if not of_path or not isinstance(of_path[-1].output, Tensor) or of_path[-1].output.ndim != 4:
            known = path in dict(network.named_modules())
            alike = get_close_matches(path, [call.path for call in calls if side(call.output)], 3)
            raise ValueError(f'{path} {"shows no map" if known else "is none of its modules"}; stages could be '
                             + ', '.join(dict.fromkeys([*alike, *could])))
        ends.append(of_path[-1])
    return sorted(ends, key=lambda call: call.ended)


def is_activation(module: nn.Module) -> bool:
    return 'activation' in type(module).__module__


def find_activation(calls: list[Call], end: Call) -> Call | None:
    """The activation, a module, that makes the output of a stage."""
    return next((call for call in reversed(calls) if call.ended <= end.ended and call.output is end.output
                 and is_activation(call.module)), None)


def find_norm(calls: list[Call], until: int, channels: int) -> str | None:
    """The path of the last BatchNorm until then, on no shortcut, if it ends what makes the map, of as many channels."""
    last = max((call for call in calls if isinstance(call.module, (_BatchNorm, nn.Conv2d)) and call.began < until
                and not {'downsample', 'shortcut'} & set(call.path.split('.'))),
               key=lambda call: call.began, default=None)
    ends = last and isinstance(last.module, _BatchNorm) and last.module.num_features == channels
    return last.path if ends else None


def find_classifier(calls: list[Call], logits: Tensor) -> Call:
    """The last linear layer that makes as many numbers of an image, or convolution that makes as many maps.

    A matrix of weights makes a layer linear enough: it may go by cosines.
    """
    for call in reversed(calls):
        linear = isinstance(call.module, nn.Linear) or any(p.ndim == 2 for p in call.module.parameters(recurse=False))
        ndim = 4 if isinstance(call.module, nn.Conv2d) else 2 if linear and isinstance(call.input, Tensor) else 0
        if ndim and isinstance(call.output, Tensor) and call.input.ndim == call.output.ndim == ndim and (
                call.output.shape[:2] == logits.shape):
            return call
    raise ValueError(f'its classifier is not found: no layer with a matrix of weights, and no convolution, has '
                     f'{logits.shape[1]} outputs')


def mean(x: Tensor) -> Tensor:
    """Of a map over its pixels; what is none stays as it is."""
    return x.mean((2, 3)) if x.ndim == 4 else x


def nearly_equal(x: Tensor, y: Tensor) -> bool:
    """Up to the order of sums."""
    return torch.allclose(x, y, rtol=1e-3, atol=1e-5 * y.abs().max().item())


def find_head(calls: list[Call], pooled: Tensor) -> Tap | None:
    """The last map whose mean is what is classified, as it was at the end of the pass."""
    for call in reversed(calls):
        f = call.output
        if (isinstance(f, Tensor) and f.ndim == 4 and f.shape[1] == pooled.shape[1] and f.shape[2:].numel() > 1
                and not isinstance(call.module, _DropoutNd) and nearly_equal(f.mean((2, 3)), pooled)):
            return call.tap(LEFT)
    return None
