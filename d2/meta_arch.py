"""Detectors that learn from a teacher. The model is the student: its heads, its checkpoint and its inference are those
of the parent class; only in training it adds losses.
"""
from types import SimpleNamespace

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet
from torch import nn

from distillers.base import Distiller, evaluating

from .config import PREACT, Refused, in_keys
from .norms import replace_last_norms
from .views import box_logits, show, watching


class Distilled:
    """Mixin before a meta-architecture. Without `distil` it is the parent.

    last_norm: kind of the norms in the last block of each stage, see norms.py
    """

    @configurable
    def __init__(self, *, last_norm: str, **parts):
        super().__init__(**parts)
        self.hidden = ()  # the teacher: no module looks into a tuple, so it has no part in parameters, state and mode
        self.names, self.kd = {}, nn.ModuleDict()
        self.replaced = replace_last_norms(self, last_norm) if last_norm else {}
        self.private = {f'{name}.num_batches_tracked' for name in self.replaced}
        self.register_state_dict_post_hook(hide)
        self.register_load_state_dict_post_hook(pardon)

    @classmethod
    def from_config(cls, cfg):
        return {**super().from_config(cfg), 'last_norm': cfg.MODEL.DISTILL.LAST_NORM}

    def distil(self, teacher: nn.Module, methods: dict[str, Distiller], names: dict[str, tuple[str, ...]]):
        """Learn from `teacher`. names: the maps that each method compares, or none where it compares logits."""
        self.hidden, self.names = (teacher.eval().requires_grad_(False),), names
        self.kd.update(methods)
        self.kd.to(self.device)

    @property
    def teacher(self) -> nn.Module:
        return self.hidden[0]

    def is_own(self, key: str) -> bool:
        """Whether an entry of the state is none of the parent's."""
        return key.startswith('kd.') or key in self.private

    def _apply(self, fn, recurse=True):
        for teacher in self.hidden:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, batched_inputs):
        if not self.training or not self.kd:
            return super().forward(batched_inputs)
        names, boxes = set().union(*self.names.values()), not all(self.names.values())
        preact = any(name in PREACT for name in self.names)
        with watching(self, names, boxes, preact) as s:
            losses = super().forward(batched_inputs)
        with torch.no_grad(), watching(self.teacher, names, preact=preact) as t:
            maps = show(self.teacher, self.teacher_images(batched_inputs), names, boxes)
            if boxes:
                t.logits = box_logits(self.teacher, maps, s.boxes)
        with torch.autocast(self.device.type, enabled=False):  # sums over maps do not fit half precision
            for name, method in self.kd.items():
                own = self.names[name]
                pair = (x.features(own) if own else x.classification() for x in (s, t))
                found = method(*pair, SimpleNamespace(target=s.target))
                losses |= {f'loss_{key}': loss for key, loss in found.items()}  # Detectron2 prints what has that name
        return losses

    def teacher_images(self, batched_inputs) -> torch.Tensor:
        """In the order of channels that the teacher knows, and only then normalised its way."""
        if self.teacher.input_format != self.input_format:
            batched_inputs = [{'image': x['image'].flip(0)} for x in batched_inputs]
        return self.teacher.preprocess_image(batched_inputs).tensor

    def start_epoch(self, epoch: int, batches) -> dict[str, list[dict]]:
        """Let the methods prepare for an epoch; batches() iterates over what forward gets. Returns their reports."""
        for name, method in self.kd.items():
            try:
                method.start_epoch(epoch, lambda name=name, asked=method.asks_student: self.pairs(
                    self.names[name], batches(), asked))
            except ValueError as error:  # features to which it has no answer
                raise Refused(in_keys(name, error)) from error
        return {name: method.report for name, method in self.kd.items() if method.report}

    @torch.no_grad()
    def pairs(self, names, batches, ask_student: bool = True):
        with evaluating(self):
            for batch in batches:
                with watching(self, names) as s, watching(self.teacher, names) as t:
                    show(self.teacher, self.teacher_images(batch), names)
                    if ask_student:
                        show(self, self.preprocess_image(batch).tensor, names)
                yield s.features(names) if ask_student else None, t.features(names)


def hide(model: Distilled, state: dict, prefix: str, _metadata):
    """A checkpoint has what plain Detectron2 expects; the methods' own state is saved beside it."""
    for key in [key for key in state if key.startswith(prefix) and model.is_own(key[len(prefix):])]:
        del state[key]


def pardon(model: Distilled, incompatible):
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not model.is_own(key)]


@META_ARCH_REGISTRY.register()
class DistilledRetinaNet(Distilled, RetinaNet):
    pass


@META_ARCH_REGISTRY.register()
class DistilledRCNN(Distilled, GeneralizedRCNN):
    pass
