"""When the methods prepare for what comes, such as MGD by matching channels anew."""
import logging
from functools import cache
from itertools import islice

from detectron2.engine import HookBase

from .config import due, epoch_of


class Epochs(HookBase):
    """Begins the epochs of the config's schedule, and again the one that a run resumes in.

    cfg: MODEL.DISTILL
    loader(): a fresh loader of training images, so that nothing is taken from those that are trained on. Each rank has
    its own share of them.
    """

    every = 100  # batches between two lines

    def __init__(self, cfg, student, loader):
        self.schedule, self.iters = (cfg.PERIODS, cfg.STEPS), cfg.ITERS
        self.student, self.loader = student, loader

    def before_train(self):
        if self.trainer.start_iter < self.trainer.max_iter:
            self.start(self.trainer.start_iter)

    def after_step(self):
        upcoming = self.trainer.iter + 1
        if due(upcoming, *self.schedule) and upcoming < self.trainer.max_iter:
            self.start(upcoming)

    def start(self, iteration):
        epoch, loader = epoch_of(iteration, *self.schedule), cache(self.loader)  # if somebody asks for it, and once
        reports = self.student.start_epoch(epoch, lambda: self.told(islice(loader(), self.iters)))
        for name, rows in reports.items():
            for row in rows:
                logging.getLogger(__name__).info('%s, before iteration %d: %s', name, iteration,
                                                 ', '.join(f'{key} {value}' for key, value in row.items()))

    def told(self, batches):
        for number, batch in enumerate(batches, 1):
            yield batch
            if number % self.every == 0:
                logging.getLogger(__name__).info('looked at %d of %d batches', number, self.iters)
