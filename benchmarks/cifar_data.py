"""What CIFAR's training asks of the data: crops and flips, and CRD's negatives."""
import numpy as np
import torch

from distillers.crd import CRD
from models import create_model
from utils.data import Batch, Prepare
from utils.resident import VIEWS, Resident
from utils.sources import Dummy

from . import peers
from .cifar_kd import options
from .harness import Case, Limit, Row, Settings, Variant, copy_rate
from .plain import plain_negatives, plain_views


def cifar_data(settings: Settings, images=512, batch=64, samples=50000, negatives=16384) -> Case:
    """The views of some images, and a batch as CRD wants it: views, and the numbers of its negatives."""
    device, draw = settings.device, torch.Generator().manual_seed(0)
    source, prepare = Dummy(samples, 100, 32), Prepare(options(False, 'off'), device)
    resident, chosen = Resident(source, device), torch.randperm(samples, generator=draw)[:images]
    views = dict(zip(chosen.split(batch), torch.randint(VIEWS, (images,), generator=draw).split(batch)))
    pictures = {i: source.load(i)[0] for i in chosen.tolist()}
    network = create_model('resnet8', 100)
    crd = CRD(network, network, negatives=negatives).to(device)
    crd.know(resident.targets)

    def ours(index, view):
        index, view = index.to(device), view.to(device)
        return prepare(Batch(resident.views(index, view), resident.targets[index], index, None))

    def plain(index, view):
        return plain_views(pictures, index, view).to(device)

    def all_views(of):
        def run():
            return {'images': torch.cat([getattr(ready, 'images', ready) for ready in map(of, views, views.values())])}
        return run

    index, view = next(iter(views.items()))

    def crd_batch():
        crd.draw(ours(index, view).index)
        return {}  # random

    def plain_crd_batch():
        plain(index, view), plain_negatives(torch.tensor(source.targets), index, negatives).to(device)
        return {}

    variants = {'views': Variant(all_views(ours)), 'plain views': Variant(all_views(plain), theirs=True),
                'CRD batch': Variant(crd_batch), 'plain CRD batch': Variant(plain_crd_batch, theirs=True)}
    if peers.available(settings, peers.MDISTILLER):
        pixels = np.stack([np.asarray(source.load(i)[0]) for i in range(samples)])
        batches = iter(peers.mdistiller_crd_loader(settings, pixels, source.targets, batch, negatives))

        def peer_crd_batch():
            for part in next(batches):
                part.to(device)
            return {}
        variants[peers.MDISTILLER] = Variant(peer_crd_batch, theirs=True)

    def limit():
        pixels, rate = 3 * 32 * 32, copy_rate(device)
        moved = {'views': 5 * pixels * images, 'CRD batch': batch * (5 * pixels + 8 * negatives)}
        return Limit('pixels read as bytes and written as floats, negatives written, at the rate of a large copy',
                     {name: size / rate for name, size in moved.items()})
    return Case(variants, [Row('views', 'plain views', 5.0), Row('CRD batch', 'plain CRD batch', 8.0),
                           Row('CRD batch', peers.MDISTILLER, 9.0)], limit=limit,
                skipped=peers.trouble(settings, peers.MDISTILLER))
