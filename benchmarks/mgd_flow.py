"""The update of MGD's flow: comparing all channels, and finding the cheapest matching."""
import time
from unittest.mock import patch

import numpy as np
import torch

from distillers import mgd

from . import peers
from .harness import Case, Limit, Row, Settings, Variant, matmul_rate, matmul_size, spent
from .plain import plain_assignment, plain_tracking

STAGES = ((128, 256, 56), (256, 512, 28), (512, 1024, 14), (1024, 2048, 7))  # student, teacher, pixels of an edge


def flow_tracking(settings: Settings, stages=STAGES, batch=32) -> Case:
    torch.manual_seed(0)
    features = [[torch.randn(batch, c, size, size, device=settings.device) for c in channels]
                for *channels, size in stages]
    in_channels_last = [[f.to(memory_format=torch.channels_last) for f in pair] for pair in features]

    def ours(features):
        sums = [torch.zeros(sc, tc, dtype=torch.float64, device=settings.device) for sc, tc, _ in stages]
        for total, pair in zip(sums, features):
            total += mgd.cosines(*pair)
        return {f'cost {size}': 2 - 2 * total / batch for total, (*_, size) in zip(sums, stages)}

    def plain(features):
        sums = [np.zeros((sc, tc)) for sc, tc, _ in stages]
        for total, pair in zip(sums, features):
            total += plain_tracking(*pair)
        return {f'cost {size}': total / batch for total, (*_, size) in zip(sums, stages)}

    variants = {
        'contiguous': Variant(lambda: ours(features)),
        'channels_last': Variant(lambda: ours(in_channels_last)),
        'plain': Variant(lambda: plain(features), theirs=True),
        'plain channels_last': Variant(lambda: plain(in_channels_last), theirs=True),
    }
    if peers.available(settings):
        variants[peers.MGD] = Variant(peers.tracking(settings, stages, features), theirs=True)
    rows = [Row('contiguous', 'plain', 2.5, tolerance=1e-6),
            Row('channels_last', 'plain channels_last', 1.8, tolerance=1e-6),
            Row('contiguous', peers.MGD, 2.5, tolerance=1e-6)]

    def limit():
        work, n = sum(2 * batch * size ** 2 * sc * tc for sc, tc, size in stages), matmul_size(settings.device)
        ms = work / matmul_rate('fp32', settings.device)
        return Limit(f'{work / 1e9:.0f} GFLOP of products, at the rate of one of {n} x {n}: {ms:.3g} ms',
                     dict.fromkeys(('contiguous', 'channels_last'), ms))
    return Case(variants, rows, limit=limit, skipped=peers.trouble(settings))


def flow_assignment(settings: Settings, sc=1024, g=2) -> Case:
    """g * sc teacher channels, each a mixture of some student channels and of what the student does not see."""
    draw = torch.Generator().manual_seed(0)
    tc = g * sc
    s = torch.randn(sc, 400, generator=draw)
    t = torch.randn(tc, sc, generator=draw) @ s / sc ** 0.5 + torch.randn(tc, 400, generator=draw)
    cost = 2 - 2 * mgd.cosines(s[None, :, :, None], t[None, :, :, None]).double()

    def price(flow):
        return {'cost': cost.gather(1, torch.as_tensor(flow).T).mean()}

    variants = {
        'ours': Variant(lambda: price(mgd.match(cost, g)), clock=spent),
        'plain': Variant(lambda: price(plain_assignment(cost.numpy(), g)), clock=spent, theirs=True),
    }
    if peers.available(settings):
        solve = peers.assignment(settings, cost, g)
        variants[peers.MGD] = Variant(lambda: price(solve()), clock=spent, theirs=True)
    rows = [Row('ours', baseline, 4.0, tolerance=1e-4) for baseline in ('plain', peers.MGD)]

    def limit():
        solved, took = mgd.solved, []

        def watched(*args):
            start = time.process_time()
            solved(*args)
            took.append(1e3 * (time.process_time() - start))
        with patch.object(mgd, 'solved', watched):
            mgd.match(cost, g)
        return Limit(f'the solver itself takes {took[0]:.0f} ms', {'ours': took[0]})
    return Case(variants, rows, limit=limit, skipped=peers.trouble(settings))
