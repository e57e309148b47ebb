"""What every method adds to a training step, for one pair of networks, and which features it looks at."""
import copy

import torch

from distillers import DISTILLERS, Distillation
from models import Features, create_model
from utils.data import Batch

from .harness import Case, Row, Settings, Variant
from .mgd_step import arguments, settle, training_step

BARE = 'no method'  # both networks run all the same
SAMPLES, CLASSES = 50_000, 100  # of CIFAR-100


def methods(settings: Settings, table=DISTILLERS, student='resnet8x4', teacher='resnet32x4', size=32,
            batch=None) -> Case:
    batch = batch or settings.batch(16, 64)
    torch.manual_seed(0)
    data = Batch(*(x.to(settings.device) for x in (torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,)),
                                                   torch.arange(batch), torch.full((batch,), -1))))
    few = Batch(*(x[:4] for x in data[:4]))
    pair = [create_model(name, CLASSES).to(settings.device) for name in (student, teacher)]
    for network in pair:
        network.image_size = size
        settle(network, data.images)

    variants = {BARE: Variant(training_step(Distillation(*copy.deepcopy(pair), {}), data, arguments()))}
    facts, refused = {}, []
    for name, method in table.items():
        networks = copy.deepcopy(pair)
        try:
            distiller = method(*networks)
        except ValueError as error:
            refused.append(f'{name}: {error}')
            continue
        task = Distillation(*networks, {name: distiller}).to(settings.device)
        task.know((torch.arange(SAMPLES) % CLASSES).to(settings.device))
        task.start_epoch(20, lambda: [few, few])  # warm-ups are over
        shown, = task.pairs([few])
        facts[name] = {'features': looks_at(distiller, shown, few), 'parameters': extra_parameters(task)}
        variants[name] = Variant(training_step(task, data, arguments()))
    rows = [Row(name, BARE, None, 'cost', tolerance=float('inf')) for name in facts]
    return Case(variants, rows, skipped=tuple(refused), facts=facts)


def extra_parameters(task: Distillation) -> int:
    """Those that a step trains beside the student's."""
    return sum(p.numel() for name, p in task.named_parameters() if p.requires_grad and not name.startswith('student.'))


def looks_at(distiller, shown: tuple[Features, Features], batch: Batch) -> str:
    """Found out, not told: the features that change the losses when noise takes their place."""
    before = losses(distiller, *shown, batch)

    def matters(side, name, noise):
        noisy = list(shown)
        noisy[side] = noisy[side]._replace(**{name: noise})
        return losses(distiller, *noisy, batch) != before

    sides = []
    for side, features in enumerate(shown):
        words = [name for name in ('logits', 'pooled', 'head')
                 if matters(side, name, torch.randn_like(getattr(features, name)))]
        for name, kind in (('maps', ''), ('preact', ' before activation')):
            maps = getattr(features, name)
            found = [i for i, f in enumerate(maps)
                     if matters(side, name, [*maps[:i], torch.randn_like(f), *maps[i + 1:]])]
            words += ([f'stages{kind}'] if len(found) == len(maps) else
                      [f'{"last stage" if i == len(maps) - 1 else f"stage {i + 1}"}{kind}' for i in found])
        sides.append(', '.join(words))
    return sides[0] if sides[0] == sides[1] else 'student: {}; teacher: {}'.format(*sides)


@torch.no_grad()
def losses(distiller, s: Features, t: Features, batch: Batch) -> list[float]:
    torch.manual_seed(0)
    distiller = copy.deepcopy(distiller)  # it may remember what it saw
    return [loss.item() for loss in distiller(distiller.adapt(s), t, batch).values()]
