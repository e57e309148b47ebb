"""scripts/matching.py, scripts/visualize.py and its t-SNE."""
import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, in_process
from PIL import Image

sys.path.insert(0, str(ROOT / 'scripts'))

import matching
import visualize
from tsne import affinities, tsne

from models import create_model
from utils import checkpoint
from utils.views import STATISTICS

CIFAR = ['--dummy', '--dataset', 'cifar10', '-j', '0', '--no-accel', '-b', '16', '--seed', '1']


def is_picture(path):
    with Image.open(path) as image:
        return image.format == 'PNG' and np.asarray(image.convert('L')).std() > 5


# t-SNE

def clusters(n=30, k=4, d=16):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(k).repeat_interleave(n)
    return torch.randn(n * k, d, generator=generator) + 4 * torch.randn(k, d, generator=generator)[labels], labels


def test_tsne_keeps_clusters_apart_and_gives_the_same_every_time():
    x, labels = clusters()
    y = tsne(x, perplexity=15)
    nearest = torch.cdist(y, y).fill_diagonal_(math.inf).topk(10, largest=False).indices
    assert y.shape == (120, 2) and (labels[nearest] == labels[:, None]).float().mean() > 0.99
    spread = torch.stack([y[labels == c].std(0) for c in range(4)])
    assert spread.min() > 0.02 * y.std()  # clusters, not points
    one, same, other = (tsne(x, steps=50, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize('n', [2, 3, 7])
def test_tsne_of_a_few_points_some_of_them_equal(n):
    y = tsne(torch.ones(n, 5) * torch.arange(n).clamp(min=1)[:, None])
    assert y.shape == (n, 2) and y.isfinite().all()


def test_each_neighbourhood_has_the_perplexity():
    x, n, perplexity = clusters(n=5, k=3, d=4)[0].double(), 15, 4.0
    conditional = np.zeros((n, n))
    for i in range(n):
        d = [float(((x[i] - x[j]) ** 2).sum()) for j in range(n)]
        low, high = 1e-6, 1e3
        for _ in range(200):
            precision = math.sqrt(low * high)
            weights = [0 if j == i else math.exp(-d[j] * precision) for j in range(n)]
            p = [w / max(sum(weights), 1e-300) for w in weights]
            entropy = -sum(q * math.log2(q) for q in p if q > 0)
            low, high = (precision, high) if 2 ** entropy > perplexity else (low, precision)
        conditional[i] = p
    np.testing.assert_allclose(affinities(x, perplexity), (conditional + conditional.T) / (2 * n), atol=1e-6)


# visualize.py

def test_correlation_of_classes():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = logits[:, 1] * 2 - 1 + 0.1 * logits[:, 3]
    np.testing.assert_allclose(visualize.correlation(logits), np.corrcoef(logits.double().numpy(), rowvar=False),
                               atol=1e-9)
    logits[:, 0] = 1
    r = visualize.correlation(logits)
    assert r.isfinite().all() and not r[0].any() and r[1, 3] > 0.9


def test_correlated_classes_stand_together():
    block = torch.arange(12) % 3
    r = 0.8 * (block[:, None] == block) - 0.1 * ((block[:, None] - block).abs() == 2) + 0.2 * torch.eye(12)
    order = visualize.neighbours_together(r.double())
    blocks = block[order].tolist()
    assert blocks in (sorted(blocks), sorted(blocks, reverse=True)) and order[0] < order[-1]


def test_cam_is_the_classifier_at_every_pixel():
    generator = torch.Generator().manual_seed(0)
    weight, head = torch.randn(5, 7, generator=generator), torch.randn(3, 7, 2, 4, generator=generator)
    cams = visualize.cam(weight, head, torch.tensor([4, 0, 4]))
    for n, c in enumerate((4, 0, 4)):
        for h in range(2):
            for w in range(4):
                expected = max(sum(float(weight[c, d]) * float(head[n, d, h, w]) for d in range(7)), 0)
                assert cams[n, h, w].item() == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def visual(monkeypatch, capfd):
    return in_process(visualize, monkeypatch, capfd)


def test_pictures_of_two_networks(visual, tmp_path, monkeypatch):
    networks = [create_model(name, 10) for name in ('resnet8', 'wrn_16_1')]
    for network, name in zip(networks, 'st'):
        torch.save(network.state_dict(), tmp_path / f'{name}.pth')
    (tmp_path / 'args.json').write_text(json.dumps({'dataset': 'cifar10', 'image_size': 32, 'mean': [0.5] * 3}))
    seen = []
    monkeypatch.setattr(visualize, 'draw_cams', lambda s, draw=visualize.draw_cams: seen.append(s) or draw(s))
    done = visual(*CIFAR, '--dummy-images', 100, '--arch', 'resnet8', '--student-resume', tmp_path / 's.pth',
                  '--teacher-arch', 'wrn_16_1', '--teacher-resume', tmp_path / 't.pth', '--images', 3,
                  '--output', tmp_path / 'new' / 'pictures', quick=False)
    assert done.code == 0, done.err
    assert f'{tmp_path / "s.pth"} is of a run that saw images otherwise: --mean is None here' in done.out
    assert all(is_picture(done.folder / f'{name}.png') for name in ('tsne', 'correlation', 'cam'))

    seen, = seen
    mean, std = ([float(x) for x in row] for row in STATISTICS['cifar10'])
    images = torch.stack([(seen.images[:, c] / 255 - mean[c]) / std[c] for c in range(3)], 1)
    assert len(images) == 3 and len(seen.targets) == 25 and len(seen.placed) == 25
    with torch.no_grad():
        s, t = (network.eval()(images, features=True) for network in networks)
    for logits, pooled, f in zip(seen.logits, seen.pooled, (t, s)):
        torch.testing.assert_close(logits[seen.shown], f.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pooled[seen.shown], f.pooled, atol=1e-4, rtol=1e-4)
    guess = t.logits.argmax(1)
    expected = torch.stack([(networks[0].classifier.weight[c][:, None, None] * f).sum(0).relu()
                            for c, f in zip(guess, s.head)]).detach()
    torch.testing.assert_close(seen.cams[1], expected, atol=1e-4, rtol=1e-4)


def test_every_class_is_in_the_legend():
    torch.manual_seed(0)
    classes, targets = ['$5_to_$9', '_under', 'plain'], torch.arange(12) % 3
    seen = SimpleNamespace(classes=classes, targets=targets, placed=list(range(12)), names=('teacher', 'student'),
                           pooled=[torch.randn(12, 4)] * 2, logits=[torch.randn(12, 3)] * 2)
    with visualize.plt.rc_context(visualize.STYLE):
        figure = visualize.draw_tsne(seen)
        figure.canvas.draw()
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == classes


def test_pictures_of_networks_from_elsewhere(visual, tmp_path, monkeypatch):
    """Of a teacher that gets images of its own, too."""
    teacher, student = (create_model(f'torchvision:{name}', 10).eval() for name in ('resnet18', 'shufflenet_v2_x0_5'))
    for network, name in ((teacher, 't'), (student, 's')):
        torch.save(network.state_dict(), tmp_path / f'{name}.pth')
    seen = []
    monkeypatch.setattr(visualize, 'draw_cams', lambda s, draw=visualize.draw_cams: seen.append(s) or draw(s))
    done = visual(*CIFAR, '--dummy-images', 32, '--image-size', 64, '--images', 3, '--output', tmp_path / 'pictures',
                  '--teacher-arch', 'torchvision:resnet18', '--teacher-resume', tmp_path / 't.pth',
                  '--teacher-size', 96, '--teacher-mean', 0.5, 0.4, 0.3, '--teacher-stages', 'layer3,layer4',
                  '--arch', 'torchvision:shufflenet_v2_x0_5', '--student-resume', tmp_path / 's.pth', quick=False)
    assert done.code == 0, done.err
    assert all(is_picture(done.folder / f'{name}.png') for name in ('tsne', 'correlation', 'cam'))
    assert 'torchvision:resnet18: stages layer3 [256' in done.out

    seen, = seen
    std = torch.tensor(STATISTICS['cifar10'][1]).view(3, 1, 1)
    theirs = ((seen.images / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / std).float()
    theirs = torch.nn.functional.interpolate(theirs, (96, 96), mode='bilinear', antialias=True)
    own = (seen.images / 255 - torch.tensor(STATISTICS['cifar10'][0]).view(3, 1, 1)) / std
    heads = []
    for module in (teacher.layer4, student.conv5):
        module.register_forward_hook(lambda module, inputs, output: heads.append(output))
    with torch.no_grad():
        for logits, expected in zip(seen.logits, (teacher(theirs), student(own))):
            torch.testing.assert_close(logits[seen.shown], expected, atol=1e-3, rtol=1e-3)
        for cams, head, network in zip(seen.cams, heads, (teacher, student)):
            weight = network.fc.weight[seen.logits[0][seen.shown].argmax(1)]
            expected = (weight[:, :, None, None] * head).sum(1).relu()
            assert cams.shape == (3, *[3 if network is teacher else 2] * 2)
            torch.testing.assert_close(cams, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('arch, why', [
    ('torchvision:squeezenet1_0', 'its logits are not just what classifier.1'),
    ('mobilenet_v3_small', 'what it classifies is a map of one pixel')])
def test_networks_without_activation_maps_have_the_other_pictures(visual, tmp_path, arch, why):
    done = visual(*CIFAR, '--dummy-images', 16, '--arch', arch, '--teacher-arch', 'resnet8', '-o', tmp_path,
                  quick=False)
    assert done.code == 0, done.err
    assert f'note: no activation maps are drawn; Student {arch}: {why}' in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ['correlation.png', 'tsne.png']


def test_images_of_all_of_some_classes_are_placed():
    targets = torch.arange(2400) % 24
    placed = visualize.some_of_some_classes(targets)
    assert len(placed) == len(set(placed)) == 1000 and len(targets[placed].unique()) == 10
    assert visualize.some_of_some_classes(torch.tensor([7, 7, 3])) == [0, 1, 2]


@pytest.mark.parametrize('flags, complaint', [
    (['/nowhere'], "student's weights are missing"),
    ([*CIFAR, '--teacher-arch', 'squeezenet1_0', '--teacher-stages', 'x'], 'x is none of its modules; stages could be'),
    ([*CIFAR, '--arch', 'resnet8', '--student-resume', '{}/a.pth', '--teacher-arch', 'resnet8'],
     'is [3, 64] instead of [10, 64]'),
    ([*CIFAR, '--arch', 'resnet8', '--student-resume', '{}/b.pth', '--teacher-arch', 'resnet8'], 'does not exist'),
    ([*CIFAR, '--arch', 'resnet8', '--teacher-arch', 'resnet8', '--dummy-images', '4'], 'one validation image'),
    ([*CIFAR, '--arch', 'resnet8', '--teacher-arch', 'resnet8', '--dummy-images', '16', '-o', '{}/a.pth'],
     'cannot write to'),
    (['--dummy', '--arch', 'resnet8', '--seeds', '0', '1', '-o', '{}'], '--seeds: there is'),
])
def test_what_cannot_be_drawn_is_said_in_a_line(visual, tmp_path, flags, complaint):
    torch.save(create_model('resnet8', 3).state_dict(), tmp_path / 'a.pth')
    done = visual(*(flag.format(tmp_path) for flag in flags), quick=False)
    last = done.err.splitlines()[-1]
    assert done.code in (1, 2) and complaint in last and 'error: ' in last
    assert done.code == 2 or len(done.err.splitlines()) == 1


# matching.py

@pytest.fixture
def match(monkeypatch, capfd):
    run = in_process(matching, monkeypatch, capfd)
    return lambda *args: run(*args, quick=False)


@pytest.fixture
def run(once, distill, tmp_path_factory):
    """The folder of two epochs of MGD."""
    def train():
        folder = tmp_path_factory.mktemp('mgd')
        done = distill(*CIFAR, '--arch', 'resnet8', '--teacher-arch', 'resnet8x4', '--epochs', 2, '--pair-images', 4,
                       '--dummy-images', 16, '--distiller', 'mgd', '--lr', 0.01, '--skip-first-evaluation',
                       '--output', folder, quick=False)
        assert done.code == 0, done.err
        return folder
    return once('run', train)


def test_matching_of_a_run(match, run, tmp_path):
    done = match(run, '-o', tmp_path / 'a')
    assert (done.code, done.out) == (0, f'{tmp_path / "a.png"}\n') and is_picture(tmp_path / 'a.png')

    stages, progress = matching.read_stages(run)
    state = torch.load(run / 'checkpoint.pth', weights_only=True)['distillers']
    assert [tuple(flow.shape) for flow, _ in stages] == [(4, 16), (4, 32), (4, 64)]
    assert all(torch.equal(flow, state[f'mgd.stages.{i}.flow']) for i, (flow, _) in enumerate(stages))
    (first, before), (second, after) = matching.read_history(run, progress)
    assert (first, second) == (0, 1) and len(before) == len(after) == 3
    assert before[0]['changed'] is None and 0 <= after[0]['changed'] <= 1


def test_matching_of_a_run_in_its_first_epoch(match, run, tmp_path):
    content = torch.load(run / 'checkpoint.pth', weights_only=True)
    row = json.loads((run / 'log.jsonl').read_text().splitlines()[0])['news']['mgd'][0]
    content['distillers'] = {k: v for k, v in content['distillers'].items() if 'stages.0' in k}
    content['progress'] |= {'epoch': 0, 'news': {'mgd': [row]}}
    checkpoint.save(tmp_path / 'checkpoint.pth', content)
    assert matching.read_history(tmp_path, content['progress']) == [(0, [row])]
    done = match(tmp_path, '--output', tmp_path / 'a.png')
    assert done.code == 0 and is_picture(tmp_path / 'a.png')


def test_groups_of_neighbours_are_alike():
    ranks = torch.arange(600.0)
    assert matching.alike(ranks.view(200, 3).T) == pytest.approx(1, abs=1e-3)
    by_chance = [matching.alike(ranks[torch.randperm(600, generator=torch.Generator().manual_seed(i))].view(3, 200))
                 for i in range(50)]
    assert np.mean(by_chance) == pytest.approx(0, abs=0.03)


def test_a_run_without_matching_is_refused_in_a_line(match, run, tmp_path):
    for name, distillers, damage, complaint in (
            ('none', None, '', 'none has no checkpoint.pth'), ('kd', {}, '', 'is of a run without MGD'),
            ('half', {}, 'half', 'no valid checkpoint')):
        folder = tmp_path / name
        if distillers is not None:
            shutil.copytree(run, folder)
            (folder / 'checkpoint.previous.pth').unlink()
            checkpoint.save(folder / 'checkpoint.pth', {'format': 1, 'distillers': distillers, 'progress': {}})
            (folder / 'checkpoint.previous.pth').unlink()
        if damage:
            (folder / 'checkpoint.pth').write_bytes((folder / 'checkpoint.pth').read_bytes()[:100])
        done = match(folder, '-o', tmp_path / 'a.png')
        assert done.code in (1, 2) and complaint in done.err.splitlines()[-1] and 'Traceback' not in done.err
    done = match(run, '-o', tmp_path / 'nowhere' / 'a.png')
    assert done.code == 2 and len(done.err.splitlines()) == 1
