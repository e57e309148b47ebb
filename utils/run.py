"""A run: what it was asked, where it stands, what came of it, in its folder.

    args.json  log.jsonl  result.json  checkpoint.pth  checkpoint.previous.pth  best.pth  last.pth  events.out.*
    teacher.pth       where it learns, too
    start.* evaluate.*    scores before the first epoch, and of --evaluate
    interrupted       there while a run has stopped for a signal and waits to be started again
    nonfinite.json    where and when a loss or gradient was not finite
    predictions.npz   of the last epoch: of each validation image the class, the guess, and how sure it was
Only global rank 0 touches it.
"""
import json
import math
import platform
import random
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torchvision

from . import checkpoint, distributed, folder, signals
from .args import NEUTRAL, OWN, SEEN, completed
from .engine import EXIT_BROKEN
from .errors import one_line
from .meters import percentages
from .optim import learning_rate, load_optimizer, total_epochs
from .setup import device_name

# Seconds between two writings of files: of shorter epochs several are written at once. A run that is killed loses what
# is not written yet, one that a signal stops loses nothing.
APART = 10


class Run:
    def __init__(self, args, device):
        self.args, self.device = args, device
        refuse_other_ranks(args)
        self.anew = args.overwrite and not distributed.restarts()  # what torchrun restarts goes on
        self.folder, self.seed, self.saved, self.origin = distributed.from_main(self._open)
        self.progress = {'epoch': args.start_epoch, 'sample': 0, 'sums': {}, 'best': None, 'last': None, 'seconds': 0.0}
        self.parts, self.facts, self.began, self.writer = {}, {}, time.monotonic(), None
        self.told = {}  # what else the results tell of the run
        self.resumed = False  # from a checkpoint
        self.unwritten, self.written = {}, float('-inf')  # files of the last and the best epoch by name; when they were

    def _open(self):
        """On rank 0, reading only: the folder, the seed, and the checkpoint to go on from with its path."""
        args = self.args
        git_revision()  # while the code is what has been loaded
        path = Path(args.output or folder.default_output(args))
        folder.refuse_class(path, args)
        saved = origin = None
        self.found = folder.stamps(path)
        if not self.anew and not (args.evaluate and args.resume != 'auto'):
            saved, origin = checkpoint.newest(path / 'checkpoint.pth')
        own = saved is not None  # a run that --resume PATH once started goes on from its own checkpoints
        if own and args.resume != 'auto':
            print(f'note: --resume {args.resume} is passed over, as {path} has checkpoints of its own', file=sys.stderr)
        if not own and args.resume != 'auto':
            with one_line('--resume: '):
                saved, origin = checkpoint.read(Path(args.resume)), Path(args.resume)
            if not args.evaluate and not checkpoint.is_checkpoint(saved):
                sys.exit(f'error: --resume: {origin} holds weights only; --student-resume starts from them')
            if not args.evaluate and saved['progress']['epoch'] >= total_epochs(args):
                sys.exit(f'error: --resume: {origin} is of a run that is done; {origin.parent} holds what came of it')
        seed = random.SystemRandom().randrange(2 ** 31)
        if checkpoint.is_checkpoint(saved):
            refuse_other_arguments(saved, origin, own, args)
            seed = saved['seed']
        return path, seed if args.seed is None else args.seed, saved, origin

    def _begin(self) -> dict | None:
        """On rank 0, when all is known to fit: the folder is ours, with only what lies before the point we start at.

        Returns the best epoch whose weights are there.
        """
        folder.refuse_harm(self.folder, self.args)
        folder.make(self.folder)
        self.lock = folder.lock(self.folder)
        distributed.at_end.callback(self._write)  # where it ends for a loss that is not finite, or in an exception
        folder.clear(self.folder, self.found, self.anew, self.progress['epoch'])
        checkpoint.write(self.folder / 'args.json', as_json(recorded(self.args)))
        if self.args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.writer = SummaryWriter(str(self.folder), purge_step=self.progress['epoch'])
            except Exception as error:  # not installed, a full disk: nothing to end a run for
                self._no_scalars(error)
        best = self.progress['best']
        return best and folder.bring_best(self.origin.parent, self.folder, best)

    def restore(self, **parts):
        """Name the parts whose state_dicts make a checkpoint, and fill them from the one to go on from."""
        self.parts = {name: part for name, part in parts.items() if part is not None}
        if self.saved is None:
            return
        for name, part in self.parts.items():
            try:
                if name == 'scaler' and not self.saved[name]:
                    continue  # of a run in another precision: it begins anew
                if name == 'model':
                    checkpoint.fit(part, self.saved[name], self.origin)
                elif isinstance(part, torch.optim.Optimizer):
                    load_optimizer(part, self.saved[name])
                else:
                    part.load_state_dict(self.saved[name])
            except (KeyError, ValueError, RuntimeError) as error:
                why = ' '.join(line.strip() for line in str(error).splitlines()[:2])  # torch names them in the second
                sys.exit(f'error: cannot go on from {self.origin}: {name}: {why}')
        for name, fact in self.facts.items():
            if self.saved['facts'].get(name) != fact:
                sys.exit(f'error: cannot go on from {self.origin}: its {name}: {self.saved["facts"].get(name)}; '
                         f'here: {fact}')
        self.progress, self.resumed = self.saved['progress'], True
        distributed.say(f'resumed from {self.origin}: epoch {self.progress["epoch"]}, sample '
                        f'{self.progress["sample"]}')
        self.saved = None

    def tie(self, **facts: str):
        """To what it goes by, which has to be the same on all ranks."""
        for name, fact in facts.items():
            if len(told := dict.fromkeys(distributed.gather(fact))) > 1:
                distributed.stop(f'the ranks differ in their {name}: {", ".join(told)}')
        self.facts |= facts

    def needs_published(self) -> bool:
        """Whether the student starts from the weights that --pretrained names, and no others come in their place."""
        return self.args.pretrained and not (self.args.student_resume or self.saved)

    def load_evaluated(self, network, classes: list[str]):
        """What --evaluate scores: the weights named by --student-resume, else those of the run."""
        if self.args.student_resume:
            checkpoint.load_weights(network, self.args.student_resume, f'--arch {self.args.arch}', classes)
            tell_seen(self.args.student_resume, self.args)
        elif self.saved:
            tell_seen(self.origin, self.args)
            checkpoint.refuse_other_classes(self.saved, self.origin, classes)
            checkpoint.fill(network, self.saved, self.origin)
        elif not self.args.pretrained:
            distributed.say('note: random weights are scored (--student-resume, --resume or --output name others)')
        self.tie(student=checkpoint.fingerprint(network))

    def begin(self, student, train, valid):
        """Say what is about to happen, and open the folder for it."""
        args, ranks, self.classes = self.args, distributed.world(), list(train.images.source.classes)
        self.progress['best'] = distributed.from_main(self._begin)
        stints, here = self.progress.setdefault('stints', []), self._circumstances()
        if not stints or any(stints[-1][key] != value for key, value in here.items()):
            stints.append({'epoch': self.progress['epoch'], **here})
        self.told['parameters'] = sum(p.numel() for p in student.parameters())  # of all that it predicts through
        distributed.say(
            f'{args.arch}: {self.told["parameters"]:,} parameters; {len(train.images):,} training '
            f'and {len(valid.dataset):,} validation images, {len(train.images.source.classes)} classes\n'
            f'global batch {train.order.batch * args.accum_steps} = {train.order.batch / ranks:g} x {ranks} ranks x '
            f'{args.accum_steps} batches per update; learning rate {args.lr:g}; {total_epochs(args)} epochs; '
            f'seed {self.seed}; in {self.folder}')

    def tell(self, news: dict[str, list[dict]]):
        """What methods did before an epoch, in rows of numbers by name: printed, and in the record of the epoch."""
        self.progress['news'] = news or self.progress.get('news', {})  # a resumed epoch's were told before
        for name, rows in news.items():
            for row in rows:
                told = (f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in row.items() if v is not None)
                distributed.say(f'{name}: {", ".join(told)}')

    def seconds(self) -> float:
        return self.progress['seconds'] + time.monotonic() - self.began

    def save(self):
        distributed.from_main(self._save)

    def _save(self):
        """In an order that a crash cannot spoil: what epochs have left, then the point to go on from."""
        self._write()
        checkpoint.save(self.folder / 'checkpoint.pth', {
            'format': checkpoint.FORMAT, **{name: part.state_dict() for name, part in self.parts.items()},
            'progress': self.progress | {'seconds': self.seconds()}, 'seed': self.seed,
            'arguments': recorded(self.args), 'facts': self.facts, 'classes': self.classes,
            'world_size': distributed.world()})

    def _write(self):
        """What finished epochs have left."""
        files, self.unwritten = self.unwritten, {}
        for name, content in files.items():
            checkpoint.write(self.folder / name, as_npz(content) if name.endswith('.npz') else content)
        if files:
            checkpoint.write(self.folder / 'result.json', as_json(self._result()))
            self.written = time.monotonic()

    def shipped(self):
        """The network that is evaluated and given away."""
        return self.parts['ema'].module if 'ema' in self.parts else self.parts['model']

    def end_epoch(self, scores: dict | None):
        """Write down a finished epoch, or keep it until there is more to write."""
        progress = self.progress
        if scores is None or 'unreadable' in scores:  # the epoch's training is done, its evaluation is not
            self.save()
            self.refuse(scores)
        self.refuse_nan(scores, f' since epoch {progress["epoch"]}, which is left out. A lower --lr, or --warmup, may '
                                'help')
        predictions, seconds, score = (scores.pop(name) for name in ('predictions', 'seconds', 'student'))
        epoch, rate = progress['epoch'], learning_rate(progress['epoch'], self.args)
        best = progress['best'] is None or score['correct1'] > progress['best']['correct1']
        record = {'epoch': epoch, 'lr': rate, 'train': percentages(progress['sums']), 'valid': score,
                  'seconds': round(self.seconds(), 2), 'evaluation': round(seconds, 2),
                  'news': progress.pop('news', {}), 'unreadable': progress.pop('unreadable', 0),
                  'broken': progress.pop('broken', 0), **scores}
        last = {'epoch': epoch, **score, **scores}
        progress.update(epoch=epoch + 1, sample=0, sums={}, last=last, best=last if best else progress['best'])
        distributed.from_main(lambda: self._write_epoch(record, best, predictions))

    def _write_epoch(self, record: dict, best: bool, predictions: dict):
        weights = self.unwritten['last.pth'] = on_host(self.shipped())
        if best:
            self.progress['best'] = self.progress['last'] | {'weights': checkpoint.fingerprint(weights)}
            self.unwritten['best.pth'] = weights
        self.unwritten['predictions.npz'] = predictions
        if 'teacher' in self.parts:  # it learns, too
            self.unwritten['teacher.pth'] = on_host(self.parts['teacher'])
        checkpoint.append(self.folder / 'log.jsonl', json.dumps(record) + '\n')
        if time.monotonic() - self.written >= APART or self.progress['epoch'] >= total_epochs(self.args):
            self._save()
        train, valid = record['train'], record['valid']
        print(f'Epoch {record["epoch"]}: train loss {train["loss"]:.4f} top1 {train["top1"]:.2f}; valid loss '
              f'{valid["loss"]:.4f} top1 {valid["top1"]:.2f} top5 {valid["top5"]:.2f} ({valid["n"]} images)'
              + ', the best so far' * best
              + (f'; teacher top1 {record["teacher"]["top1"]:.2f}' if 'teacher' in record else ''), flush=True)
        if self.writer:
            try:
                for name, value in scalars(record):
                    self.writer.add_scalar(name, value, record['epoch'])
                self.writer.flush()
            except Exception as error:
                self._no_scalars(error)

    def _no_scalars(self, error: Exception):
        self.writer = None
        print(f'note: no scalars for TensorBoard are written: {error}', file=sys.stderr, flush=True)

    def refuse_nan(self, scores: dict, then: str = ''):
        """A guess among numbers that are none is no guess, and would score as the first class."""
        for name, score in scores.items():
            if isinstance(score, dict) and math.isnan(score.get('loss', 0)):
                distributed.stop(f'the {name} predicts what is not a number: its weights are broken'
                                 + ', or beyond --amp fp16' * (self.args.amp == 'fp16') + then, EXIT_BROKEN)

    def refuse(self, scores: dict | None):
        """End for want of scores: a signal came, or an image cannot be read."""
        if scores:
            distributed.stop(f'cannot evaluate: {scores["unreadable"]}. Put a readable image in its place, and '
                             'the same command goes on; without it these are other data')
        if self.args.evaluate:
            sys.exit(signals.EXIT_INTERRUPTED)
        self.interrupt()

    def report(self, scores: dict | None, file: str = 'evaluate.json'):
        """Print the scores of --evaluate, or of the start of a run, and leave them in --output if that was given."""
        if scores is None or 'unreadable' in scores:
            self.refuse(scores)
        self.refuse_nan(scores)
        predictions, _ = scores.pop('predictions'), scores.pop('seconds')
        for name, score in scores.items():
            distributed.say(f'{name}: {score:.2f} %' if name == 'agreement' else
                            f'{name}: top1 {score["top1"]:.3f} ({score["correct1"]}/{score["n"]}), top5 '
                            f'{score["top5"]:.3f} ({score["correct5"]}/{score["n"]}), loss {score["loss"]:.4f}')
        if self.args.output:
            distributed.from_main(lambda: folder.make(self.folder))
            self.note(file, {'scores': scores, **self._provenance()})
            beside = (self.folder / file).with_suffix('.npz')
            distributed.from_main(lambda: checkpoint.write(beside, as_npz(predictions)))

    def finish(self):
        best, last = self.progress['best'], self.progress['last']
        told = f'best {best["top1"]:.2f} (epoch {best["epoch"]})' if best else 'of the best the weights are gone'
        distributed.say(f'done: last top1 {last["top1"]:.2f}, {told}; {self.folder} holds last.pth, best.pth, '
                        'log.jsonl, result.json')
        if self.writer:
            with suppress(Exception):  # as above
                self.writer.close()

    def _result(self) -> dict:
        return {'finished': self.progress['epoch'] >= total_epochs(self.args), 'last': self.progress['last'],
                'best': self.progress['best'], 'teacher_score': self.progress.get('teacher'),
                'changed': self.progress.get('changed', []), 'stints': self.progress['stints'],
                'seconds': round(self.seconds(), 2), **self._provenance()}

    def _provenance(self) -> dict:
        """All that is needed to do it again."""
        return {'command': shlex.join(sys.argv), 'arguments': recorded(self.args), 'seed': self.seed,
                **self.facts, **self.told, **self._circumstances()}

    def _circumstances(self) -> dict:
        """What may be another after a resume, and may round otherwise."""
        return {'git': git_revision(), 'world_size': distributed.world(), 'device': device_name(self.device),
                'versions': {'python': platform.python_version(), 'torch': str(torch.__version__),  # a type of its own
                             'torchvision': torchvision.__version__}}

    def note(self, name: str, content: dict):
        """A small file beside the others."""
        distributed.from_main(lambda: checkpoint.write(self.folder / name, as_json(content)))

    def interrupt(self):
        """Leave all that is done, and the marker that tells a scheduler to start the same command again."""
        distributed.from_main(lambda: self.unwritten and self._save())
        self.note('interrupted', {'signal': signals.caught(), 'epoch': self.progress['epoch'],
                                  'sample': self.progress['sample']})
        if distributed.is_main():
            where = ('' if self.args.output else f' with --output {self.folder}') + (
                ' without --overwrite' * self.args.overwrite)
            print(f'\nstopped by a signal; the same command{where} goes on from epoch {self.progress["epoch"]}, sample '
                  f'{self.progress["sample"]}', file=sys.stderr, flush=True)
        sys.exit(signals.EXIT_INTERRUPTED)


def recorded(args) -> dict:
    """The arguments, with the one number that also follows from how many nodes there are."""
    return json.loads(json.dumps(vars(args) | {
        'global_batch': args.batch_size * distributed.planned(args)[1] * args.accum_steps}))


def refuse_other_ranks(args):
    """End where a rank was started with other flags, or another script, than rank 0."""
    first = distributed.from_main(lambda: recorded(args))
    for rank, differences in enumerate(distributed.gather(differing(first, args, {*first, *vars(args)} - OWN))):
        if differences:
            distributed.stop(f'rank {rank} was started otherwise than rank 0, which is "there": {differences}')


def differing(before: dict, args, keys: set[str] | None = None) -> str:
    """The arguments that decide results, or these of them, and are not what they were, in words.

    Flags of methods that an older version did not have are not compared; only main_distill.py has a --distiller.
    """
    now, before = recorded(args), completed(before)
    return ', '.join(f'--{k.replace("_", "-")} is {now.get(k)} here, {before.get(k)} there'
                     for k in sorted(keys or {*before, 'distiller'} - NEUTRAL) if now.get(k) != before.get(k))


def tell_seen(weights: str | Path, args):
    """Say so where the run that weights are from evaluated other images, or the same ones otherwise."""
    before = folder.arguments_beside(weights)
    if otherwise := before and differing(before, args, SEEN):
        distributed.say(f'note: {weights} is of a run that saw images otherwise: {otherwise}')


def refuse_other_arguments(saved: dict, origin: Path, own: bool, args):
    """End where a checkpoint was made with other arguments than this run may go on with.

    own: whether it is of the run's own folder, where none may change; with --resume most may, which is told and noted
    """
    differences = '' if args.evaluate else differing(saved['arguments'], args)
    if differences:
        before, now = kept(saved['arguments']), kept(vars(args))
        other = [name for name in now if now[name] != before[name]]
        if own:
            another_script = ('distiller' in saved['arguments']) != hasattr(args, 'distiller')
            what = f'of another script than {Path(sys.argv[0]).name}' if another_script else (
                f'with other arguments: {differences}')
            sys.exit(f'error: {origin.parent} holds a run {what}; choose another --output'
                     + f' (with --resume {origin}, to go on from there)' * (not other)
                     + ', or --overwrite to start anew')
        if other:
            sys.exit(f'error: --resume: {origin} has another --{other[0]}, which a run keeps: --student-resume, with '
                     'the last.pth beside it, starts from the weights alone')
        saved['progress'].setdefault('changed', []).append(f'epoch {saved["progress"]["epoch"]}: {differences}')
        print(f'note: {origin} was made with other arguments: {differences}', file=sys.stderr)
    if saved['arguments']['arch'] != args.arch:
        sys.exit(f'error: {origin} is a {saved["arguments"]["arch"]}, not a {args.arch}')


def kept(arguments: dict) -> dict:
    """What a checkpoint is of, and cannot be changed in the middle of a run."""
    return {'optimizer': arguments['optimizer'], 'distiller': arguments.get('distiller'),
            'no-bias-decay': arguments['no_bias_decay'], 'ema': arguments['ema'] > 0}


def scalars(record: dict):
    """(name, value) of what TensorBoard is to draw of an epoch."""
    for where in ('train', 'valid'):
        for name in ('loss', 'top1', 'top5'):
            yield f'{name}/{where}', record[where][name]
    for kind in ('losses', 'shares'):
        for name, value in record['train'].get(kind, {}).items():
            yield f'{kind}/{name}', value
    for name, rows in record['news'].items():
        for label, row in enumerate(rows):
            for key, value in row.items():
                if isinstance(value, float):
                    yield f'{name} {key}/{label}', value
    yield 'lr', record['lr']


@cache
def git_revision() -> str | None:
    """The commit that this process began at, with a + where the code is not that commit's."""
    def git(*command):
        return subprocess.run(['git', '-c', 'safe.directory=*', '-C', str(Path(__file__).parent), *command],
                              capture_output=True, text=True)
    try:
        revision = git('rev-parse', 'HEAD')
        changed = git('status', '--porcelain', '--untracked-files=no').stdout.strip()
        return revision.stdout.strip() + '+' * bool(changed) if revision.returncode == 0 else None
    except OSError:
        return None


def on_host(network) -> dict:
    """Weights as any machine loads them, which stay as they are while the network trains on."""
    return {k: v.to('cpu', copy=True).contiguous() for k, v in network.state_dict().items()}


def as_npz(arrays: dict) -> bytes:
    content = BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def as_json(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + '\n').encode()
