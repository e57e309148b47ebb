"""What the distillers need of a detector, and all that is known here of the insides of one.

For detectors of another library, this is the file to write anew: `watching` sees the maps, and the classified boxes, of
a forward pass that is made anyway; `box_logits` lets a teacher classify boxes of the student's; a `View` is a detector
in the shape that the distillers are built on. The methods, and the rest of d2, know no module of a detector by name.
"""
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial

import torch
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, DeformBottleneckBlock
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from torch import Tensor, nn

from distillers.base import evaluating, probe
from models import Features

RESIDUAL = (BasicBlock, BottleneckBlock, DeformBottleneckBlock)  # end in an addition and a ReLU, both in place


class Floats(Sequence):
    """Maps in float32; those that nobody reads are not converted."""

    def __init__(self, maps: list[Tensor | None]):
        self.maps = maps

    def __len__(self):
        return len(self.maps)

    def __getitem__(self, i: int) -> Tensor | None:
        return self.maps[i] if self.maps[i] is None else self.maps[i].float()


class Seen:
    """What was seen of a forward pass."""

    def __init__(self):
        self.maps: dict[str, Tensor] = {}
        self.preact: dict[str, Tensor | None] = {}  # None: this map has an activation, and what was before is not known
        self.boxes = self.logits = self.target = None  # that a box head classified: for each image, then for each box

    def features(self, names) -> Features:
        """The named maps, as a distiller takes them; of the image as a whole, nothing."""
        maps, preact = (Floats([found.get(name) for name in names]) for found in (self.maps, self.preact))
        return Features(maps[0].new_empty(len(maps[0]), 0), None, None, preact, maps)

    def classification(self) -> Features:
        return Features(self.logits.float(), None, None, [], [])


@contextmanager
def watching(detector: nn.Module, names, boxes: bool = False, preact: bool = True):
    """For a while, see the named maps, and the boxes that are classified, whenever `detector` computes them.

    names: maps, stages of the bottom-up network (res2 ...) or levels of the pyramid (p2 ..., which end linearly)
    preact: whether to see residual stages before their last activation, too, which takes memory
    """
    seen, bottom_up = Seen(), bottom_up_of(detector)
    linear = getattr(bottom_up, 'linear', False)

    def see(name, _module, _inputs, out):
        seen.maps[name] = out

    def see_all(_module, _inputs, out):
        for name in out.keys() & set(names):
            seen.maps[name] = out[name]
            seen.preact.setdefault(name, out[name] if linear or name.startswith('p') else None)

    handles = [network.register_forward_hook(see_all) for network in {bottom_up, detector.backbone}]
    for name in names:
        if block := last_block(bottom_up, name):
            handles.append(bottom_up.get_submodule(name).register_forward_hook(partial(see, name)))
            handles += before_relu(block, partial(seen.preact.__setitem__, name)) if preact else []
    if boxes:
        def see_boxes(_module, inputs):
            seen.boxes = inputs[1]

        def see_logits(_module, _inputs, out):
            seen.logits = out[0]

        def see_target(_module, _inputs, out):
            seen.target = torch.cat([image.gt_classes for image in out[0]])

        heads = detector.roi_heads
        handles += [heads.box_pooler.register_forward_pre_hook(see_boxes),
                    heads.box_predictor.register_forward_hook(see_logits), heads.register_forward_hook(see_target)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def before_relu(block: nn.Module, keep) -> list:
    """Hand keep() the sum that a residual block ends in, as it was before the ReLU.

    The block adds, and rectifies, in place: what its last convolution returns is overwritten at once. So the sum is
    taken anew, out of place, as soon as both summands are there.
    """
    summand = {}

    def enter(_module, inputs):
        summand['x'] = inputs[0]

    def leave(_module, _inputs, out):
        if block.shortcut is None:
            keep(out + summand.pop('x'))
        else:
            summand['out'] = out

    def project(_module, _inputs, shortcut):
        del summand['x']
        keep(summand.pop('out') + shortcut)

    handles = [block.register_forward_pre_hook(enter), last_conv(block).register_forward_hook(leave)]
    return handles if block.shortcut is None else [*handles, block.shortcut.register_forward_hook(project)]


def show(detector: nn.Module, images: Tensor, names, boxes: bool = False) -> dict[str, Tensor]:
    """Compute the named maps, without the pyramid above them where nobody reads that. Returns what was computed."""
    bottom_up = bottom_up_of(detector)
    pyramid = detector.backbone.output_shape()  # which may call a level as the network below does
    below = all(name not in pyramid and (name in bottom_up.output_shape() or last_block(bottom_up, name))
                for name in names)
    return (bottom_up if below and not boxes else detector.backbone)(images)


def bottom_up_of(detector: nn.Module) -> nn.Module:
    return getattr(detector.backbone, 'bottom_up', detector.backbone)


def last_block(bottom_up: nn.Module, name: str) -> nn.Module | None:
    """Of a residual stage; None where `name` is no such stage."""
    stage = getattr(bottom_up, name, None)
    return stage[-1] if isinstance(stage, nn.Sequential) and isinstance(stage[-1], RESIDUAL) else None


def last_conv(block: nn.Module) -> nn.Module:
    return block.conv2 if isinstance(block, BasicBlock) else block.conv3


def box_logits(detector: nn.Module, maps: dict[str, Tensor], boxes: list) -> Tensor:
    """[number of boxes, classes + 1], the background last."""
    heads = detector.roi_heads
    pooled = heads.box_pooler([maps[name] for name in heads.box_in_features], boxes)
    return heads.box_predictor(heads.box_head(pooled))[0]


class View(nn.Module):
    """The backbone of a detector as a network of the distillers, which shows the named maps."""

    image_size = 256  # for the probe: the deepest level in use, P7, has more than a pixel then
    classifier = None

    def __init__(self, detector: nn.Module, names: tuple[str, ...], measure_margins: bool = False):
        super().__init__()
        self.detector, self.names, self.measure_margins = detector, names, measure_margins

    def forward(self, images: Tensor, features: bool = True) -> Features:
        with watching(self.detector, self.names) as seen:
            show(self.detector, images, self.names)
        if missing := [name for name in self.names if name not in seen.maps]:
            raise ValueError(f'{type(self.detector).__name__} has no map {", ".join(missing)}; its pyramid has '
                             f'{", ".join(self.detector.backbone.output_shape())}')
        return seen.features(self.names)

    @property
    def feature_channels(self) -> list[int]:
        return [x.shape[1] for x in probe(self).maps]

    @property
    def feature_norms(self) -> list[nn.Module | None]:
        """A method that finds None measures the margins."""
        blocks = [last_block(bottom_up_of(self.detector), name) for name in self.names]
        return [None if self.measure_margins or block is None else last_conv(block).norm for block in blocks]


def check_maps(student: View, teacher: View, reads_preact: bool):
    """Refuse a pair of views that no method can use, before it is trained."""
    t = probe(teacher)
    with evaluating(student), torch.enable_grad():
        s = student(torch.zeros(1, 3, View.image_size, View.image_size, device=student.detector.device))
    for name, map_s, map_t, preact_s, preact_t in zip(student.names, s.maps, t.maps, s.preact, t.preact):
        for who, detector, preact in (('student', student.detector, preact_s), ('teacher', teacher.detector, preact_t)):
            if reads_preact and preact is None:
                raise ValueError(f'what {name} of the {who} is before its activation is not known: its backbone is '
                                 f'{type(bottom_up_of(detector)).__name__}, known are ResNets of '
                                 f'{", ".join(block.__name__ for block in RESIDUAL)}')
        if map_s.shape[2:] != map_t.shape[2:]:
            sizes = ' and '.join(f'{View.image_size / x.shape[3]:g}' for x in (map_s, map_t))
            raise ValueError(f'the strides of student and teacher differ at {name}: {sizes}')
        if not map_s.requires_grad:
            raise ValueError(f'no parameter of the student trains before {name}: lower MODEL.BACKBONE.FREEZE_AT, or '
                             f'leave {name} out of FEATURES')


def check_boxes(student: nn.Module, teacher: nn.Module):
    for who, detector in (('student', student), ('teacher', teacher)):
        heads = getattr(detector, 'roi_heads', None)
        if not isinstance(heads, StandardROIHeads) or isinstance(heads, CascadeROIHeads):
            found = 'none' if heads is None else type(heads).__name__
            raise ValueError(f'to compare logits takes a box head; the {who}, {type(detector).__name__}, has {found}')
        if heads.box_predictor.use_sigmoid_ce:
            raise ValueError(f'to compare logits takes a softmax over them; the {who} has sigmoids')
    classes = [detector.roi_heads.num_classes for detector in (student, teacher)]
    if classes[0] != classes[1]:
        raise ValueError(f'the student has {classes[0]} classes, the teacher {classes[1]}: their logits '
                         'cannot be compared')
