"""CIFAR on the device and the cache of the teacher: the same batches, the same results."""
import argparse
import copy
import json
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
import zoo
from conftest import assert_same, at_call
from test_methods import REFUSED
from torch.utils._python_dispatch import TorchDispatchMode

from distillers import DISTILLERS, Distillation, cache
from distillers.cache import HEADER, Table, TeacherCache
from models import Features
from utils import data, signals
from utils.data import Images, Prepare, ResidentLoader, TrainData, load_data, make_loader
from utils.guard import Guard
from utils.optim import make_optimizer
from utils.order import EvalOrder, TrainOrder
from utils.resident import VIEWS, Resident
from utils.setup import place
from utils.sources import Dummy
from utils.views import PlainView, ShiftView, shifts

CPU = torch.device('cpu')
DUMMY = ['--dataset', 'cifar10', '--dummy', '--arch', 'resnet8', '--image-size', 32]
KD = [*DUMMY, '--dummy-images', 5, '-b', 4, '--teacher-arch', 'resnet8', '--distiller', 'kd', 'cc', '--epochs', 2,
      '--skip-first-evaluation']


def arguments(*flags):
    return conftest.arguments('--dummy', '--dataset', 'cifar10', '-j', 0, *flags)


def both(source, view, order):
    """The two paths to the same batches."""
    return (make_loader(Images(source, view), order, arguments()),
            ResidentLoader(Images(source, view), copy.copy(order), Resident(source, CPU)))


def assert_equal_batches(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        for name in ('images', 'target', 'index', 'bad', 'view'):
            assert torch.equal(getattr(x, name), getattr(y, name)), name
            assert getattr(x, name).dtype == getattr(y, name).dtype
        assert x.images.dtype == torch.uint8


@pytest.mark.parametrize('rank, world', [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize('epoch, start, flip', [(0, 0, 0.5), (3, 16, 0.5), (3, 16, 0.9)])
def test_training_batches_are_the_same(rank, world, epoch, start, flip):
    source = Dummy(45, 10, 32)
    order = TrainOrder(45, 4, 2, 5, rank, world)  # the last batch has one sample: rank 1 of 2 computes along unweighted
    a, b = (list(TrainData(loader).updates(epoch, start))
            for loader in both(source, ShiftView(arguments('--flip', flip), 5, 45), order))
    assert [end for end, _ in a] == [end for end, _ in b]
    a, b = ([batch for _, micro in updates for batch in micro] for updates in (a, b))
    assert_equal_batches(a, b)
    assert [x.weight for x in a] == [x.weight for x in b]
    for batch in b:
        for index, view in zip(batch.index.tolist(), batch.view.tolist()):
            row, column, flipped = shifts(5, epoch, 45, flip)[index].tolist()
            assert view == (row * 9 + column) * 2 + flipped


@pytest.mark.parametrize('rank, world', [(0, 1), (1, 2)])
def test_evaluation_and_sample_batches_are_the_same(rank, world):
    source = Dummy(23, 10, 32)
    assert_equal_batches(*map(list, both(source, PlainView(32), EvalOrder(range(23), 4, rank, world))))
    training = both(source, ShiftView(arguments(), 5, 23), TrainOrder(23, 4, 1, 5, rank, world))
    plain = both(source, PlainView(32), EvalOrder([], 4, rank, world))
    assert_equal_batches(*(list(TrainData(*loaders).sample(2, 13)) for loaders in zip(training, plain)))


@pytest.mark.parametrize('flags', [[], ['--channels-last', '--mixup', 1, '--cutmix', 1], ['--crop-padding', 'reflect']],
                         ids=['plain', 'mixed', 'reflected'])
def test_batches_are_normalised_as_alone(flags, monkeypatch):
    """The device's, many at once; what is mixed is mixed batch by batch."""
    monkeypatch.setattr(data, 'AT_ONCE', 8)
    found = []
    for backend in ('device', 'loader'):
        args = arguments('--dummy-images', '21', '-b', '4', '--data-backend', backend, *map(str, flags))
        train, valid, classes = load_data(args, 5, CPU)
        mixed, plain, batches = Prepare(args, CPU, mix_classes=len(classes)), Prepare(args, CPU), []
        for number, (_, (batch,)) in enumerate(train.updates(1, 0)):
            torch.manual_seed(number)
            batches.append(mixed(batch))
        assert all(batch.images.is_contiguous(memory_format=plain.format) for batch in batches[:5])
        batches += map(plain, [*train.sample(0, 9), *valid])
        found.append([torch.cat([batch.images for batch in batches]),
                      torch.cat([batch.target.flatten() for batch in batches])])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and found[0][0].dtype == torch.float32


def test_samples_come_in_the_runs_batches_and_another_order_each_turn():
    """Whoever brings them: FT trains on them. An evaluation of so small images is in larger ones."""
    for backend, size in (('device', 32), ('loader', 32), ('loader', 64)):
        train, valid, _ = load_data(arguments('--dataset', 'cifar10', '--dummy-images', '40', '-b', '8', '-j', '0',
                                              '--data-backend', backend, '--image-size', size), 5, CPU)
        turns = [[batch.index.tolist() for batch in train.sample(2, 20)] for _ in range(2)]
        assert [[*map(len, turn)] for turn in turns] == [[8, 8, 4]] * 2 and turns[0] != turns[1]
        train.turns.clear()  # as in a run that goes on in this epoch
        assert [batch.index.tolist() for batch in train.sample(2, 20)] == turns[0]
        assert [len(batch.target) for batch in valid] == ([10] if size == 32 else [8, 2])


def test_every_view_is_a_slice_of_the_padded_image():
    source = Dummy(3, 10, 32)
    images = Resident(source, CPU).views(torch.full((VIEWS,), 2), torch.arange(VIEWS))
    padded = np.zeros((40, 40, 3), np.uint8)
    padded[4:36, 4:36] = np.asarray(source.load(2)[0])
    number = 0
    for row in range(9):
        for column in range(9):
            for flip in (False, True):
                cut = padded[row:row + 32, column:column + 32]
                assert np.array_equal(images[number].permute(1, 2, 0), cut[:, ::-1] if flip else cut)
                number += 1
    assert number == VIEWS


@pytest.mark.parametrize('flags, kind', [
    ([], ResidentLoader), (['--data-backend', 'device'], ResidentLoader), (['--mixup', '1'], ResidentLoader),
    (['--data-backend', 'loader'], torch.utils.data.DataLoader), (['--image-size', '64'], torch.utils.data.DataLoader),
    (['--random-erasing', '0.1'], torch.utils.data.DataLoader)])
def test_choice_of_the_backend(flags, kind, capsys):
    train, valid, _ = data.load_data(arguments('--dummy-images', '20', '-b', '4', *flags), 1, CPU)
    assert all(isinstance(loader, kind) for loader in (train.loader, train.plain, valid))
    assert ('images on the device' in capsys.readouterr().out) == (kind is ResidentLoader)


@pytest.mark.parametrize('flags, named', [
    (['--image-size', 64], '--image-size 64'), (['--auto-augment', 'randaugment'], '--auto-augment randaugment'),
    (['--dataset', 'imagefolder'], '--dataset imagefolder')])
def test_what_the_device_cannot_do_is_said(base, distill, flags, named):
    if '--dataset' not in flags:  # images of folders it can crop and flip, but not foresee
        run = base(*DUMMY, '--data-backend', 'device', *flags)
        assert run.code == 2 and named in run.err
    run = distill(*KD, '--cache-teacher', 'lazy', *flags)
    assert run.code == 2 and named in run.err


def test_the_padding_is_part_of_the_identity_of_the_data():
    source = Dummy(3, 10, 32)
    zeros, reflect = (Resident(source, CPU, padding).fingerprint() for padding in ('zeros', 'reflect'))
    view = ShiftView(arguments('--crop-padding', 'reflect'), 5, 3)
    loader = make_loader(Images(source, view), TrainOrder(3, 2, 1, 5, 0, 1), arguments())
    assert TrainData(loader).resident(CPU).fingerprint() == reflect != zeros


def test_a_run_may_go_on_with_the_other_backend(base, tmp_path):
    flags = [*DUMMY, '--dummy-images', 20]
    whole = base(*flags, '--epochs', 2, '--output', tmp_path / 'whole', '--data-backend', 'loader')
    with at_call(2):
        part = base(*flags, '--epochs', 2, '--output', tmp_path / 'parts', '--data-backend', 'loader')
    rest = base(*flags, '--epochs', 2, '--output', tmp_path / 'parts')
    assert part.code == signals.EXIT_INTERRUPTED and rest.code == 0 and 'resumed from' in rest.out
    assert_same(rest.weights(), whole.weights())


# The cache of the teacher

def test_the_cache_gives_what_a_live_teacher_gives_up_to_rounding(distill, tmp_path):
    runs = {name: distill(*KD, '--output', tmp_path / name, *flags) for name, flags in {
        'live': [],
        'lazy': ['--cache-teacher', 'lazy', '--data-backend', 'loader'],
        'full': ['--cache-teacher', 'full'],
        'written': ['--cache-teacher', 'lazy', '--cache-dir', tmp_path / 'tables'],
        'read': ['--cache-teacher', 'lazy', '--cache-dir', tmp_path / 'tables', '--arch', 'resnet14'],
        'again': ['--cache-teacher', 'full', '--cache-dir', tmp_path / 'tables'],
    }.items()}
    for name, run in runs.items():
        assert run.code == 0, name + run.err
    live, cached = (runs[name].log()[0]['train']['losses'] for name in ('live', 'lazy'))
    assert cached == pytest.approx(live, rel=1e-3) and cached != live
    for name in ('full', 'written', 'again'):
        assert_same(runs[name].weights(), runs['lazy'].weights())
    assert ' 0 of 810 views' in runs['written'].out
    seen = int(runs['read'].out.partition(' of 810 views known')[0].split()[-1])
    assert 5 < seen <= 10  # 5 images in two epochs
    assert f'{810 - seen} of {810 - seen} views filled in' in runs['again'].out
    assert len(list((tmp_path / 'tables').iterdir())) == 2  # logits and pooled


def test_resume_with_a_cache_is_exact_and_off_is_another_run(distill, tmp_path):
    flags = [*KD, '--cache-teacher', 'lazy', '--save-every', 1]
    whole = distill(*flags, '--output', tmp_path / 'whole')
    with at_call(2):
        assert distill(*flags, '--output', tmp_path / 'parts').code == signals.EXIT_INTERRUPTED
    refused = distill(*KD, '--save-every', 1, '--output', tmp_path / 'parts')
    assert refused.code == 1 and '--cache-teacher is off here, lazy there' in refused.err
    rest = distill(*flags, '--output', tmp_path / 'parts')
    assert rest.code == 0, rest.err
    assert_same(rest.weights(), whole.weights())


def test_the_teacher_looks_at_several_batches_at_once(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(data, 'AT_ONCE', 64)
    args, source = arguments(), Dummy(70, 10, 32)
    asked, logits = [], []
    for ahead in (False, True):
        order = TrainOrder(70, 4, 1, 0, 0, 1)
        train = TrainData(ResidentLoader(Images(source, ShiftView(args, 1, 70)), order, Resident(source, CPU)))
        teacher, _ = zoo.make('same')
        cache = TeacherCache(teacher.eval(), 'teacher', {'logits'}, train, Prepare(args, CPU), CPU,
                             argparse.Namespace(**vars(arguments()), cache_dir=None))
        if ahead:
            train.loader.prepare = cache.prepare
        asked.append([])
        teacher.register_forward_pre_hook(lambda _, inputs: asked[-1].append(len(inputs[0])))
        logits.append([cache(cache.prepare(batch)).logits for _, batches in train.updates(0, 0) for batch in batches])
    assert asked == [[16] * 18, [64, 16]]  # sixteen batches of four images, then the rest
    for alone, together in zip(*logits, strict=True):
        torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3)  # in float16
        assert together.abs().min() > 0


def test_what_the_host_asks_of_a_batch_stays_with_it():
    """Each update looks for images that could not be read."""
    batch = zoo.make_batch()._replace(images=torch.zeros(2, 3, 32, 32, dtype=torch.uint8), view=torch.zeros(2).long(),
                                      bad=torch.full((2,), -1))
    there = Prepare(arguments(), torch.device('meta'))(batch)
    assert {x.device.type for x in (there.images, there.target, there.index, there.view)} == {'meta'}
    assert there.bad is batch.bad


def test_a_signal_while_filling_in_leaves_what_there_is(distill, tmp_path):
    flags = [*KD, '--output', tmp_path / 'run', '--cache-teacher', 'full', '--cache-dir', tmp_path / 'tables']
    with at_call(2, owner=TeacherCache, name='look'):
        assert distill(*flags).code == signals.EXIT_INTERRUPTED
    rest = distill(*flags)
    assert rest.code == 0 and ' 128 of 810 views known' in rest.out and '682 views filled in' in rest.out


@pytest.mark.parametrize('flags, complaint', [
    (['--distiller', 'kd', 'mgd'], 'mgd'), (['--distiller', 'dml'], 'dml'), (['--distiller', 'ofd'], 'ofd'),
    (['--mixup', 1], '--mixup'), (['--cutmix', 1], '--cutmix')])
def test_what_cannot_be_cached_is_said(distill, flags, complaint):
    run = distill(*KD, '--cache-teacher', 'full', *flags)
    assert run.code == 2 and complaint in run.err.splitlines()[-1] and '--cache-teacher' in run.err.splitlines()[-1]


def test_a_cache_is_for_methods_whose_flags_read_no_more(distill, tmp_path):
    flags = [*KD, '--cache-teacher', 'lazy', '--distiller', 'srd']
    assert distill(*flags, '--output', tmp_path / 'mean').code == 0
    run = distill(*flags, '--srd-feat', 'full', '--output', tmp_path / 'full')
    assert run.code == 1 and "a method reads the teacher's head as well" in run.err


@pytest.mark.parametrize('name', [name for name, method in DISTILLERS.items() if method.teacher_reads])
def test_methods_read_no_more_than_they_tell(name):
    student, teacher = zoo.make('same' if 'narrower' in REFUSED.get(name, ()) else 'narrower')
    method, batch = DISTILLERS[name], zoo.make_batch()
    distiller = method(student, teacher)
    distiller.know(batch.target)
    with torch.no_grad():
        s, t = student(batch.images, features=True), teacher(batch.images, features=True)
        told = {field: getattr(t, field) for field in method.teacher_reads}
        losses = distiller(distiller.adapt(s), Features(**dict.fromkeys(Features._fields) | told), batch)
    assert all(loss.isfinite() for loss in losses.values())


# Its file

def table(path, about='a teacher'):
    return Table(40, 5, CPU, path, about)


def put(table, rows, value):
    table.put(torch.tensor(rows), torch.full((len(rows), 5), value))
    return table


def test_several_writers_share_a_file(tmp_path):
    a, b = table(tmp_path / 't'), table(tmp_path / 't')
    put(a, [3, 1], 0.1).save()
    put(b, [7, 1], 0.3).save()  # what is there stays
    put(a, [9], float('inf')).save()  # what float16 cannot hold
    c = table(tmp_path / 't')
    assert c.known.nonzero()[:, 0].tolist() == [1, 3, 7]
    expected = torch.tensor([0.1, 0.1, 0.3]).half()
    assert torch.equal(c.values[[1, 3, 7]], expected[:, None].expand(3, 5))


def test_a_file_is_of_one_teacher(tmp_path):
    put(table(tmp_path / 't'), [3], 0.1).save()
    with pytest.raises(SystemExit, match='no table of this teacher'):
        table(tmp_path / 't', 'another teacher')


@pytest.mark.parametrize('place', ['size', 'header', 'mark', 'value'])
def test_damage_is_noticed(tmp_path, place):
    path = tmp_path / 't'
    put(table(path), [3], 0.1).save()
    content = bytearray(path.read_bytes())
    at = {'size': -1, 'header': 2, 'mark': HEADER + 4 * 3, 'value': HEADER + 4 * 40 + 2 * (5 * 3 + 2)}[place]
    content[at] ^= 1
    path.write_bytes(content[:-1] if place == 'size' else content)
    with pytest.raises(SystemExit, match='damaged'):
        table(path)


def test_values_without_a_mark_do_not_count(tmp_path):
    path = tmp_path / 't'
    put(table(path), [3, 4], 0.1).save()
    content = bytearray(path.read_bytes())
    content[HEADER + 4 * 4:HEADER + 4 * 5] = bytes(4)
    path.write_bytes(content)
    again = table(path)
    assert again.known.nonzero()[:, 0].tolist() == [3]
    put(again, [4], 0.5).save()
    assert table(path).values[4].tolist() == [0.5] * 5


def test_a_file_that_does_not_fit_takes_nothing(tmp_path, monkeypatch):
    """Others are writing to the disk, too."""
    monkeypatch.setattr(cache.shutil, 'disk_usage', lambda path: SimpleNamespace(free=HEADER))
    with pytest.raises(SystemExit, match=r'--cache-dir: .*t: it needs 0\.00 GB, and 0\.00 GB are free'):
        table(tmp_path / 't')
    assert (tmp_path / 't').stat().st_size == 0
    monkeypatch.undo()
    assert put(table(tmp_path / 't'), [3], 0.5).save() is None and table(tmp_path / 't').known.sum() == 1


def test_a_table_that_does_not_fit_into_memory_says_what_it_takes(distill, monkeypatch):
    monkeypatch.setattr(cache, 'memory', lambda device: 10**5)
    run = distill(*KD, '--cache-teacher', 'lazy')
    assert run.code == 1 and 'numbers of each of 810 views, ' in run.err and run.err.count('\n') == 1


def test_a_finished_run_asks_the_teacher_for_nothing(distill, tmp_path, monkeypatch):
    flags = [*KD, '--cache-teacher', 'full', '--output', tmp_path]
    assert distill(*flags).code == 0
    monkeypatch.setattr(TeacherCache, 'fill', None)
    again = distill(*flags)
    assert again.code == 0 and 'done: last top1' in again.out


def test_a_file_whose_maker_got_no_further_is_made(tmp_path):
    (tmp_path / 't').write_bytes(bytes(HEADER))
    put(table(tmp_path / 't'), [3], 0.5).save()
    assert json.loads((tmp_path / 't').read_bytes()[:HEADER].strip(b'\0')) == 'a teacher'
    assert table(tmp_path / 't').known.sum() == 1


# --compile, and what would make a GPU wait

@pytest.mark.parametrize('flags, mode', [
    ([], None), (['--compile', '0'], None), (['--compile'], 'default'), (['--compile', '1'], 'default'),
    (['--compile', 'reduce-overhead'], 'reduce-overhead'), (['--compile', 'max-autotune'], 'max-autotune')])
def test_modes_of_compile(flags, mode, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda network, **how: asked.append(how))
    place(torch.nn.Linear(2, 2), CPU, arguments(*flags))
    assert asked == ([{'mode': mode, 'dynamic': False}] if mode else [])


def test_an_unknown_mode_of_compile_is_refused(capsys):
    with pytest.raises(SystemExit):
        arguments('--compile', 'fast')
    assert "--compile: 'fast' is not" in capsys.readouterr().err


def test_compiled_networks_train_alike(distill, tmp_path, monkeypatch):
    """By a backend that only traces: with what is captured for two sizes of batches, and teacher and student apart."""
    captured, compile_ = [], torch.compile

    def traced(graph, inputs):
        captured.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, 'compile', lambda called, mode, dynamic:
                        compile_(called, backend=traced, dynamic=dynamic))
    flags = [*DUMMY, '--dummy-images', 6, '-b', 4, '--teacher-arch', 'resnet8', '--distiller', 'kd',
             '--epochs', 1, '--skip-first-evaluation', '-p', 1]
    eager = distill(*flags, '--output', tmp_path / 'eager')
    compiled = distill(*flags, '--output', tmp_path / 'compiled', '--compile', 'reduce-overhead')
    assert eager.code == compiled.code == 0, compiled.err
    assert len(captured) == 7  # of 4 and 2 images teacher, student with losses, what is counted; the student with one
    assert compiled.weights().keys() == eager.weights().keys()
    assert compiled.log()[0]['train']['update'].keys() == {'teacher', 'student', 'backward'}  # of all losses, too
    assert compiled.log()[0]['train']['loss'] == pytest.approx(eager.log()[0]['train']['loss'], rel=1e-4)


class Waits(TorchDispatchMode):
    """Collects the operations whose result Python, or the size of another tensor, depends on."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags)
        by_numbers = function is torch.ops.aten.index.Tensor and all(i is None or i.dtype.is_signed for i in args[1])
        if depends and not by_numbers:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', DISTILLERS)
def test_no_method_makes_a_gpu_wait(name):
    """A step, with its update left out if it has to be, never looks at what it computes."""
    student, teacher = zoo.make('same')
    try:
        distiller = DISTILLERS[name](student, teacher)
    except ValueError as refused:
        pytest.skip(str(refused))
    task, batch, guard = Distillation(student, teacher, {name: distiller}), zoo.make_batch(), Guard(CPU)
    task.know(batch.target)
    optimizer = make_optimizer(task, arguments())
    with Waits() as waits:
        for _ in range(2):
            _, losses = task(batch)
            guard.loss(sum(losses.values())).backward()
            guard.update(optimizer, torch.amp.GradScaler('cpu', enabled=False))
    assert not waits.found


def test_tables_are_of_one_teacher_and_one_data_set(tmp_path):
    teacher, source = zoo.make('same')[1], Dummy(3, 10, 32)
    for identity, padding, *flags in (('t abc', 'zeros'), ('t def', 'zeros'), ('t abc', 'reflect'),
                                      ('t abc', 'zeros', '--mean', 0.5, 0.5, 0.5, '--std', 0.2, 0.2, 0.2)):
        train = TrainData(ResidentLoader(Images(source, ShiftView(arguments(), 1, 3)), TrainOrder(3, 2, 1, 0, 0, 1),
                                         Resident(source, CPU, padding)))
        TeacherCache(teacher, identity, {'logits'}, train, Prepare(arguments(), CPU), CPU,
                     argparse.Namespace(**vars(arguments(*flags)), cache_dir=tmp_path))
    assert len([*tmp_path.iterdir()]) == 4


def test_a_table_is_filled_in_rounds_after_which_ranks_hear_of_each_other(distill, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, 'SAVE_EVERY', 0)
    monkeypatch.setitem(cache.AT_ONCE, 'cpu', (64, 256))
    run = distill(*KD, '--cache-teacher', 'full', '--output', tmp_path)
    assert run.code == 0, run.err
    told = [line.split(' views filled in')[0] for line in run.out.splitlines() if 'views filled in' in line]
    assert told == [f'teacher cache: {n} of 810' for n in (256, 512, 768, 810)]
