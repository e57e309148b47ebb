"""--inspect: its numbers, and that it lists all that would stop a run."""
import argparse
import os
import re
import shutil
import time

import pytest
import torch
from conftest import arguments, write_images
from torch import nn

from distillers import inspection, lean, looks
from distillers.mgd import MGD
from models import create_model
from utils import cost, setup
from utils.data import Prepare, load_data
from utils.resident import Resident

PAIR = ['--arch', 'shufflenet_v2_x0_5', '--teacher-arch', 'shufflenet_v2_x1_0']
TEACHER = 'shufflenet_v2_x1_0'


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


def problems(outcome):
    """Their texts; a line that goes on is joined."""
    _, _, text = outcome.out.partition('\nproblems\n')
    return [' '.join(item.split()) for item in re.split(r'^  -  ', text, flags=re.MULTILINE)[1:]]


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    def save(classes):
        path = tmp_path_factory.mktemp('teacher') / f'{classes}.pth'
        torch.save(create_model(TEACHER, classes).state_dict(), path)
        return path
    return save


@pytest.mark.parametrize('name, size, macs', [('resnet18', 224, 1.814e9), ('mobilenet_v1', 224, 5.69e8)])
def test_counts_of_a_network(name, size, macs):
    network = create_model(name, 1000)
    rows = looks.at_network(network, size)
    assert float(rows[f'MACs at {size}'].removesuffix(' M').replace(',', '')) == pytest.approx(macs / 1e6, rel=5e-3)
    assert rows['parameters'] == f'{sum(p.numel() for p in network.parameters()):,}'
    assert rows['logits'] == '1000' and ', stride 32, BatchNorm2d' in rows['stage 3']


def test_multiplications_of_odd_convolutions():
    """Grouped, strided, dilated, transposed: as many as loops over one output would make."""
    layers = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, groups=3), nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2),
                           nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    # 9 pixels -> 4 x 4 of 6 channels, each of 1 x 3 x 3; each of these 6 x 4 x 4 goes to 2 channels of 2 x 2; 4 x 5
    assert looks.at_network(layers, 9)['MACs at 9'] == f'{(6 * 16 * 9 + 6 * 16 * 2 * 4 + 20) / 1e6:,.1f} M'


def test_what_is_told(distill, images, teacher, tmp_path):
    before = files(images)
    path, output = teacher(3), tmp_path / 'run'
    run = distill(images, *PAIR, '--teacher-resume', path, '--distiller', 'mgd', 'kd', '--kd-temperature', 2,
                  '--lr-drop-epochs', 2, 4, '--epochs', 5, '--accum-steps', 2, '--inspect', '--output', output)
    assert run.code == 0, run.out + run.err
    assert run.out.endswith('no problem found\n') and not run.err
    assert not output.exists() and files(images) == before and list(tmp_path.iterdir()) == []
    assert max(map(len, run.out.splitlines())) <= 120
    said = ' '.join(run.out.split())
    for text in ('images 39 15', 'classes 3 3', 'width (min/median/max) 48/48/48', 'RGB 39 RGB 15', 'unreadable 0 0',
                 '13 (ant) 5 (ant)', 'stage 2 of the student, 192 x 1 x 1, and 2 of the teacher, 464 x 1 x 1',
                 '--kd-temperature 2.0;', '16 images per update = 8 x 1 ranks x 2 batches', '3 per epoch, 15 in all',
                 '0.02 from epoch 0, 0.002 from epoch 2, 0.0002 from epoch 4', 'a step in all', 'peak memory',
                 'images training 8% to 100 % of the area', 'before the first epoch', str(path)[-37:]):
        assert text in said, text


def test_what_a_device_lacks_is_one_problem_among_others(base, images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    run = base(images, '--arch', 'resnet8', '--image-size', 32, '-b', 8, '-j', 0, '--cuda-graph', '--inspect',
               '--student-resume', tmp_path / 'gone.pth', quick=False)
    told = problems(run)
    assert run.code == 1 and len(told) == 2 and '--cuda-graph needs a GPU' in told[0] and 'gone.pth' in told[1]


def test_data_on_the_device_take_time(monkeypatch):
    """Many batches are made at once: what is between two of them is not what they take."""
    args = arguments('--dummy', '--dataset', 'cifar100', '--dummy-images', 6000, '-b', 100, '-j', 4)
    train, _, _ = load_data(args, 0, torch.device('cpu'))
    genuine = Resident.views

    def slow(*args):
        time.sleep(0.1)
        return genuine(*args)
    monkeypatch.setattr(Resident, 'views', slow)
    _, load = cost.loading(train, args, torch.device('cpu'))
    assert load > 0.1 / 10  # of so many batches


def test_methods_do_not_wait_for_a_loader_that_begins():
    class Beginning:
        def sample(self, epoch, n):
            time.sleep(0.2)
            yield 'a batch'

    class Looking:
        def start_epoch(self, epoch, batches):
            return {'it': [] if list(batches()) == ['a batch'] else None}

    told = cost.preparation(Looking(), Beginning(), str, 1000, 8, 0.002, torch.device('cpu'))
    assert told['first'] == pytest.approx(2, abs=1) and told['each'] == pytest.approx(2, abs=1)


def test_an_evaluation_is_not_told_by_its_first_batch():
    """In which a network is compiled, or its kernels are chosen."""
    class Late(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            time.sleep(0.3 * (self.calls == 1))
            return x.mean((2, 3))

    args = arguments('--dummy', '--dataset', 'cifar10', '--dummy-images', 64, '-j', 0)
    _, valid, _ = load_data(args, 0, torch.device('cpu'))
    _, n, seconds = inspection.score(Late(), valid, Prepare(args, torch.device('cpu')), torch.device('cpu'), args)
    assert n == 16 and seconds < 0.1 / n


@pytest.mark.parametrize('flags, told', [
    ([], 'training 8% to 100 % of the area, 50% mirrored; evaluation shorter side to 256 pixels, of which the middle; '
         'mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)'),
    (['--crop', 'random', '--flip', 0, '--val-resize-size', 280, '--mean', 0.5, 0.4, 0.3, '--std', 0.2, 0.2, 0.2],
     'training a square of 80% of the shorter side, anywhere, 0% mirrored; evaluation shorter side to 280 pixels, of '
     'which the middle; mean (0.5, 0.4, 0.3), std (0.2, 0.2, 0.2)'),
    (['--dataset', 'cifar10', '--flip', 1],
     'training shifted by up to 4 pixels, 100% mirrored; evaluation as they are; mean (0.4914, 0.4822, 0.4465), '
     'std (0.2023, 0.1994, 0.201)')])
def test_how_images_are_seen_is_told(flags, told):
    assert looks.how_seen(arguments('--dummy', *flags)) == told


@pytest.mark.parametrize('evaluate', [False, True])
def test_an_evaluation_records_no_graph(evaluate):
    args = argparse.Namespace(cuda_graph=True, evaluate=evaluate, gpu=None)
    assert bool(setup.no_graph(args, torch.device('cpu'))) != evaluate


def test_what_a_system_does_not_tell_of_its_memory_is_no_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, 'STATUS', tmp_path / 'status')
    (tmp_path / 'status').write_text('Name: python\n')
    (tmp_path / 'clear_refs').mkdir()
    cost.forget_peak(torch.device('cpu'))
    assert cost.peak(torch.device('cpu')) == 0


def test_more_workers_than_cores_are_told_of_once(base, images, recwarn):
    run = base(images, '-j', os.cpu_count() + 1, '--inspect')
    assert run.code == 0 and 'loader processes share' in ' '.join(run.out.split())
    assert not [str(warning.message) for warning in recwarn if 'DataLoader' in str(warning.message)]


def test_stages_of_the_longer_network_are_listed_together():
    columns = {'student': {'stage 0': 'a', 'logits': 'b'}, 'teacher': {'stage 0': 'c', 'stage 1': 'd', 'logits': 'e'}}
    rows = looks.side_by_side(columns, argparse.Namespace(arch='small', teacher_arch='large'))
    assert rows == [('', 'student: small', 'teacher: large'), ('stage 0', 'a', 'c'), ('stage 1', '', 'd'),
                    ('logits', 'b', 'e')]


def test_parts_of_a_step_are_no_longer_than_the_whole(base, images, monkeypatch):
    """Though the update whose parts are timed is slower than the others, as something else is at work."""
    told = []
    genuine = cost.percentages

    def disturbed(sums):
        found = genuine(sums)
        return found | {'update': {name: 50 * seconds for name, seconds in found['update'].items()}}
    monkeypatch.setattr(cost, 'percentages', disturbed)
    monkeypatch.setattr(looks, 'at_cost', lambda found, *_: told.append(found) or [('', '')])
    assert base(images, '--inspect').code == 0
    found, = told
    assert found['student'] > found['losses'] > 0
    assert found['student'] + found['losses'] + found['backward'] == pytest.approx(found['step'], rel=1e-6)


def noting(function, calls):
    def call(*args):
        calls.append(function.__name__)
        return function(*args)
    return call


def test_methods_prepare_before_they_are_measured(distill, images, teacher, monkeypatch):
    """As in a run. An update towards channels that were not matched may break the weights."""
    calls = []
    for name in ('start_epoch', 'forward'):
        monkeypatch.setattr(MGD, name, noting(getattr(MGD, name), calls))
    assert distill(images, *PAIR, '--teacher-resume', teacher(3), '--inspect').code == 0
    assert calls[:2] == ['start_epoch'] * 2 and set(calls[2:]) == {'forward'}


def test_an_optimizer_step_is_not_kept(base, images, tmp_path):
    """Inspecting a run that is half done leaves it as it was, and tells where it goes on."""
    output = tmp_path / 'run'
    assert base(images, '--epochs', 1, '--output', output).code == 0
    before = files(output)
    run = base(images, '--epochs', 1, '--output', output, '--inspect')
    assert run.code == 0 and files(output) == before
    assert 'checkpoint.pth' in run.out and 'goes on from epoch 1' in run.out
    run = base(images, '--epochs', 2, '--output', output, '--inspect')
    assert run.code == 1 and len(problems(run)) == 1 and 'holds a run with other arguments' in problems(run)[0]


def test_a_run_under_a_teacher_with_images_of_its_own_goes_on(distill, images, teacher, tmp_path):
    flags = [images, *PAIR, '--teacher-resume', teacher(3), '--teacher-mean', 0.5, 0.4, 0.3, '--distiller', 'kd',
             '--epochs', 1, '--output', tmp_path / 'run']
    assert distill(*flags).code == 0
    run = distill(*flags, '--inspect')
    assert run.code == 0 and 'goes on from epoch 1' in run.out, run.out


def test_fast_is_measured_with_the_teacher_that_it_folds(distill, images, teacher, monkeypatch):
    seen = []
    monkeypatch.setattr(lean, 'folded', lambda network, fold=lean.folded: seen.append(network) or fold(network))
    run = distill(images, *PAIR, '--teacher-resume', teacher(3), '--distiller', 'kd', '--fast', '--inspect')
    assert run.code == 0 and len(seen) == 1 and 'fast: --fold-teacher' in run.out, run.out
    run = distill(images, *PAIR, '--distiller', 'dml', '--fast', '--inspect')  # whose teacher moves on
    assert run.code == 0 and len(seen) == 1 and 'fast: ' in run.out and '--fold-teacher' not in run.out, run.out


def test_all_problems_at_once(distill, images, teacher, tmp_path):
    """A folder that is a file, a teacher of other classes, two methods that refuse the pair; a batch of one is none."""
    (tmp_path / 'file').write_text('')
    run = distill(images, '--arch', TEACHER, '--teacher-arch', 'shufflenet_v2_x0_5', '--teacher-resume', teacher(4),
                  '--distiller', 'mgd', 'fsp', 'kd', '-b', 1, '--output', tmp_path / 'file' / 'run', '--inspect')
    assert run.code == 1 and 'Traceback' not in run.out + run.err
    found = problems(run)
    for start, part in (('cannot write to --output', 'file is no folder'),
                        ('teacher: ', 'does not fit --teacher-arch shufflenet_v2_x0_5'),
                        (TEACHER, 'mgd: the student has 464 channels where the teacher has 192'),
                        (TEACHER, 'fsp: paired stages have')):
        assert any(text.startswith(start) and part in text for text in found), (start, found)
    assert 'BatchNorm takes its statistics from 1 image' in run.out.partition('\nproblems\n')[0]
    assert '  kd  The student' in run.out  # what fits is looked at all the same


def test_what_only_gpus_can_do(distill, images, teacher):
    run = distill(images, '--arch', 'shufflenet_v2_x0_5', '--teacher-arch', TEACHER, '--teacher-resume', teacher(3),
                  '--distiller', 'kd', '--teacher-stream', '--sync-bn', '--multiprocessing-distributed',
                  '--procs-per-node', 2, '--inspect')
    assert run.code == 1 and {text.split()[0] for text in problems(run)} == {'--sync-bn', '--teacher-stream'}


def test_missing_data(distill, teacher, tmp_path):
    run = distill(tmp_path / 'none', *PAIR, '--teacher-resume', teacher(7), '--distiller', 'kd', '--inspect')
    assert run.code == 1 and 'Traceback' not in run.out + run.err
    assert problems(run) == [f'the data folder {tmp_path / "none"} does not exist']  # the teacher's 7 classes are taken
    assert 'made-up images stand in' in run.out and 'a step in all' in run.out


def test_classes_that_differ(base, tmp_path):
    write_images(tmp_path / 'train', 3, 0)
    write_images(tmp_path / 'val', 2, 1, classes=('ant', 'bee', 'dog'))
    run = base(tmp_path, '--inspect')
    assert run.code == 1 and 'cat is only in train' in problems(run)[0]
    assert 'images 9 6 classes 3 3' in ' '.join(run.out.split())


@pytest.mark.parametrize('split, code', [('train', 0), ('valid', 1)])
def test_truncated_image(base, images, tmp_path, split, code):
    """In training another one stands in for it; an evaluation would end."""
    shutil.copytree(images, tmp_path / 'data')
    broken = tmp_path / 'data' / split / 'bee' / '1.jpg'
    broken.write_bytes(broken.read_bytes()[:300])
    run = base(tmp_path / 'data', '--inspect')
    assert run.code == code and 'Traceback' not in run.out + run.err
    assert 'bee/1.jpg' in ''.join(run.out.split()) and any('bee' in text for text in problems(run)) == bool(code)


def test_file_that_is_no_checkpoint(distill, images, tmp_path):
    (tmp_path / 'teacher.pth').write_bytes(b'nothing')
    run = distill(images, *PAIR, '--teacher-resume', tmp_path / 'teacher.pth', '--distiller', 'kd', '--inspect')
    assert run.code == 1 and len(problems(run)) == 1 and 'is damaged' in problems(run)[0]


def test_loss_that_is_not_finite(base, images):
    run = base(images, '--lr', '1e30', '--inspect')
    assert run.code == 1 and 'on one and the same batch' in problems(run)[0]


def test_part_of_one_rank(base, images, monkeypatch):
    """Of several ranks the first one looks, and does its part."""
    def spawned(ranks, batch, *more):
        return base(images, '--multiprocessing-distributed', '--procs-per-node', ranks, '-b', batch, '--inspect', '-a',
                    'shufflenet_v2_x0_5', *more)

    run = spawned(2, 8)
    assert run.code == 0 and '8 images per update = 4 x 2 ranks' in run.out and 'cost of a batch of 4 images' in run.out
    run = spawned(4, 8)  # the last 7 of 39 images are 2 + 2 + 2 + 1
    assert run.code == 1 and problems(run)[0].startswith('training, on the last batch of an epoch, of which')
    assert problems(spawned(4, 8, '--sync-bn')) == ['--sync-bn needs GPUs']  # which takes statistics of all of them
    assert 'a batch of 3 is smaller than the number of ranks, 4' in problems(spawned(4, 3))
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert base(images, '--inspect').out == ''


class Idle(torch.nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(torch.nn.Flatten(), torch.nn.LazyLinear(num_classes))
        self(torch.zeros(1, 3, 32, 32))
        self.idle = torch.nn.Linear(1, 1)

    def forward(self, x):
        return self[1](self[0](x))


def test_parameters_that_no_rank_may_have(base, images):
    flags = [images, '-a', 'test_inspect:Idle', '-b', 8, '--inspect', '--image-size', 32]
    assert base(*flags).code == 0
    run = base(*flags, '--multiprocessing-distributed', '--procs-per-node', 2)
    assert run.code == 1 and problems(run)[0].startswith(
        'training over several ranks: 2 parameters are in no loss, such as student.idle.weight')


def test_teacher_at_chance(distill, images, teacher):
    run = distill(images, *PAIR, '--teacher-resume', teacher(3), '--distiller', 'kd', '--inspect')
    assert run.code == 0 and 'top-1 at the level of chance' in run.out


def test_cache_is_not_begun(distill, tmp_path):
    run = distill('--dummy', '--dataset', 'cifar10', '--dummy-images', 32, *PAIR, '--distiller', 'kd',
                  '--cache-teacher', 'full', '--cache-dir', tmp_path / 'cache', '--inspect')
    assert run.code == 0 and 'teacher cache: logits' in run.out and not list(tmp_path.iterdir())


def test_evaluation_is_not_inspected(base, images):
    assert base(images, '--inspect', '--evaluate').code == 2
