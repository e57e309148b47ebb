"""Explainability-based distillation by class activation maps. Blenderama/Exp-KD, 2022-24 (code, no paper text).

This is the loss which that code describes. None of its published revisions trains it: one never calls it, another takes
the softmax over the images of the batch, and its student gets no gradient.
"""
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Distiller, positive


class ExpKD(Distiller):
    """Every pixel shall speak for the classes that it speaks for in the teacher.

        CAM_c = relu(mean_d W[c, d] * F_d),   p = softmax_c(CAM / T)       W: classifier, F: the map pooled into it
        L     = weight * mean_b sum_xy sum_c (p_s - p_t)^2

    The student's classifier learns from it, too. The smaller CAM is enlarged bilinearly. Means over channels are small
    and p hardly differs from uniform, so the weight has to be tuned to the pair: published are 0.5 to 50000. A loss of
    a tenth of the cross entropy up to all of it, in the first epoch, is a good start.

    Defaults: its code, but for the weight, which has to be tuned.

    weight: factor of the loss, to be tuned
    temperature: T, of both softmaxes
    topk: keep only this many classes, the teacher's likeliest for each image; 0: all
    reduce: of the channels: mean as in the code, or sum as in a classical CAM
    relu: whether what speaks against a class counts as silence
    """

    teacher_reads = ('head',)  # and of the logits no more than which are the largest
    teacher_kept = 'classifier'

    def __init__(self, student, teacher, *, weight=1.0, temperature=1.0, topk=0,
                 reduce: Literal['mean', 'sum'] = 'mean', relu=True):
        super().__init__()
        positive(weight=weight, temperature=temperature)
        if topk < 0 or topk == 1:
            raise ValueError(f'topk is {topk}, but one class has no softmax: keep 2 or more, or all with 0')
        self.weight, self.temperature, self.topk, self.reduce, self.relu = weight, temperature, topk, reduce, relu

        classes = student.classifier.out_features, teacher.classifier.out_features
        if classes[0] != classes[1]:
            raise ValueError(f'the student tells {classes[0]} classes and the teacher {classes[1]}: '
                             'take networks trained for the same classes')
        object.__setattr__(self, 'classifier_s', student.classifier)  # not a submodule: it stays the student's
        self.register_buffer('weight_t', teacher.classifier.weight.detach().clone(), persistent=False)

    def know(self, targets):
        if not self.classifier_s.weight.requires_grad:
            raise ValueError("it teaches the student's classifier, which another method puts out of use: leave one out")

    def forward(self, s, t, batch):
        with torch.autocast(s.head.device.type, enabled=False):  # the differences are small
            cams = self.cam(self.classifier_s.weight, s.head), self.cam(self.weight_t, t.head)
        if 0 < self.topk < cams[1].shape[1]:
            kept = t.logits.topk(self.topk).indices[:, :, None, None]
            cams = [cam.gather(1, kept.expand(-1, -1, *cam.shape[2:])) for cam in cams]
        size = [max(sides) for sides in zip(*(cam.shape[2:] for cam in cams))]
        p_s, p_t = ((enlarged(cam, size) / self.temperature).softmax(1) for cam in cams)  # [N, K, H, W]
        return {'expkd': self.weight * (p_s - p_t).square().sum() / len(p_s)}

    def cam(self, weight: Tensor, f: Tensor) -> Tensor:
        """[K, C], [N, C, H, W] -> [N, K, H, W]"""
        if self.reduce == 'mean':
            weight = weight / weight.shape[1]
        cam = torch.einsum('kc,nchw->nkhw', weight.float(), f.float())
        return cam.relu() if self.relu else cam


def enlarged(cam: Tensor, size: list[int]) -> Tensor:
    return cam if list(cam.shape[2:]) == size else F.interpolate(cam, size, mode='bilinear', align_corners=False)
