"""What the tests share: images, and three ways to run the scripts."""
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / 'tests' / 'programs'
sys.path.insert(0, str(ROOT))

import main_base  # noqa: E402
import main_distill  # noqa: E402
from models import create_model  # noqa: E402
from utils import engine, signals  # noqa: E402
from utils.args import base_parser, check  # noqa: E402

torch.set_num_threads(1)  # as in the subprocesses, so that results can be compared bit by bit

QUICK = ['--arch', 'resnet8', '--image-size', '32', '-b', '8', '--lr', '0.02', '--seed', '3', '-j', '0', '--no-accel']


def pytest_addoption(parser):
    parser.addoption('--at-once', action='store_true',
                     help='tell of a failure when it happens, not at the end alone, which a time limit may cut off')


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and item.config.getoption('at_once'):
        print(f'\n{report.nodeid}\n{report.longreprtext}', file=sys.__stderr__, flush=True)
    return report


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no worker is alone with one of them at the end."""
    slow = ('test_faults', 'test_runs', 'test_distill_runs', 'test_together', 'test_docs', 'test_report')
    items.sort(key=lambda item: slow.index(item.path.stem) if item.path.stem in slow else len(slow))


def write_images(folder: Path, per_class: int, seed: int, classes=('ant', 'bee', 'cat')):
    """Noise around a colour for every class."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.random.default_rng([seed, number, i]).normal(60 + 60 * number, 40, (40, 48, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f'{i}.jpg', quality=90)


@pytest.fixture(scope='session')
def images(tmp_path_factory) -> Path:
    """An image folder: 3 classes, 39 training and 15 validation images, so that nothing divides."""
    root = tmp_path_factory.mktemp('images')
    write_images(root / 'train', 13, seed=0)
    write_images(root / 'valid', 5, seed=1)
    return root


@pytest.fixture(scope='session')
def teacher(tmp_path_factory) -> list:
    """A resnet14 for CIFAR-10, as a flag."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save(create_model('resnet14', 10).state_dict(), path)
    return ['--teacher-resume', path]


class Outcome:
    """How a run ended. code, out, err; its folder's files on demand."""

    def __init__(self, code, out, err, output):
        self.code, self.out, self.err, self.folder = code, out, err, Path(output) if output else None

    def weights(self, name='last.pth'):
        return torch.load(self.folder / name, weights_only=True)

    def json(self, name='result.json'):
        return json.loads((self.folder / name).read_text())

    def log(self):
        return [json.loads(line) for line in (self.folder / 'log.jsonl').read_text().splitlines()]


def output_of(args):
    args = list(map(str, args))
    return args[args.index('--output') + 1] if '--output' in args else None


def arguments(*flags):
    """What main_base.py makes of its flags."""
    parser = base_parser('')
    return check(parser, parser.parse_args([*map(str, flags)]))


@pytest.fixture
def base(monkeypatch, capfd):
    """main_base.py in this process."""
    return in_process(main_base, monkeypatch, capfd)


@pytest.fixture
def distill(monkeypatch, capfd):
    """main_distill.py in this process."""
    return in_process(main_distill, monkeypatch, capfd)


def in_process(module, monkeypatch, capfd):
    def run(*args, quick=True) -> Outcome:
        args = [*(QUICK if quick else []), *map(str, args)]
        monkeypatch.setattr(sys, 'argv', [f'{module.__name__}.py', *args])
        signals._caught.clear()
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        out, err = capfd.readouterr()
        return Outcome(code, out, err, output_of(args))
    return run


@contextmanager
def at_call(number: int, act=lambda: signals._note(15), owner=engine, name='seed_everything'):
    """Do something, by default get SIGTERM, at this call of a function, counted from 1: that of each update's seed."""
    genuine, calls = getattr(owner, name), []

    def counted(*args):
        calls.append(args)
        if len(calls) == number:
            act()
        return genuine(*args)
    with patch.object(owner, name, counted):
        yield


def environment(**extra):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path, 'CUDA_VISIBLE_DEVICES': '',
            **{k: str(v) for k, v in extra.items()}}


def start(*command, stdout=subprocess.PIPE, **extra):
    """A process of its own, in a process group of its own."""
    return subprocess.Popen([*map(str, command)], stdout=stdout, stderr=subprocess.STDOUT, text=True,
                            env=environment(**extra), start_new_session=True)


def script(*args, program=ROOT / 'main_base.py', **extra) -> Outcome:
    """main_base.py, or a program around it, in a process of its own."""
    args = [*QUICK, *map(str, args)]
    process = start(sys.executable, program, *args, **extra)
    out, _ = process.communicate(timeout=240)
    return Outcome(process.returncode, out, out, output_of(args))


def torchrun_command(ranks, *options, launcher=('-m', 'torch.distributed.run')):
    return [sys.executable, *launcher, '--nproc-per-node', ranks,
            '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0', *options]


def forked_command(ranks, *options):
    return torchrun_command(ranks, *options, launcher=[PROGRAMS / 'forked.py'])


def assert_same(a: dict, b: dict):
    """Equal to the bit."""
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def assert_close(a: dict, b: dict, rtol=1e-4, atol=1e-6):
    """Equal up to rounding."""
    assert a.keys() == b.keys()
    for key in a:
        assert torch.allclose(a[key], b[key], rtol, atol), key


@pytest.fixture(scope='module')
def once():
    """Do an expensive thing once for all tests of a file: once(name, function)."""
    done = {}

    def get(name, function):
        if name not in done:
            done[name] = function()
        return done[name]
    return get
