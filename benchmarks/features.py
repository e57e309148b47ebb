"""Features of MobileNetV2, forward and backward, from one pass or from one per stage."""
import torch

from models import create_model

from . import peers
from .harness import Case, Row, Settings, Variant, products
from .plain import restarted_features


def network_and_images(settings: Settings, size: int, batch: int):
    torch.manual_seed(0)
    network = create_model('mobilenet_v2_mgd').to(settings.device)
    network.dropout.p = 0.0
    return network, torch.randn(batch, 3, size, size).to(settings.device)


def single_pass(network, x):
    shown = network(x, features=True)
    return shown.logits, shown.preact


def forward_backward(network, features, x):
    def run():
        network.zero_grad()
        logits, preact = features(network, x)
        (logits.mean() + sum(f.mean() for f in preact)).backward()
        return {'logits': logits} | {f'preact {i}': f for i, f in enumerate(preact)}
    return run


def mv2_features(settings: Settings, size=224) -> Case:
    variants, batch = {}, settings.batch(8, 64)
    for name, features in (('one pass', single_pass), ('restarts', restarted_features)):
        network, x = network_and_images(settings, size, batch)
        variants[name] = Variant(forward_backward(network, features, x), theirs=features is restarted_features)
    if peers.available(settings):
        network, x = network_and_images(settings, size, batch)
        variants[peers.MGD] = Variant(forward_backward(peers.mobilenet_v2(settings, network), peers.features, x),
                                      theirs=True)
    rows = [Row('one pass', baseline, 4.0, tolerance=1e-4) for baseline in ('restarts', peers.MGD)]
    return Case(variants, rows, skipped=peers.trouble(settings),
                limit=lambda: products(variants['one pass'].run, {'one pass': variants['one pass']}, settings.device))
