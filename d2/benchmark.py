"""What a step under MGD costs, in plain steps: RetinaNet-R18 under RetinaNet-R50 at 256 pixels, on one thread.

    python d2/benchmark.py

As a measure, the way it used to be done, too: both detectors run whole, and the student's backbone once more.
"""
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2.build import build_method, features_of
from d2.config import CONFIGS, default_config

LIMIT = 1.6
SIZE, IMAGES, ROUNDS = 256, 2, 8


def config(name):
    cfg = default_config()
    cfg.merge_from_file(str(CONFIGS / f'{name}.yaml'))
    cfg.merge_from_list(['MODEL.DEVICE', 'cpu'])
    return cfg


def batch():
    objects = Instances((SIZE, SIZE))
    objects.gt_boxes, objects.gt_classes = Boxes(torch.tensor([[20.0, 30, 140, 200]])), torch.tensor([1])
    return [{'image': torch.rand(3, SIZE, SIZE) * 255, 'instances': objects} for _ in range(IMAGES)]


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = config('mgd_retinanet_R18_R50')
    plain, student = build_model(config('base_retinanet_R18_as_mgd')), build_model(cfg)
    teacher = build_model(config('base_retinanet_R50')).eval().requires_grad_(False)
    student.distil(teacher, {'mgd': build_method('mgd', student, teacher, cfg)}, {'mgd': features_of('mgd', cfg)})
    images = batch()

    def step(model):
        def run():
            sum(model(images).values()).backward()
            model.zero_grad()
        return run

    def double():
        with torch.no_grad():
            teacher(images)
        losses = student(images)
        again = student.backbone(student.preprocess_image(images).tensor)
        (sum(losses.values()) + sum(x.sum() for x in again.values()) * 0).backward()
        student.zero_grad()

    ways = {'plain': step(plain.train()), 'mgd': step(student.train()), 'twice': double}
    seconds = {name: [] for name in ways}
    with EventStorage():
        for kept in range(ROUNDS + 1):
            for name in random.sample(list(ways), len(ways)):
                start = time.process_time()
                ways[name]()
                if kept:  # not the first
                    seconds[name].append(time.process_time() - start)
    ratios = {name: statistics.median(a / b for a, b in zip(seconds[name], seconds['plain'])) for name in ways}
    print(f'torch {torch.__version__}, one thread, {IMAGES} images of {SIZE} pixels, medians of {ROUNDS} rounds')
    for name, ratio in ratios.items():
        print(f'{name:6} {statistics.median(seconds[name]):6.2f} s  {ratio:5.2f} x plain')
    print(f'mgd costs {ratios["mgd"]:.2f} plain steps, at most {LIMIT} are allowed')
    return ratios['mgd'] > LIMIT


if __name__ == '__main__':
    sys.exit(main())
