"""What CIFAR's training asks of the data: crops and flips, and CRD's negatives."""
import torch

from distillers.crd import CRD
from models import create_model
from utils.data import Batch, Dummy, Prepare
from utils.resident import VIEWS, Resident

from .cifar_kd import options
from .harness import Case, Row, Settings, Variant
from .plain import plain_negatives, plain_views


def cifar_data(settings: Settings, images=512, batch=64, samples=50000, negatives=16384) -> Case:
    device, draw = settings.device, torch.Generator().manual_seed(0)
    source, prepare = Dummy(images, 100, 32), Prepare(options(False, 'off'), device)
    resident, pictures = Resident(source, device), [source.load(i)[0] for i in range(images)]
    order = torch.randperm(images, generator=draw).split(batch)
    views = torch.randint(VIEWS, (images,), generator=draw)

    def batched():
        for index in order:
            there, view = index.to(device), views[index].to(device)
            ready = prepare(Batch(resident.views(there, view), resident.targets[there], there, None))
        return {'images': ready.images}

    def plain():
        for index in order:
            ready = plain_views(pictures, index, views[index]).to(device)
        return {'images': ready}

    targets = torch.arange(samples) % 100
    network = create_model('resnet8', 100)
    crd = CRD(network, network, negatives=negatives).to(device)
    crd.know(targets.to(device))
    index = torch.randperm(samples, generator=draw)[:batch]

    def drawn():
        crd.draw(index.to(device))
        return {}  # random

    def plain_drawn():
        plain_negatives(targets, index, negatives).to(device)
        return {}

    variants = {'batched views': Variant(batched), 'plain views': Variant(plain),
                'batched negatives': Variant(drawn), 'plain negatives': Variant(plain_drawn)}
    return Case(variants, [Row('batched views', 'plain views', 4.0), Row('batched negatives', 'plain negatives', 3.0)])
