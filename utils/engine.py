"""The two loops: one epoch of training, and an exact evaluation."""
import time

import torch
import torch.nn.functional as F
from torch import nn

from models.errors import only_logits

from . import distributed, signals, together
from .closely import Closely, timed
from .data import bad_allowed
from .learner import Learner
from .meters import Display, Meter, hits
from .optim import learning_rate, set_learning_rate, total_epochs
from .randomness import seed_everything
from .setup import begin_step, precision

EXIT_BROKEN = 3  # a loss or gradient was not finite, or a prediction is no number


class Supervised(nn.Module):
    """Batch -> logits, {'ce': cross entropy}."""

    def __init__(self, student: nn.Module, label_smoothing: float):
        super().__init__()
        self.student, self.label_smoothing = student, label_smoothing

    def forward(self, batch):
        with timed('student'):
            logits = only_logits(self.student(batch.images))
        return logits, {'ce': F.cross_entropy(logits.float(), batch.target, label_smoothing=self.label_smoothing)}


def train_one_epoch(learner: Learner, data, prepare, ema, run, device, args):
    """From where the run stands to the end of its epoch. Leaves the sums of the epoch in run.progress['sums']."""
    learner.task.train()
    progress, epoch, order = run.progress, run.progress['epoch'], data.order
    meter, size = Meter(progress['sums']), order.batch * order.accum
    display = Display(f'Epoch {epoch}', -(-order.length // size),
                      (total_epochs(args) - epoch) * order.length - progress['sample'])
    look = Closely(run.parts['model'], display.updates, device, args)
    rate, arrived = None, time.monotonic()

    for end, batches in data.updates(epoch, progress['sample']):
        display.waited += time.monotonic() - arrived
        if (due := learning_rate(epoch + progress['sample'] / order.length, args)) != rate:
            set_learning_rate(learner.optimizer, rate := due)
        together.hand_over()
        begin_step(args)
        seed_everything(run.seed, 'update', epoch, progress['sample'], distributed.rank())
        update = -(-end // size)
        look.begin(update)
        if learner.graph and end - progress['sample'] == size and not look.on:
            batch, = batches
            values, norm = learner.graph(prepare(batch))
            meter.add(batch, learner.names, values)
        else:
            learner.guard.begin()
            for number, batch in enumerate(batches, 1):
                with distributed.accumulating(learner.task, last=number == len(batches)):
                    values = learner.learn(prepare(batch), look)
                meter.add(batch, learner.names, values)
            look.end(meter)
            norm = learner.step()
        meter.add_norm(norm)
        if ema and not (args.max_broken_updates and not norm.isfinite()):  # one that was left out is averaged by nobody
            ema.update_parameters(run.parts['model'])
        display.count(end - progress['sample'])
        progress['sample'] = end

        bad, stop = distributed.agree(data.report_bad(batches), signals.caught())
        progress['unreadable'] = progress.get('unreadable', 0) + bad
        if progress['unreadable'] > (allowed := bad_allowed(args, order.length)):
            distributed.stop(f'{progress["unreadable"]} unreadable images in epoch {epoch}, more than --max-bad-images '
                             f'{allowed} allows')
        save = stop or (args.save_every and update % args.save_every == 0)
        if save or update % args.print_freq == 0 or end == order.length:
            troubles = meter.read(watch_norms=not learner.scaler.is_enabled())
            meter.clock(time.monotonic() - display.began, display.waited)  # now that the device has done them
            stop_if_broken(troubles, update, run, data, args)
            display.show(meter.sums, rate, update)
        if save:
            progress['sums'] = meter.everybody()
            run.save()
        if stop:
            run.interrupt()
        arrived = time.monotonic()
    progress['sums'] = meter.everybody()


def stop_if_broken(troubles: list[dict], update: int, run, data, args):
    """End all ranks where some of them met more losses or gradients that are not finite than are allowed.

    No weights have seen them.
    """
    if not any(distributed.agree(bool(troubles))):
        return
    broken, progress = {}, run.progress
    everybody = [trouble for told in distributed.gather(troubles) for trouble in told]
    for trouble in sorted(everybody, key=lambda t: (-t['updates_ago'], t['what'] == 'gradient norm')):
        trouble['update'] = update - trouble.pop('updates_ago')
        broken.setdefault(trouble['update'], trouble)  # a loss of whichever rank, before the norm it spoils on all
    progress['broken'] = progress.get('broken', 0) + len(broken)
    stop = progress['broken'] > args.max_broken_updates
    for trouble in broken.values():
        trouble['files'] = [data.images.source.name(i) for i in trouble['samples']]
        run.note('nonfinite.json', {'epoch': progress['epoch'], **trouble})
        some = ', '.join(map(str, trouble['samples'][:8])) + (', ...' if len(trouble['samples']) > 8 else '')
        line = (f'{trouble["what"]} is {trouble["value"]} in epoch {progress["epoch"]}, update {trouble["update"]}, '
                f'samples {some} (all in {run.folder / "nonfinite.json"}); the update was left out')
        if stop:
            distributed.stop(f'{line}, and no checkpoint has seen it', EXIT_BROKEN)
        distributed.say(f'note: {line}')


@torch.no_grad()
def evaluate(networks: dict[str, nn.Module], loader, prepare, device, args) -> dict | None:
    """Score networks in one pass over the data, every sample once at any world and batch size.

    {name: {'top1', 'top5' (percent), 'loss', 'correct1', 'correct5', 'n'}}, 'agreement' (percent of equal guesses)
    where there are several, 'seconds', and 'predictions': by name [2, n], of each sample the guess and how sure it was.
    None where a signal asks to stop; {'unreadable': why} where an image cannot be read.
    """
    for network in networks.values():
        distributed.sync_buffers(network)
        network.eval()
    counts = torch.zeros(len(networks), 2, dtype=torch.int64, device=device)
    told = torch.zeros(len(networks), 2, len(loader.dataset), device=device)  # each sample's guess, and how sure it is
    losses = torch.zeros(len(networks), dtype=torch.float64, device=device)
    agree, seen, unreadable = torch.zeros((), dtype=torch.int64, device=device), 0, None
    began = time.monotonic()
    for batch in loader:
        together.hand_over()
        begin_step(args)
        if signals.caught():
            break
        if (batch.bad >= 0).any():  # a score with another image in its place would be another data set's
            unreadable = loader.dataset.complaint(int(batch.bad[batch.bad >= 0][0]))
            break
        batch = prepare(batch)
        guesses = []
        for i, network in enumerate(networks.values()):
            with precision(device, args.amp):
                logits = torch.cat([network(images) for images in parts(batch.images)])
            counts[i] += hits(logits, batch.target)
            losses[i] += F.cross_entropy(logits.double(), batch.target, reduction='sum')
            guesses.append(logits.argmax(1))
            told[i, :, batch.index] = torch.stack([guesses[-1].float(), logits.float().softmax(1).amax(1)])
        agree += torch.stack([guess == guesses[0] for guess in guesses]).all(0).sum()
        seen += len(batch.target)
    for complaint in distributed.gather(unreadable):
        if complaint:
            return {'unreadable': complaint}
    seen, stop = distributed.agree(seen, signals.caught())
    counts, losses, agree = (distributed.total(x).tolist() for x in (counts, losses, agree))
    told, source = distributed.total(told), loader.dataset.source
    if stop:
        return None
    assert seen == len(loader.dataset), f'{seen} of {len(loader.dataset)} samples were evaluated'
    scores = {name: {'top1': 100 * c1 / seen, 'top5': 100 * c5 / seen, 'loss': loss / seen,
                     'correct1': c1, 'correct5': c5, 'n': seen}
              for name, (c1, c5), loss in zip(networks, counts, losses)}
    return scores | ({'agreement': 100 * agree / seen} if len(networks) > 1 else {}) | {
        'seconds': time.monotonic() - began,
        'predictions': {'classes': source.classes, 'target': source.targets, **dict(zip(networks, told.cpu().numpy()))}}


def parts(images: torch.Tensor):
    """What a network looks at without gradient: on a CPU as many images at once as have maps that stay in its cache.

    At 64 images of 224 pixels, or 512 of 32, a pass takes up to two and a half times as long for each.
    """
    if images.is_cuda:
        return [images]
    few = max(8, 2**16 // images[0, 0].numel())
    return images.split(few * max(torch.get_num_threads() // 2, 1))
