"""main_base.py that something happens to, at update N of its life, counted from 1; FAULT='N what', what being

    kill         every rank is killed
    kill-rank-R  that rank is
    SIGTERM ...  the signal, to the whole process group as a scheduler or a terminal sends it
    hang-rank-R  that rank stops
    nan-rank-R   that rank's loss is not a number; or inf-rank-R

Where torchrun starts it again nothing happens. With GROUP_NORM the network's norms do not depend on the batch, so that
ranks can be compared with one process.
"""
import os
import signal
import sys

from torch import nn

import main_base
from distillers import networks
from utils import distributed, engine

update, what = os.environ.get('FAULT', '0 nothing').split()
update = 0 if int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) else int(update)
seed_everything, calls = engine.seed_everything, 0


def tiny(arch, classes, pretrained=False):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2),
                         nn.GroupNorm(4, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))


def here() -> bool:
    """Whether it is time, and this the rank."""
    return calls == update and ('rank' not in what or distributed.rank() == int(what[-1]))


def at_every_update(*key):
    global calls
    calls += 1
    if here() and what.startswith('kill'):
        os.kill(os.getpid(), signal.SIGKILL)
    if here() and what.startswith('hang'):
        os.kill(os.getpid(), signal.SIGSTOP)
    if here() and what.startswith('SIG') and distributed.is_main():
        launched = distributed.world() > 1
        os.killpg(os.getpgid(os.getppid()) if launched else os.getpgrp(), getattr(signal, what))
        if launched:  # until the launcher has handed it on
            for _ in range(500):
                if engine.signals.caught():
                    break
                signal.sigtimedwait([], 0.01)
    seed_everything(*key)


class Supervised(engine.Supervised):
    def forward(self, batch):
        logits, losses = super().forward(batch)
        if here() and what[:3] in ('nan', 'inf'):
            losses['ce'] = losses['ce'] + float(what[:3])
        return logits, losses


engine.seed_everything = at_every_update
main_base.Supervised = Supervised
if 'GROUP_NORM' in os.environ:
    networks.build = tiny

if __name__ == '__main__':
    sys.argv[0] = 'main_base.py'
    main_base.main()
