"""scripts/export.py: what it ships gives the student's logits without its training, and says what it is."""
import argparse
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, in_process
from PIL import Image

sys.path.insert(0, str(ROOT / 'scripts'))

import export
import model_card

from models import create_model
from utils.args import base_parser

FLAGS = ['--epochs', '1', '--lr', '0.01']
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
SEEN = ['--mean', *MEAN, '--std', *STD, '--val-resize-size', 40]


def needs(*packages):
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    return pytest.mark.skipif(bool(missing), reason=f'{", ".join(missing)} not installed')


@pytest.fixture
def ship(monkeypatch, capfd):
    run = in_process(export, monkeypatch, capfd)
    return lambda *args: run(*args, quick=False)


@pytest.fixture
def plain(once, base, images, tmp_path_factory):
    """A run of main_base.py, with averaged weights."""
    output = tmp_path_factory.getbasetemp() / 'plain'
    return once('plain', lambda: base(images, *FLAGS, *SEEN, '--arch', 'shufflenet_v2_x0_5', '--ema', '0.5',
                                      '--output', output)).folder


@pytest.fixture
def reused(once, distill, images, tmp_path_factory):
    """A student of SimKD."""
    output = tmp_path_factory.getbasetemp() / 'reused'
    return once('reused', lambda: distill(images, *FLAGS, *SEEN, '--arch', 'resnet8', '--teacher-arch', 'resnet14',
                                          '--teacher-resume', teacher(output.with_name('teacher.pth')),
                                          '--distiller', 'simkd', '--output', output)).folder


def teacher(path):
    torch.manual_seed(0)
    torch.save(create_model('resnet14', 3).state_dict(), path)
    return path


def folder_images(images, n=4):
    """Some validation images, prepared by hand: shorter side to 40, the middle 32 x 32, normalised."""
    mean, std = (torch.tensor(s, dtype=torch.float64).view(3, 1, 1) for s in (MEAN, STD))
    ready = []
    for path in sorted((images / 'valid').glob('*/*.jpg'))[:n]:
        with Image.open(path) as image:
            w, h = image.size
            image = image.resize((40 * w // h, 40), Image.Resampling.BILINEAR)
            left, top = round((image.width - 32) / 2), round((40 - 32) / 2)
            image = image.crop((left, top, left + 32, top + 32))
            pixels = torch.tensor(list(image.tobytes()), dtype=torch.float64).view(32, 32, 3).permute(2, 0, 1)
        ready.append(((pixels / 255 - mean) / std).float())
    return torch.stack(ready)


def lines_of(card):
    """The Python in a card, the first for the file itself."""
    return re.findall(r'```python\n(.*?)```', card.read_text(), re.DOTALL)


def follow(card, monkeypatch, number=0):
    """What a user has who does what the card says, up to the image."""
    monkeypatch.chdir(card.parent)
    scope = {'torch': torch, 'json': json}
    exec(lines_of(card)[number].split('prepare =')[0], scope)
    return scope


def test_the_card_loads_the_averaged_weights_into_torchvisions_network(plain, images, ship, monkeypatch, tmp_path):
    for source in (plain, plain / 'checkpoint.pth'):
        made = ship(source, '--format', 'torch', '-o', tmp_path / 'student.pth')
        assert made.code == 0 and 'validation images' in made.out, made.err
        saved = torch.load(tmp_path / 'student.pth', weights_only=True)
        assert saved['classes'] == ['ant', 'bee', 'cat'] and (saved['image_size'], saved['resize_size']) == (32, 40)
        assert saved['arch'] == 'shufflenet_v2_x0_5' and (saved['mean'], saved['std']) == (MEAN, STD)
        best = torch.load(plain / 'best.pth', weights_only=True)
        assert all(torch.equal(value, best[name]) for name, value in saved['model'].items())
        network = follow(tmp_path / 'student.pth.md', monkeypatch)['network']
        assert type(network).__module__.startswith('torchvision')
        ours = create_model('shufflenet_v2_x0_5', 3).eval()
        ours.load_state_dict(best)
        x = folder_images(images)
        torch.testing.assert_close(network(x), ours(x))


def test_the_card_prepares_images_as_an_evaluation_does(plain, images, ship, tmp_path):
    ship(plain, '--format', 'torch', '-o', tmp_path / 's.pth')
    lines, scope = lines_of(tmp_path / 's.pth.md')[0].split('prepare =')[1].split('with torch')[0], {}
    exec(f'import torch\nfrom torchvision.transforms import v2\nprepare ={lines}', scope)
    found = [scope['prepare'](Image.open(path)) for path in sorted((images / 'valid').glob('*/*.jpg'))[:4]]
    torch.testing.assert_close(torch.stack(found), folder_images(images))


def test_a_card_tells_where_the_weights_are_from(reused, ship, tmp_path):
    result = json.loads((reused / 'result.json').read_text())
    ship(reused / 'checkpoint.pth', '--format', 'torch', '-o', tmp_path / 'student.pth')
    assert result['teacher'] in (tmp_path / 'student.pth.md').read_text()
    made = ship(reused, '--format', 'torch', '-o', tmp_path / 'student.pth')
    card = (tmp_path / 'student.pth.md').read_text()
    for word in (result['teacher'], result['command'], 'simkd', 'weight 1.0', 'factor 2', '| seed | 3 |', 'epoch 0',
                 'started from random weights', f'{result["last"]["top1"]:.2f} %', result['versions']['torch'],
                 'licence'):
        assert word in card, word
    start = json.loads((reused / 'start.json').read_text())['scores']['teacher']
    assert f'{start["top1"]:.2f} % / {start["top5"]:.2f} %' in card
    assert made.code == 0 and 'batches of 8' in card


@pytest.mark.parametrize('kind', ['torch', 'pt2', pytest.param('safetensors', marks=needs('safetensors')),
                                  pytest.param('onnx', marks=needs('onnx', 'onnxscript', 'onnxruntime'))])
def test_a_student_that_predicts_through_its_method_is_shipped_with_it(kind, reused, images, ship, monkeypatch,
                                                                       tmp_path):
    file = tmp_path / f'student{export.SUFFIX[kind]}'
    made = ship(reused, '--format', kind, '-o', file)
    assert made.code == 0, made.err
    scope = follow(tmp_path / f'{file.name}.md', monkeypatch)
    x, best = folder_images(images, n=5), torch.load(reused / 'best.pth', weights_only=True)
    assert scope['classes'] == ['ant', 'bee', 'cat']

    # by hand: the student's last map, three convolutions with norms, and the teacher's classifier
    student = create_model('resnet8', 3).eval()
    student.load_state_dict({k[8:]: v for k, v in best.items() if k.startswith('student.')})
    f = student(x, features=True).head
    part = {k.split('projector.')[1]: v for k, v in best.items() if 'projector.' in k}
    for i, padding in ((0, 0), (3, 1), (6, 0)):
        f = torch.nn.functional.conv2d(f, part[f'{i}.weight'], part.get(f'{i}.bias'), padding=padding)
        scale = part[f'{i + 1}.weight'] / (part[f'{i + 1}.running_var'] + 1e-5).sqrt()
        f = (f - part[f'{i + 1}.running_mean'].view(-1, 1, 1)) * scale.view(-1, 1, 1)
        f = (f + part[f'{i + 1}.bias'].view(-1, 1, 1)).relu()
    head = torch.load(reused.with_name('teacher.pth'), weights_only=True)
    expected = f.mean((2, 3)) @ head['fc.weight'].T + head['fc.bias']
    for n in (1, 5):
        torch.testing.assert_close(scope['network'](x[:n]), expected[:n], rtol=1e-4, atol=1e-4)


def test_what_differs_is_not_kept(plain, ship, monkeypatch, tmp_path):
    write = export.write

    def wrong(kind, path, network, meta):
        network.fc.bias.data[1] += 0.01
        write(kind, path, network, meta)
        network.fc.bias.data[1] -= 0.01
    monkeypatch.setattr(export, 'write', wrong)
    (tmp_path / 'student.pth').write_text('an earlier one')
    made = ship(plain, '--format', 'torch', '-o', tmp_path / 'student.pth')
    assert made.code == 1 and 'another than the original' in made.err and made.err.count('\n') == 1
    assert [path.name for path in tmp_path.iterdir()] == ['student.pth']
    assert (tmp_path / 'student.pth').read_text() == 'an earlier one'


def test_eight_bits_have_their_score_beside_the_floats(plain, images, ship, monkeypatch, tmp_path):
    made = ship(plain, '--format', 'torch', '-o', tmp_path / 'student.pth', '--int8')
    assert made.code == 0, made.err
    card = tmp_path / 'student.pth.md'
    told = dict(re.findall(r'(float|int8): top-1 (\d+\.\d\d) %, top-5 .* of 15', made.out))
    assert told.keys() == {'float', 'int8'} and all(f'{k}: top-1 {v} %' in card.read_text() for k, v in told.items())
    assert f'{json.loads((plain / "result.json").read_text())["best"]["top1"]:.2f}' == told['float']
    small, large = follow(card, monkeypatch, number=1), follow(card, monkeypatch)
    x = folder_images(images, n=15)
    a, b = small['network'](x), large['network'](x)
    assert small['classes'] == large['classes'] and 0 < (a - b).abs().max() < 0.1 * b.abs().max()
    right = (a.argmax(1) == torch.arange(15) // 5).double().mean()
    assert abs(100 * right - float(told['int8'])) < 7  # rounding may tip one of 15
    assert (tmp_path / 'student.int8.pt').stat().st_size < (tmp_path / 'student.pth').stat().st_size


FIRST = """
from torch import nn

class First(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.classifier, self.stem = nn.Linear(8, num_classes), nn.Conv2d(3, 8, 3, 2)

    def forward(self, x):
        return self.classifier(self.stem(x).relu().mean((2, 3)))
"""


def test_a_network_of_ones_own_may_name_its_classifier_first(base, images, ship, tmp_path, monkeypatch):
    (tmp_path / 'my_first.py').write_text(FIRST)
    monkeypatch.syspath_prepend(tmp_path)
    run = base(images, *FLAGS, '--arch', 'my_first:First', '--output', tmp_path / 'run')
    assert run.code == 0 and ship(run.folder, '--format', 'torch').code == 0
    card = (run.folder / 'my_first-First.pth.md').read_text()
    assert 'torch and torchvision, and the module `my_first`.' in card


def test_without_its_data_it_is_checked_on_noise(plain, images, ship, tmp_path):
    away = tmp_path / 'away'
    shutil.copytree(plain, away)
    arguments = json.loads((plain / 'args.json').read_text()) | {'data': str(tmp_path / 'gone')}
    for name in ('args.json', 'result.json'):
        content = json.loads((away / name).read_text())
        (away / name).write_text(json.dumps(arguments if name == 'args.json' else content | {'arguments': arguments}))
    made = ship(away, '--format', 'torch')
    assert made.code == 0 and 'noise' in made.out and (away / 'shufflenet_v2_x0_5.pth.md').is_file()
    assert torch.load(away / 'shufflenet_v2_x0_5.pth', weights_only=True)['classes'] == ['ant', 'bee', 'cat']
    (away / 'predictions.npz').unlink()  # which had told the names
    assert 'no names' in ship(away, '--format', 'torch').out
    assert torch.load(away / 'shufflenet_v2_x0_5.pth', weights_only=True)['classes'][2] == 'output 2'
    made = ship(away, '--format', 'torch', '--images', images)
    assert made.code == 0 and 'noise' not in made.out
    made = ship(away, '--format', 'torch', '--int8')
    assert made.code == 1 and '--images DIR' in made.err and made.err.count('\n') == 1


def test_a_student_of_a_teacher_with_smaller_images_is_shipped_as_it_was_trained(distill, images, ship, tmp_path):
    """What SimKD pools to is told by both networks' maps, of the images that each of them sees."""
    run = distill(images, *FLAGS, '--arch', 'resnet8', '--image-size', 32, '--teacher-arch', 'resnet14',
                  '--teacher-size', 16, '--teacher-resume', teacher(tmp_path / 't.pth'), '--distiller', 'simkd',
                  '--output', tmp_path / 'run')
    args = export.find(run.folder / 'best.pth')
    shipped = export.shipped(argparse.Namespace(**args[3]['arguments']), 3)
    assert shipped.distillers['simkd'].size_t == [4, 4] and shipped.distillers['simkd'].size_s == [8, 8]
    assert ship(run.folder, '--format', 'torch').code == 0
    assert 'student.image_size, teacher.image_size = 32, 16\n' in (run.folder / 'resnet8.pth.md').read_text()


@pytest.mark.parametrize('name, made', [
    ('googlenet', 'torchvision.models.googlenet(num_classes=3, aux_logits=False, transform_input=True)'),
    ('mnasnet0_5', "create_model('mnasnet0_5', 3)")])
@pytest.mark.filterwarnings('ignore:The default weight initialization:FutureWarning')
def test_networks_that_bare_weights_do_not_tell_all_of(name, made, base, images, ship, tmp_path):
    run = base(images, *FLAGS, '--arch', name, '--image-size', 64, '--output', tmp_path / 'run')
    assert run.code == 0 and ship(run.folder, '--format', 'torch').code == 0
    assert f'network = {made}\n' in (run.folder / f'{name}.pth.md').read_text()


@pytest.mark.parametrize('flags, says', [
    ([], 'random weights'), (['--pretrained'], "torchvision's ImageNet weights"),
    (['--pretrained', '--student-resume', 'S.pth'], 'S.pth'),
    (['--arch', 'pkg:net', '--pretrained'], 'the weights that pkg:net returns'),
    (['--arch', 'pkg:net'], 'the weights that pkg:net returns')])
def test_where_weights_started(flags, says):
    args = base_parser('').parse_args(['DIR', *flags])
    args.distiller, args.image_size = [], 32
    record = {'arguments': {'dummy': True}, 'start': {}}
    told = model_card.facts(args, Path('best.pth'), record, torch.nn.Linear(1, 1), {'classes': []})
    assert told['weights'].endswith(f'started from {says}')


@pytest.mark.parametrize('what, says', [
    ('missing', 'does not exist'), ('torn', 'damaged'), ('peer', 'learned beside the student'),
    ('alone', 'no args.json'), ('other', 'holds no state_dict'),
    ('scalar', 'no classifier'), ('foreign', 'does not fit'), ('itself', 'it is what is exported'),
    ('log', 'a file of the run has this name'), ('nowhere', 'is no folder'),
    ('classes', 'has 2 classes, the network 3'), ('renamed', 'has a class bee where the run had ant'),
    ('card', 'Is a directory'),
    ('unreadable', 'not one image can be read')])
def test_wrong_inputs_end_in_one_line(what, says, plain, images, ship, tmp_path):
    for name in ('args.json', 'best.pth', 'result.json', 'predictions.npz'):
        shutil.copy(plain / name, tmp_path)
    best, args = tmp_path / 'best.pth', ['--format', 'torch']
    if what == 'missing':
        best.unlink()
    elif what == 'torn':
        best.write_bytes(best.read_bytes()[:5000])
    elif what == 'alone':
        (tmp_path / 'args.json').unlink()
        (tmp_path / 'result.json').unlink()
    elif what == 'peer':
        args = [best.replace(tmp_path / 'teacher.pth'), *args]
    elif what == 'nowhere':
        args += ['-o', tmp_path / 'no' / 'student.pth']
    elif what == 'itself':
        args += ['-o', best]
    elif what == 'log':
        args += ['-o', tmp_path / 'log.jsonl']
    elif what == 'classes':
        for split in ('train', 'valid'):
            shutil.copytree(images / split / 'ant', tmp_path / 'data' / split / 'ant')
            shutil.copytree(images / split / 'bee', tmp_path / 'data' / split / 'bee')
        args += ['--images', tmp_path / 'data']
    elif what == 'renamed':
        shutil.copytree(images, tmp_path / 'data')
        (tmp_path / 'data' / 'valid' / 'ant').rename(tmp_path / 'data' / 'valid' / 'yak')
        (tmp_path / 'data' / 'train' / 'ant').rename(tmp_path / 'data' / 'train' / 'yak')
        args += ['--images', tmp_path / 'data']
    elif what == 'card':
        (tmp_path / 'card.pth.md').mkdir()
        args += ['-o', tmp_path / 'card.pth']
    elif what == 'unreadable':
        shutil.copytree(images, tmp_path / 'data')
        for image in (tmp_path / 'data' / 'valid').rglob('*.*'):
            image.write_bytes(b'')
        args += ['--images', tmp_path / 'data']
    else:
        (tmp_path / 'predictions.npz').unlink()  # which tells the classes
        torch.save({'other': [1, 2], 'scalar': {'model': {'x': torch.zeros(())}},
                    'foreign': create_model('resnet8', 3).state_dict()}[what], best)
    made = ship(*([] if what == 'peer' else [tmp_path]), *args)
    assert made.code == 1 and says in made.err and made.err.count('\n') == 1, made.err
    assert not [path for path in tmp_path.glob('*.md') if path.is_file()] and not list(tmp_path.glob('unchecked*'))


def test_it_may_be_stopped(ship, plain, monkeypatch):
    def stopped(options):
        raise KeyboardInterrupt
    monkeypatch.setattr(export, 'export', stopped)
    assert ship(plain, '--format', 'torch').code == 75
