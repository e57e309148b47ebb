"""Every command of README.md and docs/ is run, on small images and for one epoch, and every link leads somewhere."""
import os
import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import main_base
import main_distill
from models import create_model
from utils import signals

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
SMALL = ['--image-size', '32', '--epochs', '1', '-b', '8', '-j', '0', '--no-accel', '--pair-images', '8']
NETWORKS = {'mobilenet_v1': 'resnet8', 'mobilenet_v2': 'resnet8', 'resnet50': 'resnet14',
            'timm:resnet50.a1_in1k': 'timm:resnet18'}
FOLDERS = ('/imagenet', '/cub', '/data', 'DIR')
WEIGHTS = ('--teacher-resume', '--student-resume')


def commands(page: Path):
    """(environment, words) of each line between ```bash and ```."""
    for block in re.findall(r'```bash\n(.*?)```', page.read_text(), re.DOTALL):
        for line in block.replace('\\\n', ' ').splitlines():
            if words := shlex.split(line, comments=True):
                named = next(i for i, word in enumerate(words) if '=' not in word)
                yield dict(word.split('=', 1) for word in words[:named]), words[named:]


class Reader:
    """Somebody who tries what a page says, in a folder of their own."""

    def __init__(self, folder, images, monkeypatch):
        self.folder, self.images, self.monkeypatch = folder, images, monkeypatch

    def weights(self, arch):
        path = self.folder / f'{arch}.pth'
        if not path.exists():
            torch.save(create_model(arch, 3).state_dict(), path)
        return str(path)

    def a_run(self):
        """The folder of one that has ended."""
        run = self.folder / 'a_run-0'
        if not run.exists():
            self.call('main_distill', [str(self.images), '--distiller', 'mgd', '--output', str(run), '--seed', '0',
                                       *self.networks(['--arch', 'mobilenet_v1'], 'resnet50'), *SMALL])
        return str(run)

    def networks(self, words, teacher=None):
        """Smaller ones; a teacher's weights from a file."""
        words = [NETWORKS.get(word, word) for word in words]
        if teacher and '--teacher-arch' not in words:
            words += ['--teacher-arch', NETWORKS[teacher]]
        large = next((arch for name, arch in (('my_nets:large', 'resnet18'), ('timm:resnet18', 'timm:resnet18'))
                      if name in words), 'resnet14')
        arch = {'--student-resume': 'resnet8', '--teacher-resume': large}
        for flag in WEIGHTS:
            if flag in words and not Path(words[words.index(flag) + 1]).exists():
                words[words.index(flag) + 1] = self.weights(arch[flag])
        if teacher and '--teacher-resume' not in words:
            words += ['--teacher-resume', self.weights(large)]
        return [word for word in words if word != '--pretrained']

    def call(self, name, words):
        """A script in this process."""
        script = {'main_base': main_base, 'main_distill': main_distill}.get(name)
        self.monkeypatch.setattr(sys, 'argv', [name, *words])
        signals._caught.clear()
        try:
            script.main() if script else runpy.run_path(str(ROOT / name), run_name='__main__')
        except SystemExit as stop:
            assert not stop.code, f'{name} {shlex.join(words)}: {stop.code}'

    def follow(self, environment, words):
        program, *words = words
        if program == 'torchrun':
            words = words[next(i for i, word in enumerate(words) if word.endswith('.py')):]
        if program in ('python', 'torchrun'):
            name, *words = words
            self.python(name, words)
        elif program == 'make':
            assert all(f'\n{word}:' in (ROOT / 'Makefile').read_text() for word in words if '=' not in word)
        elif program == 'pip':
            extras = re.search(r'\[(.*)\]', words[-1])
            assert all(re.search(rf'^{extra} = \[', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
                       for extra in extras.group(1).split(','))
        else:  # tests/test_recipes.py, test_cifar_tables.py and test_benchmarks.py start these
            assert program.startswith(('scripts/', 'benchmarks/')) and os.access(ROOT / program, os.X_OK), program

    def python(self, name, words):
        words = [str(self.images) if word in FOLDERS and not Path(word).exists() else
                 word.replace('/imagenet256', 'imagenet256') for word in words]
        if any(word.startswith('timm:') for word in words) and not find_spec('timm'):
            return
        words = [self.a_run() + word.removeprefix('runs/NAME').removeprefix('RUN')
                 if re.match(r'(RUN|runs/NAME)\b', word) else word for word in words]
        if name == 'scripts/report.py' and any('?' in word for word in words):
            words = [self.a_run(), *words[words.index('-o'):]]
        if name in ('main_base.py', 'main_distill.py'):
            distils = name == 'main_distill.py' and '--list-distillers' not in words
            if '/cifar' in words:
                at = words.index('--teacher-resume')
                words = ['--dummy', '--dummy-images', '16', *words[1:at], *words[at + 2:]]
            else:
                words = self.networks(words, 'resnet50' if distils else None)
            self.call(name[:-3], words + (SMALL if distils else SMALL[:-2]))
            return
        if name == 'scripts/make_images.py':
            words += ['--classes', '3', '--train', '8', '--valid', '2', '--size', '48']
        if name == 'scripts/compare.py':  # tests/test_report.py has it train
            if '--flags' in words:
                del words[words.index('--flags'):words.index('--flags') + 3]
            cut = words.index('--')
            words[cut:] = ['--methods', 'alone', '--seeds', '0', '--', *self.networks(words[cut + 1:]), *SMALL[:-2]]
        if name == 'scripts/export.py' and not all(map(find_spec, {'onnx': ['onnx', 'onnxscript'], 'safetensors': [
                'safetensors']}.get(words[words.index('--format') + 1], []))):
            return
        if name == 'scripts/visualize.py':
            words = [*self.networks(words), '--image-size', '32', '-j', '0']
        if name == 'scripts/summarize.py':  # there are no finished runs to collect: tests/test_cifar_tables.py has some
            words = []
        if name == '-m':
            name = words.pop(0).replace('.', '/') + '.py'
        if name.startswith('benchmarks/'):  # tests/test_benchmarks.py runs what they do
            assert (ROOT / name).exists(), name
            return
        self.monkeypatch.syspath_prepend(str(ROOT / 'scripts'))
        self.call(name, words)


@pytest.mark.parametrize('page', PAGES, ids=[page.stem for page in PAGES])
def test_commands(page, images, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my_nets.py').write_text('from torchvision.models import resnet18\n\nsmall = large = resnet18\n')
    reader = Reader(tmp_path, images, monkeypatch)
    for environment, words in commands(page):
        reader.follow(environment, words)


@pytest.mark.parametrize('page', PAGES, ids=[page.stem for page in PAGES])
def test_links(page):
    for target in re.findall(r'\]\(([^)#]+?)(?:#[^)]*)?\)', page.read_text()):
        assert target.startswith('https://') or (page.parent / target).exists(), target
