"""scripts/report.py and compare.py, and what training records for them."""
import argparse
import json
import math
import os
import re
import signal
import sys
import threading
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same, in_process
from zoo import make_batch

sys.path.insert(0, str(ROOT / 'scripts'))

import compare
import report
from guesses import calibration, confusions, ece, per_class
from report_page import Page, likely
from svg import curves, powers
from ways import SEED_OR_TIME, collect

from utils import closely
from utils.closely import Closely
from utils.engine import evaluate
from utils.meters import Meter, percentages

CIFAR = ['--dummy', '--dataset', 'cifar10', '-j', '0', '--no-accel', '-b', '16', '--seed', '1']
TAUGHT = [*CIFAR, '--arch', 'resnet8', '--teacher-arch', 'resnet8x4', '--dummy-images', '32', '--lr', '0.01',
          '--pair-images', '8', '--skip-first-evaluation']


class Checked(HTMLParser):
    """Tags that open and close; what is fetched from elsewhere; the text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.fetched, self.text, self.rows = [], [], [], 0
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.open += [tag] * (tag not in ('meta', 'br'))
        self.fetched += [value for name, value in attrs if name in ('src', 'href', 'srcset', 'data', 'action')]
        self.rows += tag == 'tr'

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def made_run(folder, arch, seed, *correct, classes=4, epochs=None, guesses=True, method=None, **arguments):
    """What a run over 40 images leaves behind."""
    folder.mkdir()
    rng = np.random.default_rng([seed, len(correct)])
    scores = [{'epoch': e, 'top1': 2.5 * c, 'correct1': c, 'loss': 1.5, 'n': 40} for e, c in enumerate(correct)]
    record = {'loss': 1.0, 'top1': 1.0, 'losses': {'ce': 0.5} | ({method: 0.5} if method else {}),
              'time': {'seconds': 0.1, 'wait': 0.01}, 'update': {'student': 0.02, 'losses': 0.01, 'backward': 0.03}}
    if method:
        record['balance'] = {'labels': 1.0, 'distillation': 2.0, 'cosine': 0.3}
    (folder / 'log.jsonl').write_text(''.join(
        json.dumps({'epoch': s['epoch'], 'lr': 0.1, 'train': record, 'valid': s, 'seconds': 1}) + '\n' for s in scores))
    arguments = {'arch': arch, 'seed': seed, 'output': str(folder), 'lr': 0.1, 'epochs': epochs or len(correct),
                 'warmup': False, 'data': 'images', 'dataset': 'imagefolder', 'dummy': False} | arguments
    if method:
        arguments |= {'distiller': [method], 'teacher_arch': 'big'}
    (folder / 'args.json').write_text(json.dumps(arguments))
    (folder / 'result.json').write_text(json.dumps({
        'finished': len(correct) == arguments['epochs'], 'last': scores[-1],
        'best': max(scores, key=lambda s: s['correct1']), 'seconds': 10 + 4 * seed, 'seed': seed,
        'command': f'main_base.py --arch "<{arch}>"', 'arguments': arguments}))
    if guesses:
        target = np.arange(40) % classes
        told = np.stack([np.where(rng.random(40) < 0.6, target, rng.integers(0, classes, 40)), rng.random(40)])
        np.savez(folder / 'predictions.npz', target=target, student=told.astype(np.float32),
                 classes=[f'class <{c}>' for c in range(classes)])
    return folder


@pytest.fixture
def tell(monkeypatch, capfd):
    run = in_process(report, monkeypatch, capfd)
    return lambda *args: run(*args, quick=False)


def test_what_pulls_for_the_labels_is_told_by_its_name():
    """Not by its first letters, which a method's loss may have as well."""
    student = torch.nn.Linear(2, 1, bias=False)
    args = argparse.Namespace(cuda_graph=False, compile=False, amp='off')
    look = Closely(student, 1, torch.device('cpu'), args)
    look.begin(look.every // 2)
    look.at_losses({'ce': student.weight.square().sum(), 'center': 3 * student.weight.sum()}, 1.0)
    assert_same({'labels': look.by_labels}, {'labels': 2 * student.weight.detach().flatten()})


@pytest.mark.parametrize('name, way', [
    ('kd-0', 'kd'), ('mgd+kd-12', 'mgd+kd'), ('wrn_40_2', 'wrn_40_2'), ('base-resnet8-3', 'base-resnet8'),
    ('distill-cub-resnet8-kd-20261128-101010', 'distill-cub-resnet8-kd'),
    ('distill-cub-resnet8-kd-20261128-101010-2', 'distill-cub-resnet8-kd')])
def test_names_of_one_way_differ_in_seed_or_time(name, way):
    assert re.sub(SEED_OR_TIME, '', name) == way


def test_the_table_is_of_last_epochs_over_seeds(tell, tmp_path):
    runs = [made_run(tmp_path / name, 'net', *numbers) for name, *numbers in (
        ('alone-0', 0, 2, 8, 4), ('alone-1', 1, 2, 3, 6), ('kd-0', 0, 4, 8, 12))]
    teacher = made_run(tmp_path / 'teacher', 'big', 5, 30, 32)
    done = tell(*runs, '--teacher', teacher, '-o', tmp_path / 'a.html', '--curves', tmp_path / 'a.png')
    assert done.code == 0, done.err
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in done.out.splitlines()[2:]]
    assert rows == [['teacher', 'big', '80.00', '1', '80.00', '30'],
                    ['alone', 'net', '12.50 ± 3.54', '2', '17.50 ± 3.54', '12'],  # 10 and 15: (15 - 10) / sqrt(2)
                    ['kd', 'net', '30.00', '1', '30.00', '10']]
    assert (tmp_path / 'a.png').read_bytes()[:4] == b'\x89PNG'


def test_only_runs_that_differ_in_the_seed_are_averaged(tell, tmp_path):
    first = made_run(tmp_path / 'kd-0', 'net', 0, 2)
    for name, seed, arguments, complaint in (
            ('kd-1', 1, {'lr': 0.2}, 'differ in lr'), ('kd-2', 0, {}, 'same seed'),
            ('kd-3', 3, {'flip': 0}, 'differ in flip'),  # of which the first, an older one, knows nothing
            ('mgd-0', 0, {'data': 'others'}, 'different data: they differ in data'),
            ('sp-0', 0, {'classes': 5}, 'the classes of the validation images')):
        other = made_run(tmp_path / name, 'net', seed, 3, **arguments)
        refused = tell(first, other, '-o', tmp_path / 'a.html')
        assert refused.code == 2 and complaint in refused.err and len(refused.err.splitlines()) == 1
    for name in ('kd-0', 'mgd-0'):
        result = json.loads((tmp_path / name / 'result.json').read_text())
        (tmp_path / name / 'result.json').write_text(json.dumps(result | {'images': '9 + 40 images abc'}))
    assert tell(first, tmp_path / 'mgd-0', '-o', tmp_path / 'b.html').code == 0  # a copy of the same
    elsewhere = made_run(tmp_path / 'teacher', 'big', 5, 30, data='others')
    taught = made_run(tmp_path / 'dkd-0', 'net', 0, 3, method='dkd', teacher_resume=str(elsewhere / 'last.pth'))
    assert 'different data' in tell(taught, '--teacher', elsewhere, '-o', tmp_path / 'a.html').err
    assert tell(taught, '-o', tmp_path / 'b.html').code == 0  # nobody asked for it
    (first / 'log.jsonl').unlink()
    (first / 'log.jsonl').mkdir()
    assert 'log.jsonl: Is a directory' in tell(first, '-o', tmp_path / 'a.html').err
    for no_run in (tmp_path / 'nowhere', tmp_path):
        assert 'is not the folder' in tell(no_run).err and not (tmp_path / 'a.html').exists()


def test_the_page_of_finished_runs_stands_alone(tell, tmp_path):
    teacher = made_run(tmp_path / 'teacher', 'big', 5, 30, 32)
    runs = [made_run(tmp_path / f'alone-{seed}', 'net', seed, 2, 4 + seed) for seed in range(2)]
    runs += [made_run(tmp_path / f'{name}-{seed}', 'net', seed, 8, 12 + seed, method=name, classes=4,
                      teacher_resume=str(teacher / 'last.pth')) for name in ('kd', 'mgd') for seed in range(2)]
    done = tell(*runs, '-o', tmp_path / 'a.html')
    assert done.code == 0 and done.out.splitlines()[2].startswith('| teacher')  # found beside its weights
    html = (tmp_path / 'a.html').read_text()
    page = Checked(html)
    assert not page.fetched and 'url(' not in html and '@import' not in html and 'refresh' not in html
    assert set(re.findall(r'https?://[^\s"\'<]+', html)) == {'http://www.w3.org/2000/svg'}  # a name, not fetched
    text = ' '.join(page.text)
    assert '31.25 ± 1.77' in text and '+20.00' in text and '29 %' in text  # 20 of 68.75 points
    assert text.count('not recorded yet') == 3  # both charts and the matrices of MGD
    assert html.count('class="line"') >= 10 and 'class <3>' in text and text.count('# seeds: 0, 1') == 3


def guess(folder, file, **right):
    """Each network's share of 40 images that it tells right, from the first on; elsewhere it says the next class."""
    target = np.arange(40) % 4
    np.savez(folder / file, target=target, classes=['a', 'b', 'c', 'd'], **{
        name: np.stack([np.where(np.arange(40) < share * 40, target, (target + 1) % 4), np.full(40, 0.5)])
        for name, share in right.items()})


def test_the_teacher_is_the_network_that_taught(tmp_path):
    """As it was then: by its best weights, while its run tells of the last; and each way has its own."""
    teacher = made_run(tmp_path / 'teacher', 'big', 5, 36, 4)
    guess(teacher, 'predictions.npz', student=0.1)
    alone = made_run(tmp_path / 'alone-0', 'net', 0, 4)
    kd, dml, late = (made_run(tmp_path / f'{name}-0', 'net', 0, 20, method=name, teacher_resume=str(teacher / file))
                     for name, file in (('kd', 'best.pth'), ('dml', 'none.pth'), ('sp', 'last.pth')))
    for folder, file, shares in ((kd, 'start.npz', {'teacher': 0.9, 'student': 0.2}), (kd, 'predictions.npz', {
            'student': 0.9}), (late, 'predictions.npz', {'student': 0.1}), (dml, 'predictions.npz', {
            'student': 0.5, 'teacher': 0.5}), (alone, 'predictions.npz', {'student': 0.4}),
            (dml, 'start.npz', {'teacher': 0.0, 'student': 0.2})):  # before either has learned
        guess(folder, file, **shares)
    result = json.loads((kd / 'result.json').read_text())
    (kd / 'result.json').write_text(json.dumps(result | {'teacher_score': {'correct1': 36, 'n': 40}}))
    result = json.loads((dml / 'result.json').read_text())
    result['last']['teacher'] = {'correct1': 20, 'n': 40}
    (dml / 'result.json').write_text(json.dumps(result | {'teacher_score': {'correct1': 0, 'n': 40}}))
    page = Page(*collect([alone, dml, kd, late], []))
    ways = {way.name: way for way in page.ways}
    assert [page.agreement(ways[name]) for name in ('kd', 'dml', 'sp')] == [100] * 3
    assert page.agreement(ways['alone']) == 90  # of the first that taught, DML's: from 40 to 50 % they differ
    assert page.gap(ways['kd']) == 80 and page.gap(ways['sp']) == 0  # 90 and 10 % over 10 %
    assert page.gap(ways['dml']) == 40
    assert [way.name for way in page.teacher] == ['teacher']


def test_curves_of_an_update_tell_what_was_measured(tmp_path, monkeypatch):
    """Labels that count nothing have no angle; stages are numbered as in the pictures of who learns from whom."""
    kd, silent, mgd = (made_run(tmp_path / f'{name}-0', 'net', 0, 20, 22, method=name)
                       for name in ('kd', 'simkd', 'mgd'))
    rows = [{'stage': stage, 'cost': 1.0, 'changed': 0.5} for stage in (1, 2)]  # the student's first has no partner
    for folder, change in ((silent, {'train': {'balance': {'labels': 0.0, 'distillation': 2.0, 'cosine': 0.0}}}),
                           (mgd, {'news': {'mgd': rows}})):
        log = folder / 'log.jsonl'
        records = [json.loads(line) for line in log.read_text().splitlines()]
        records = [record | {key: record.get(key, {}) | value for key, value in change.items()} for record in records]
        log.write_text(''.join(json.dumps(record) + '\n' for record in records))
    drawn = []
    monkeypatch.setattr('report_page.curves', lambda title, lines, **_: drawn.extend(lines) or curves(title, lines))
    page = Page(*collect([kd, silent, mgd], []))
    assert page.pull() and page.matching() and page.ways[0].runs[0].curve('valid', 'top1') == [(0, 50.0), (1, 55.0)]
    assert {epoch for line in drawn for run in line['runs'] for epoch, _ in run} == {0, 1}  # as the log counts
    assert 'kd' in page.pull().replace('simkd', '') and 'simkd' not in page.pull()
    assert 'stage 1 of 2' in page.matching() and 'stage 2 of 2' in page.matching() and 'stage 3' not in page.matching()


def test_a_teacher_among_the_runs_is_not_the_student_alone(tmp_path):
    teacher = made_run(tmp_path / 'a-teacher', 'big', 5, 36)
    alone, kd = made_run(tmp_path / 'b-alone-0', 'net', 0, 4), made_run(
        tmp_path / 'kd-0', 'net', 0, 20, method='kd', teacher_resume=str(teacher / 'best.pth'))
    page = Page(*collect([teacher, alone, kd], []))
    assert [way.name for way in page.teacher] == ['a-teacher'] and page.alone.name == 'b-alone'
    other = made_run(tmp_path / 'another-0', 'other', 0, 4)
    assert Page(*collect([other, alone, kd], [])).alone.name == 'b-alone'


def test_a_teacher_that_is_the_student_alone_stays_so(tmp_path):
    """As in a network that teaches itself."""
    alone = [made_run(tmp_path / f'alone-{seed}', 'net', seed, 4) for seed in range(2)]
    kd = made_run(tmp_path / 'kd-0', 'net', 0, 20, method='kd', teacher_resume=str(alone[0] / 'last.pth'))
    page = Page(*collect([*alone, kd], []))
    assert page.alone.name == 'alone' and len(page.alone.runs) == 2 and len(page.teacher) == 1


def test_a_listed_teacher_of_other_data_is_refused(tell, tmp_path):
    teacher = made_run(tmp_path / 'teacher', 'big', 5, 36, data='others')
    kd = made_run(tmp_path / 'kd-0', 'net', 0, 20, method='kd', teacher_resume=str(teacher / 'last.pth'))
    assert 'different data' in tell(teacher, kd, '-o', tmp_path / 'a.html').err


def test_runs_that_ended_early_do_not_count_beside_finished_ones(tmp_path):
    runs = [made_run(tmp_path / f'kd-{seed}', 'net', seed, *[20] * n, epochs=2, method='kd')
            for seed, n in enumerate((2, 1))]
    for run, share in zip(runs, (1.0, 0.0)):
        guess(run, 'predictions.npz', student=share)
    (way,), _ = collect(runs, [])
    assert len(way.finished) == 1 and way.mean_of(per_class).tolist() == [100] * 4
    (way,), _ = collect(runs[1:], [])
    assert way.mean_of(per_class).tolist() == [0] * 4


def test_other_training_images_are_other_data(tell, tmp_path):
    runs = [made_run(tmp_path / name, 'net', seed, 3) for name, seed in (('kd-0', 0), ('kd-1', 1), ('sp-0', 0))]
    for run, images in zip(runs, ('100 + 40 images a', '90 + 40 images b', '90 + 40 images b')):
        result = json.loads((run / 'result.json').read_text())
        (run / 'result.json').write_text(json.dumps(result | {'images': images}))
    assert 'differ in images' in tell(*runs[:2], '-o', tmp_path / 'a.html').err
    assert 'different data: they differ in the images' in tell(runs[0], runs[2], '-o', tmp_path / 'a.html').err


@pytest.mark.parametrize('n', [2, 3, 5, 9, 30])
def test_what_chance_makes_likely_is_welchs(n):
    rng = np.random.default_rng(n)
    for _ in range(20):
        one, other = rng.normal(1.5, 1, n), rng.normal(0, 3, n)
        parts = [x.var(ddof=1) / n for x in (one, other)]
        freedom = math.floor(sum(parts) ** 2 / sum(part ** 2 / (n - 1) for part in parts))  # not told apart too soon
        error, largest = likely(one.tolist(), other.tolist())
        assert error == pytest.approx(math.sqrt(sum(parts)))
        assert inside(largest / error, freedom) == pytest.approx(0.95, abs=1e-3)
    assert likely([1.0, 1.0], [2.0, 2.0]) == (0, 0)


def inside(quantile, freedom):
    """How much of Student's t lies no further out: its density, added up."""
    x = (np.arange(20000) + 0.5) / 20000 * quantile
    height = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    return 2 * height * ((1 + x ** 2 / freedom) ** (-(freedom + 1) / 2)).mean() * quantile


def test_a_short_axis_has_numbers_too():
    assert powers(0.8, 60) == [1, 2, 5, 10, 20, 50]
    assert powers(2.1, 4.9) == [3, 4] and len(powers(6.65, 7.6)) > 3


def test_the_page_while_runs_go_on(tell, tmp_path):
    """A run with nothing in its folder, one in its second epoch with torn lines, one that has just begun."""
    going = made_run(tmp_path / 'kd-0', 'net', 0, 3, epochs=4, method='kd', guesses=False)
    (going / 'log.jsonl').write_text('{"epo\n' + (going / 'log.jsonl').read_text() + '{"epoch": 1, "lr"')
    (going / 'predictions.npz').write_bytes(b'PK half')
    (tmp_path / 'kd-1').mkdir()
    begun = made_run(tmp_path / 'alone-0', 'net', 0, 2, guesses=False)
    for name in ('log.jsonl', 'result.json'):
        (begun / name).unlink()
    done = tell(begun, going, tmp_path / 'kd-1', '-o', tmp_path / 'a.html')
    assert done.code == 0 and '0 of 2' in done.out
    html = (tmp_path / 'a.html').read_text()
    text = ' '.join(Checked(html).text)
    assert 'http-equiv="refresh" content="30"' in html and 'not recorded yet' in text
    assert re.search(r'kd-0: not finished, 1 of 4 epochs, the last at \d\d:\d\d, ', text)
    assert 'alone-0: not finished, 0 of 1 epochs' in text and 'kd-1: nothing recorded yet' in text
    assert not (tmp_path / 'a.html.tmp').exists()
    (tmp_path / 'empty').mkdir()
    assert tell(tmp_path / 'empty', '-o', tmp_path / 'b.html').code == 0
    Checked((tmp_path / 'b.html').read_text())


def test_of_many_classes_the_largest_gains_and_losses_are_shown(tmp_path):
    alone = made_run(tmp_path / 'alone-0', 'net', 0, 2, guesses=False)
    kd = made_run(tmp_path / 'kd-0', 'net', 0, 3, method='kd', guesses=False)
    target, right = np.arange(1000), np.arange(1000) % 2
    for folder, guess in ((alone, np.where(right, target, 0)), (kd, np.where(target < 990, target, 0))):
        np.savez(folder / 'predictions.npz', classes=target.astype(str), target=target,
                 student=np.stack([guess, np.full(1000, 0.5)]))
    page = Page(*collect([alone, kd], []))
    table = Checked(page.classes())
    assert table.rows == 21 and '-100.0' in table.text and '+100.0' in table.text
    assert table.text.count('-100.0') == 5  # of classes 991, 993, ..., 999


def test_numbers_from_guesses_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    told = {'target': rng.integers(0, 5, 300),
            'student': np.stack([rng.integers(0, 6, 300), rng.choice(31, 300) / 30]).astype(np.float32)}
    guesses, sure = told['student'][0].astype(int).tolist(), told['student'][1].tolist()
    images = list(zip(told['target'].tolist(), guesses, sure))
    for c, value in enumerate(per_class(told)):
        own = [guess == c for target, guess, _ in images if target == c]
        assert value == pytest.approx(100 * sum(own) / len(own))
    error = 0
    for i in range(15):
        inside = [(s, t == g) for t, g, s in images if i / 15 < s <= (i + 1) / 15 or (i == 0 and s == 0)]
        error += abs(sum(s for s, _ in inside) - sum(hit for _, hit in inside)) / 300
    assert ece(calibration(told)) == pytest.approx(error, abs=0.01)  # edges in float32
    known = rng.random(300) < 0.5
    counts = {}
    for (target, guess, _), sees in zip(images, known):
        if sees and target != guess:
            counts[target, guess] = counts.get((target, guess), 0) + 1
    assert confusions(told, 'student', known) == counts


def test_gpus_are_counted_among_those_that_can_be_seen(monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert [compare.named(gpu) for gpu in ('1', 'GPU-a')] == ['1', 'GPU-a']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5')
    assert [compare.named(gpu) for gpu in ('0', '1', '2', 'GPU-a')] == ['4', '5', '2', 'GPU-a']


# What training records

def test_predictions_are_each_image_once(monkeypatch):
    class Source:
        classes, targets = ['a', 'b', 'c'], [0, 1, 2, 0, 1, 2, 0]

    class Loader(list):
        pass

    class Batch:
        def __init__(self, index):
            self.index, self.bad = torch.tensor(index), torch.full((len(index),), -1)
            self.images, self.target = images[self.index], torch.tensor(Source.targets)[self.index]

    class Turned(torch.nn.Module):
        def forward(self, x):
            return torch.where(x[:, :1] > 0, x, -x)

    images = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    loader = Loader([Batch([4, 0, 6]), Batch([2, 1, 3, 5])])
    loader.dataset = type('Images', (), {'source': Source, '__len__': lambda self: 7})()
    scores = evaluate({'student': torch.nn.Identity(), 'teacher': Turned()}, loader, lambda batch: batch,
                      torch.device('cpu'), type('Args', (), {'amp': 'off', 'compile': False}))
    assert scores['agreement'] == pytest.approx(100 * (images[:, 0] > 0).double().mean().item())
    assert 0 < scores['agreement'] < 100
    guess, sure = scores['predictions']['student']
    for i, row in enumerate(images.tolist()):
        powers = [math.exp(x) for x in row]
        assert guess[i] == row.index(max(row)) and sure[i] == pytest.approx(max(powers) / sum(powers), rel=1e-5)
    assert scores['student']['correct1'] == sum(int(g) == t for g, t in zip(guess, Source.targets))
    loss = sum(math.log(sum(map(math.exp, row))) - row[t] for row, t in zip(images.tolist(), Source.targets)) / 7
    assert scores['student']['loss'] == pytest.approx(loss, rel=1e-13)  # in float64, whatever the batches


def test_balance_is_of_the_gradients_of_the_whole_update():
    generator = torch.Generator().manual_seed(0)
    layer, meter = torch.nn.Linear(3, 2), Meter({})
    look = Closely(layer, 1, torch.device('cpu'), argparse.Namespace(amp='off', compile=False, cuda_graph=False))
    batches = [torch.randn(4, 3, generator=generator) for _ in range(2)]
    look.begin(1)
    for x in batches:
        with closely.timed('forward'):
            y = layer(x)
        losses = {'ce': (y[:, 0] ** 2).mean(), 'kd': (y ** 2).mean(), 'sp': y[:, 1].mean()}
        look.at_losses(losses, 0.5)
        (0.5 * sum(losses.values())).backward()
    look.end(meter)
    layer, x = layer.double(), torch.cat(batches).double()  # the mean over batches is that over their samples
    y = layer(x)
    labels, others = (torch.cat([g.flatten() for g in torch.autograd.grad(loss, layer.parameters(), retain_graph=True)])
                      for loss in ((y[:, 0] ** 2).mean(), (y ** 2).mean() + y[:, 1].mean()))
    expected = [labels.norm(), others.norm(), labels @ others / labels.norm() / others.norm()]
    assert meter.balances[0][1].tolist() == pytest.approx([v.item() for v in expected], rel=1e-5)
    assert meter.sums['update/n'] == 1 and meter.sums['update/losses'] > 0


def test_looking_changes_no_bit(distill, tmp_path, monkeypatch):
    def train(name, *flags):
        run = distill(*TAUGHT, *flags, '--epochs', 1, '--output', tmp_path / name, quick=False)
        assert run.code == 0, run.err
        return run
    for name, flags in (('mgd', ['--distiller', 'mgd', 'mrkd', 'crd', '--optimizer', 'dot']),
                        ('amp', ['--distiller', 'srd', '--amp', 'bf16', '--accum-steps', 2, '--clip-grad', 1])):
        monkeypatch.setattr(closely, 'LOOKS', 1000)
        monkeypatch.setattr(closely, 'APART', 1)  # every update is looked at
        looked = train(f'{name}-0', *flags)
        monkeypatch.setattr(Closely, 'begin', lambda *_: None)
        monkeypatch.setattr(Closely, 'at_losses', lambda *_: None)
        monkeypatch.setattr(Closely, 'end', lambda *_: None)
        blind = train(f'{name}-1', *flags)
        monkeypatch.undo()
        one, other = looked.log()[0]['train'], blind.log()[0]['train']
        assert one['balance']['distillation'] > 0 and abs(one['balance']['cosine']) <= 1 and 'balance' not in other
        assert one['update'].keys() == {'teacher', 'student', 'losses', 'backward'}
        assert 0 <= one['time']['wait'] < one['time']['seconds']
        assert_same(looked.weights(), blind.weights())
        told = np.load(looked.folder / 'predictions.npz')
        assert (told['student'][0] == told['target']).sum() == looked.log()[0]['valid']['correct1']


def test_sums_of_what_was_looked_at_survive_a_resume():
    before = {'n': 4.0, 'loss': 2.0, 'balance/n': 1.0, 'balance/labels': 3.0, 'time/n': 2.0, 'time/seconds': 5.0}
    meter = Meter(before)
    meter.add(make_batch(4), ['top1', 'top5', 'loss', 'loss/ce'], torch.ones(4))
    meter.add_norm(torch.ones(()))
    meter.read(watch_norms=True)
    meter.clock(1.0, 0.5)
    sums = meter.everybody()
    assert sums['n'] == 8 and sums['balance/labels'] == 3 and sums['time/n'] == 3 and sums['time/seconds'] == 6
    assert percentages(sums)['balance'] == {'labels': 3.0} and percentages(sums)['time']['seconds'] == 2


def test_the_clock_is_read_when_the_device_has_done_the_updates(distill, tmp_path, monkeypatch):
    calls = []
    for name, method in (('read', Meter.read), ('clock', Meter.clock)):
        def called(self, *args, name=name, method=method, **kwargs):
            calls.append(name)
            return method(self, *args, **kwargs)
        monkeypatch.setattr(Meter, name, called)
    run = distill(*TAUGHT, '--distiller', 'kd', '--epochs', 1, '--output', tmp_path / 'run', quick=False)
    assert run.code == 0 and calls == ['read', 'clock']


# compare.py

@pytest.fixture
def contrast(monkeypatch, capfd):
    run = in_process(compare, monkeypatch, capfd)
    return lambda *args: run(*args, quick=False)


def test_a_student_alone_gets_the_flags_that_it_has():
    flags = ['--arch', 'net', '--teacher-arch', 'big', '--lr=0.1', '--teacher-resume=T.pth', '--teacher-re', 'T.pth',
             '-b', '8', '--pair-images', '9', '--lr-drop-epochs', '3', '5', '--ce-weight', '-1', '--no-accel',
             '--skip-first-evaluation']
    kept = ['--arch', 'net', '--lr=0.1', '-b', '8', '--lr-drop-epochs', '3', '5', '--no-accel']
    assert compare.of_student(flags) == kept


def test_a_student_alone_has_the_recipe_of_the_others(tmp_path):
    (tmp_path / 'recipe').write_text('--lr 0.3  # found for it\n--teacher-size 64 --epochs 7')
    words = ['--teacher-resume', 'T.pth', f'@{tmp_path / "recipe"}', '--use-pretrained', '1', '--arch', 'net']
    assert compare.of_student(compare.spelt_out(words)) == ['--lr', '0.3', '--epochs', '7', '--arch', 'net',
                                                            '--pretrained']
    assert compare.spelt_out(['--use-pretrained', '0', '-j', '1']) == ['-j', '1']
    assert compare.spelt_out(['--use-pretrained=1', '-j', '1']) == ['-j', '1', '--pretrained']


def test_what_a_run_has_said(tmp_path):
    job = compare.Job('kd', 0, argparse.Namespace(output=tmp_path, data=None, flags=[], share_teacher=False), [])
    assert job.said(1) == []  # somebody removed its folder
    job.folder.mkdir()
    (job.folder / 'out.txt').write_text('one\n\ntwo\nthree\n')
    assert job.said(2) == ['two', 'three']


def test_methods_are_compared_and_what_is_finished_is_left_alone(contrast, tmp_path):
    flags = [word for word in TAUGHT if word not in ('--seed', '1')] + ['--epochs', '1']
    args = ['--methods', 'alone', 'kd', '--seeds', 7, '--jobs', 2, '--output', tmp_path, '--flags', 'kd',
            '--kd-weight 2', '--', f'@{tmp_path / "recipe"}']
    (tmp_path / 'recipe').write_text(' '.join(flags))
    done = contrast(*args)
    assert done.code == 0, done.err
    kd, alone = (json.loads((tmp_path / name / 'result.json').read_text())['arguments'] for name in ('kd-7', 'alone-7'))
    assert kd['kd_weight'] == 2 and kd['distiller'] == ['kd'] and 'distiller' not in alone
    assert all(kd[key] == alone[key] for key in ('arch', 'lr', 'epochs', 'batch_size', 'seed')) and kd['seed'] == 7
    assert 'kd-7: done: last top1' in done.out and '| kd    | resnet8 |' in done.out
    assert 'Who pulls' in (tmp_path / 'report.html').read_text()
    before = (tmp_path / 'kd-7' / 'out.txt').stat().st_mtime_ns
    again = contrast(*args)
    assert again.code == 0 and 'kd-7: finished before' in again.out
    assert (tmp_path / 'kd-7' / 'out.txt').stat().st_mtime_ns == before
    args[args.index('--kd-weight 2')] = '--kd-weight 3'  # what is there is no result of it
    other = contrast(*args)
    assert other.code == 1 and '--kd-weight is 3.0 here, 2.0 there' in other.err
    assert '| alone | resnet8 |' in other.out and '| kd ' not in other.out


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A checkout whose runs fail where they are told to --fail, and else wait for a signal, to exit with 75."""
    for name in ('main_base.py', 'main_distill.py'):
        (tmp_path / name).write_text('''import signal, sys, time
if '--fail' in sys.argv:
    sys.exit('error: of no use')
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print('ready', flush=True)
time.sleep(20 if '--wait' in sys.argv else 0)
''')
    monkeypatch.setattr(compare, 'ROOT', tmp_path)
    monkeypatch.setattr(compare, 'make_parser', lambda: argparse.Namespace(parse_known_args=lambda words: (None, [])))
    return tmp_path


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_all_runs_and_the_exit_code_says_so(contrast, stand_in, number):
    def interrupt():
        outs = [stand_in / 'runs' / name / 'out.txt' for name in ('alone-0', 'kd-0')]
        while not all(out.exists() and out.read_text() for out in outs):
            threading.Event().wait(0.02)
        os.kill(os.getpid(), number)
    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    done = contrast('--methods', 'alone', 'kd', '--seeds', 0, 1, '--jobs', 2, '--output', stand_in / 'runs',
                    '--flags', 'kd', '--wait', '--flags', 'alone', '--wait', '--', '--dummy')
    assert done.code == 75 and done.out.count('stopped, ') == 2 and not (stand_in / 'runs' / 'kd-1').exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_while_a_run_is_started_reaches_it(contrast, stand_in, monkeypatch):
    start = compare.Job.start

    def interrupted(job, environment):
        started = start(job, environment)
        while not job.said(1):  # it can heed one
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        return started
    monkeypatch.setattr(compare.Job, 'start', interrupted)
    done = contrast('--methods', 'kd', '--seeds', 0, '--output', stand_in / 'runs', '--flags', 'kd', '--wait', '--',
                    '--dummy')
    assert done.code == 75 and 'kd-0: stopped' in done.out


def test_a_folder_that_cannot_be_made_is_said_in_a_line(contrast, tmp_path):
    (tmp_path / 'file').touch()
    done = contrast('--methods', 'kd', '--output', tmp_path / 'file')
    assert (done.code, done.err) == (1, f'error: cannot write to --output {tmp_path / "file"}: File exists\n')


def test_a_method_that_fails_leaves_the_others_alone(contrast, stand_in):
    done = contrast('--methods', 'kd', 'alone', '--seeds', 0, 1, '--output', stand_in / 'runs',
                    '--flags', 'kd', '--fail', '--', '--dummy')
    assert done.code == 1 and 'kd-0 failed' in done.err and 'of no use' in done.err
    assert 'kd-1: left out' in done.out and done.out.count(': ready') == 2
    assert 'is not the folder of a run' not in done.err and (stand_in / 'runs' / 'report.html').exists()
    assert '| kd ' in done.out


def test_a_place_that_cannot_be_written_to_stops_no_other_run(contrast, stand_in):
    runs = stand_in / 'runs'
    runs.mkdir()
    (runs / 'kd-0').touch()
    (runs / 'report.html').mkdir()
    done = contrast('--methods', 'kd', 'alone', '--seeds', 0, '--output', runs, '--', '--dummy')
    assert done.code == 1 and f'kd-0: failed: cannot write to {runs / "kd-0"}: File exists' in done.out
    assert 'alone-0: ready' in done.out and 'the report cannot be written' in done.err


@pytest.mark.parametrize('args, complaint', [
    (['--methods', 'kdd'], 'kdd is no method'),
    (['--methods', 'kd', '--flags', 'mgd', '--x'], 'not among --methods'),
    (['--methods', 'kd', '--', '--seed', '3'], '--seed is for compare.py to give'),
    (['--methods', 'kd', '--flags', 'kd', '--seed 7 --kd-weight 2'], '--seed is for compare.py to give'),
    (['--methods', 'alone', '--', '--shedule', 'cosine'], '--shedule is no flag of main_distill.py'),
    (['--methods', 'alone', '--flags', 'alone', '--lr fast'], "invalid float value: 'fast'"),
    (['--methods', 'kd', 'kd'], 'twice'),
    (['--methods', 'alone+kd'], 'alone is no method'),
    (['--methods', 'kd', '--flags', 'kd', "--kd-weight '2"], "--kd-weight '2: No closing quotation"),
    (['--methods', 'kd', '--', '--inspect'], '--inspect is for compare.py to give'),
])
def test_what_cannot_be_compared_is_said_in_a_line(contrast, tmp_path, args, complaint):
    done = contrast('--output', tmp_path, *args)
    assert done.code == 2 and complaint in done.err.splitlines()[-1]
