"""Files that survive: written beside their target, synced, renamed; read with weights_only=True and never trusted.

checkpoint.pth is a plain dict:
    format     1
    model, optimizer, scaler, ema, ...    state dicts of what the run tracks (a frozen teacher is never among them)
    progress   epoch, sample (how much of the epoch's order is done), sums of its meters, its unreadable images and
               broken updates, best, last, the teacher's score, seconds, arguments that --resume has changed on the way,
               stints (on what code, versions and device, from which epoch on), news of methods in the epoch under way
    seed       all there is of randomness (randomness.py)
    arguments  of the command line, a dict
    facts      what else the run is tied to: hashes of its images' names, of the weights it starts from,
               and of the teacher's, with the images that it gets
    classes    of the data, in the order of the outputs
    world_size
best.pth and last.pth are bare state dicts that torchvision's constructors load.
"""
import argparse
import hashlib
import os
import pickle
import re
import shutil
import sys
import zipfile
import zlib
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.errors import line

from . import distributed
from .errors import one_line

FORMAT = 1
LAYOUTS = ('model', 'student', 'state_dict', 'model_state', 'model_state_dict', 'net')  # where files keep the weights
AVERAGED = ('ema', 'model_ema', 'state_dict_ema')  # and their average, which is what was scored


def write(path: Path, content):
    """Leave either the old file or the new one under this name, whatever happens in between."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as f:
            if isinstance(content, bytes):
                f.write(content)
            else:
                torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch turns some write errors into RuntimeError
        remove(temporary)
        sys.exit(f'error: cannot write {path}: {why(error, path)}; the files that were there are intact')


def append(path: Path, text: str):
    try:
        with open(path, 'a') as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        sys.exit(f'error: cannot write {path}: {why(error, path)}; the last checkpoint is intact')


def remove(path: Path):
    """If it is there, and as far as the disk lets us."""
    with suppress(OSError):
        path.unlink()


def why(error: Exception, path: Path) -> str:
    return line(error) + f' ({free(path)})' * (not isinstance(error, PermissionError))


def free(path: Path) -> str:
    """What a writer that fails, by whatever error, may be short of."""
    return f'{shutil.disk_usage(existing(path.parent)).free / 1e6:,.1f} MB are free there'


def existing(folder: Path) -> Path:
    """The nearest folder above, or itself, that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def places(path: Path) -> tuple[Path, Path, Path]:
    """Where a checkpoint may lie, the newest first."""
    return path.with_name(path.name + '.new'), path, path.with_name(f'{path.stem}.previous{path.suffix}')


def save(path: Path, content: dict):
    """Write a checkpoint and keep the one before it."""
    new, _, before = places(path)
    write(new, content)
    if path.exists():
        os.replace(path, before)
    os.replace(new, path)  # between these two renames the previous one is what a resume finds


def read(path: Path) -> dict:
    """A file's content; ValueError in one line where it is damaged, refused or no file at all."""
    if not path.is_file():
        raise ValueError(f'{path} is a folder; name a file in it' if path.is_dir() else f'{path} does not exist')
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load does not look at the checksums
                    raise ValueError(f'the checksum of {damaged} is wrong')
        with torch.serialization.safe_globals([argparse.Namespace]):  # of flags, beside the weights in many files
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        held = re.search(r'GLOBAL (\S+)', str(error))
        what = f'holds {held[1]}' if held else 'is damaged, or holds more than tensors and plain values'
        raise ValueError(f'{path} is refused: it {what}, and loading that could run code; save the bare state_dict '
                         'where you trust it') from None
    except PermissionError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}') from None
    except Exception as error:  # there is no end to what a broken file can raise
        raise ValueError(f'{path} is damaged or no checkpoint: {line(error).partition(". ")[0]}') from None


def newest(path: Path) -> tuple[dict | None, Path | None]:
    """The newest valid checkpoint of a run's folder, looking past damaged ones and saying so."""
    damaged = False
    for candidate in places(path):
        if candidate.exists():
            try:
                content = read(candidate)
                if not is_checkpoint(content):
                    raise ValueError(f'{candidate} is no checkpoint of these scripts')
                return content, candidate
            except ValueError as error:
                print(f'{error}; looking for an older one', file=sys.stderr)
                damaged = True
    if damaged:
        sys.exit(f'error: no valid checkpoint in {path.parent} (--overwrite starts anew)')
    return None, None


def is_checkpoint(content) -> bool:
    return isinstance(content, dict) and content.get('format') == FORMAT


def is_weights(content) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(v, torch.Tensor) for v in content.values())


def averaged_in(content) -> str:
    """The name of the averaged weights in a file's content; empty if there are none."""
    return next((key for key in AVERAGED if isinstance(content, dict) and is_weights(content.get(key))), '')


def weights_of(content, path, own=None) -> dict:
    """The student's or network's weights in any usual layout. own: the names of those that they are for, if known."""
    if averaged := averaged_in(content):
        content = content[averaged]
    for key in LAYOUTS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not is_weights(content):
        raise ValueError(f'{path} holds no state_dict, neither bare nor as one of {", ".join(LAYOUTS)}')
    if 'n_averaged' in content:  # AveragedModel's counter, beside its module
        content = {k.removeprefix('module.'): v for k, v in content.items() if k != 'n_averaged'}
    while True:  # without what wrappers, or a module that held the network, have put before all names
        head = next(iter(content)).partition('.')[0] + '.'
        foreign = head in ('module.', '_orig_mod.') if own is None else not own & content.keys()
        if not foreign or not all(key.startswith(head) for key in content):
            break
        content = {key.removeprefix(head): value for key, value in content.items()}
    if {'student', 'teacher'} <= {key.partition('.')[0] for key in content}:  # mdistiller's distillers hold both
        content = {key.removeprefix('student.'): value for key, value in content.items() if key.startswith('student.')}
    return content


def outputs_of(content, path: Path) -> int:
    """How many outputs a network with these weights has; where nothing tells, its classifier is what comes last."""
    if known := classes_of(content, path):
        return len(known)
    last = [*weights_of(content, path).values()][-1]
    if not last.ndim:
        raise ValueError(f'{path} ends in no classifier that would tell the number of classes')
    return len(last)


def fit(network: nn.Module, weights: dict, path, named: str = 'the network'):
    """Load weights that fit exactly, or say in one line which do not."""
    own = network.state_dict()
    missing, unknown = [k for k in own if k not in weights], [k for k in weights if k not in own]
    wrong = [f'{k} is missing' for k in missing[:2]] + [f'{k} is unknown' for k in unknown[:2]]
    wrong += [f'{k} is missing' for k in missing[2:]] + [f'{k} is unknown' for k in unknown[2:]]
    wrong += [f'{k} is {list(weights[k].shape)} instead of {list(own[k].shape)}'
              for k in own if k in weights and weights[k].shape != own[k].shape]
    wrong += [f'{k} has values that are not finite' for k in own if k in weights and not weights[k].isfinite().all()
              and not torch.equal(own[k].cpu(), weights[k].cpu())]  # a mask of -inf is as it was made
    if wrong:
        more = f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''
        last = [*own][-1]  # of the classifier
        if last in weights and own[last].ndim == weights[last].ndim == 1 and len(own[last]) != len(weights[last]):
            advice = f': --num-classes {len(weights[last])}' if len(weights[last]) > len(own[last]) else ''
            more += f' (it has {len(weights[last])} outputs{advice})'
        if through := sorted({key.split('.')[1] for key in weights if key.startswith('distillers.')}):
            more += f' (it predicts through its method: main_distill.py --distiller {" ".join(through)})'
        raise ValueError(f'{path} does not fit {named}: {", ".join(wrong[:4])}{more}')
    network.load_state_dict(weights)


def by_own_names(network: nn.Module, weights: dict) -> dict:
    """The weights by the network's names, where a published file has others and the network knows them.

    Files of PyTorch 0.4.0 and before have no norm's counter of batches; it starts at 0, as load_state_dict has it.
    """
    names = network.state_dict().keys()
    counters = {name: torch.tensor(0) for name in names if name.endswith('num_batches_tracked')}
    if not names - counters.keys() <= weights.keys():
        published_name = getattr(network, 'published_name', lambda name: name)
        own = {published_name(name): name for name in names}
        # pytorch/examples has DataParallel around these layers of AlexNet and VGG alone.
        bare = {name.replace('features.module.', 'features.'): value for name, value in weights.items()}
        renamed = {own.get(name, name): value for name, value in bare.items()}
        if len(renamed) != len(weights):  # two would become one
            return weights
        weights = renamed
    return weights if counters.keys() & weights.keys() else counters | weights


def fill(network: nn.Module, content: dict, path, named: str = 'the network'):
    """Load the weights in a file's content, or end the run in one line."""
    with one_line():
        weights = weights_of(content, path, network.state_dict().keys())
        fit(network, by_own_names(network, weights), path, named)


def load_weights(network: nn.Module, path, named: str = 'the network', classes: list[str] | None = None):
    """classes: of the data, in the order of the outputs; weights that are known to be of others are refused."""
    with one_line():
        content = read(Path(path))
    refuse_other_classes(content, Path(path), classes)
    if not is_checkpoint(content) and (averaged := averaged_in(content)):
        distributed.say(f'note: of {path} the averaged weights are taken, {averaged}')
    fill(network, content, path, named)


def refuse_other_classes(content, path: Path, classes: list[str] | None):
    theirs = classes_of(content, path)
    for i, pair in enumerate(zip_longest(theirs, classes) if theirs and classes else ()):
        if pair[0] != pair[1] and f'output {i}' not in pair:  # which stands for a name that nobody gave
            sys.exit(f'error: the classes of {path} are not those of the data: output {i} is {pair[0]} there and '
                     f'{pair[1]} here. Where only their names are others, or the outputs are of no matter, name bare '
                     'weights (best.pth, last.pth) in another folder')


def classes_of(content, path: Path) -> list[str] | None:
    """Of the data that the weights were trained on; those of a run's bare weights lie beside them."""
    if isinstance(content, dict) and isinstance(content.get('classes'), list):
        return content['classes']
    if path.name not in ('best.pth', 'last.pth', 'teacher.pth'):
        return None
    try:
        with np.load(path.with_name('predictions.npz')) as arrays:
            return arrays['classes'].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):  # not there, or damaged
        return None


def fingerprint(network: nn.Module | dict) -> str:
    """A hash of a network's, or a state_dict's, weights and statistics."""
    digest = hashlib.sha256()
    for name, value in (network if isinstance(network, dict) else network.state_dict()).items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
