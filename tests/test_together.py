"""Runs side by side (--seeds): each is what it is alone, and what does not depend on the seed is there once."""
import io
import os
import signal
import threading
import time

import pytest
import torch
from conftest import Outcome, assert_same, at_call, write_images

import main_base
import main_distill
from utils import data, engine, signals, together
from utils.guard import Guard

ALONE = ['--epochs', 2, '--lr', 0.02, '-j', 0, '--no-accel', '-p', 1]
CIFAR = [*ALONE, '--dataset', 'cifar10', '--dummy', '--dummy-images', 10, '-b', 4, '--arch', 'resnet8']
DISTILL = [*CIFAR, '--teacher-arch', 'resnet14', '--skip-first-evaluation']
CRD = ['--distiller', 'crd', '--crd-negatives', 8, '--mixup', 0.5]
KD = ['--distiller', 'kd', '--cache-teacher', 'lazy']


@pytest.fixture
def base(base):
    return lambda *args: base(*args, quick=False)


@pytest.fixture
def distill(distill):
    return lambda *args: distill(*args, quick=False)


def of_seed(run, seed) -> Outcome:
    return Outcome(run.code, run.out, run.err, f'{run.folder}-{seed}')


def without_times(record):
    if isinstance(record, list):
        return [without_times(entry) for entry in record]
    times = ('seconds', 'evaluation', 'time', 'update')
    return {k: without_times(v) for k, v in record.items() if k not in times} if isinstance(record, dict) else record


def assert_equal(a, b):
    """Two runs that differ in nothing but where and when they were."""
    for name in {path.name for run in (a, b) for path in run.folder.glob('*.pth') if 'checkpoint' not in path.name}:
        assert_same(a.weights(name), b.weights(name))
    assert without_times(a.log()) == without_times(b.log())
    assert a.json('args.json') | {'output': 0} == b.json('args.json') | {'output': 0}
    saved = [torch.load(run.folder / 'checkpoint.pth', weights_only=True) for run in (a, b)]
    assert_same(*(x['optimizer']['state'][0] for x in saved))
    assert saved[0]['seed'] == saved[1]['seed'] == a.json()['seed']


def assert_as_alone(script, tmp_path, flags, seeds=(0, 1)):
    run = script(*flags, '--seeds', *seeds, '--output', tmp_path / 'together')
    assert run.code == 0, run.out + run.err
    for seed in seeds:
        alone = script(*flags, '--seed', seed, '--output', tmp_path / f'alone-{seed}')
        assert alone.code == 0, alone.err
        assert_equal(of_seed(run, seed), alone)
    return run


@pytest.mark.parametrize('flags', [
    [*CIFAR, '--ema', 0.5], [*CIFAR, '--data-backend', 'loader', '--cutmix', 1, '--accum-steps', 2]],
    ids=['device', 'loader'])
def test_a_network_is_trained_as_alone(base, tmp_path, flags):
    run = assert_as_alone(base, tmp_path, flags, (7, 1))
    assert all(line.startswith(('seed 7 | ', 'seed 1 | ')) for line in run.out.splitlines())
    updates = [line[:6] for line in run.out.splitlines() if 'Epoch 0 [' in line]
    assert updates[:4] == ['seed 7', 'seed 1'] * 2


def test_networks_with_dropout_and_augmentation_of_single_images(base, tmp_path):
    for number, part in enumerate(('train', 'valid')):
        write_images(tmp_path / 'images' / part, 2 + number, seed=number)
    assert_as_alone(base, tmp_path, [tmp_path / 'images', *ALONE, '-b', 3, '--arch', 'mobilenet_v3_small',
                                     '--image-size', 32, '--auto-augment', 'randaugment'])


@pytest.fixture
def seen(monkeypatch):
    """(task, data) of every epoch that was trained."""
    epochs, genuine = [], engine.train_one_epoch

    def train_one_epoch(learner, data, *rest):
        epochs.append((learner.task, data))
        return genuine(learner, data, *rest)
    for script in (main_base, main_distill):
        monkeypatch.setattr(script, 'train_one_epoch', train_one_epoch)
    return epochs


def places(seen, what):
    return {x.data_ptr() for task, data in seen for x in what(task, data)}


@pytest.mark.parametrize('flags', [KD, CRD], ids=['kd', 'crd'])
def test_distilled_as_alone_under_one_teacher(distill, tmp_path, teacher, seen, flags):
    assert_as_alone(distill, tmp_path, [*DISTILL, *teacher, *flags], (0, 1))
    both, alone = seen[:4], seen[4:]
    weights = [len(places(runs, lambda task, _: task.teacher.parameters())) for runs in (both, alone)]
    assert weights[1] == 2 * weights[0]
    for what in [lambda _, data: [data.loader.resident.padded]] + [
            lambda task, _: [task.stand_in.tables['logits'].values]] * (flags is KD):
        assert [len(places(runs, what)) for runs in (both, alone)] == [1, 2]
    assert len({id(task.student) for task, _ in both}) == 2 and not together._things


def test_what_one_run_has_brought_into_the_cache_is_there_for_the_next(distill, tmp_path, teacher):
    flags = [*DISTILL, *teacher, '--distiller', 'kd', '--cache-teacher', 'full', '--dummy-images', 2, '--epochs', 1]
    run = distill(*flags, '--seeds', 0, 1, '--output', tmp_path / 'run')
    assert run.code == 0 and '324 of 324 views filled in' in run.out
    assert 'seed 0 | teacher cache: logits, 0.00 GB, 0 of 324' in run.out
    assert 'seed 1 | teacher cache: logits, 0.00 GB, 324 of 324' in run.out


@pytest.mark.parametrize('flags', [KD, ['--distiller', 'dml']], ids=['random', 'learns'])
def test_a_teacher_of_its_own_stays_its_own(distill, tmp_path, teacher, seen, flags):
    assert_as_alone(distill, tmp_path, [*DISTILL, *flags, *(teacher if 'dml' in flags else [])], (0, 1))
    first, second = ({p.data_ptr() for p in task.teacher.parameters()} for task, _ in seen[:2])
    assert not first & second


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    while not signals.caught():
        time.sleep(0.001)


def test_a_signal_saves_all_and_the_same_command_goes_on(distill, tmp_path, teacher):
    flags = [*DISTILL, *teacher, '--distiller', 'kd', 'crd', '--crd-negatives', 8, '--cache-teacher', 'lazy']
    start = [*flags, '--seeds', 0, 1, 2, '--output', tmp_path / 'run']
    with at_call(5, terminate):  # the second of seed 1
        part = distill(*start)
    assert part.code == signals.EXIT_INTERRUPTED and part.err.count('the same command goes on from epoch 0') == 3
    marks = [of_seed(part, seed).json('interrupted') for seed in (0, 1, 2)]
    assert [mark['sample'] for mark in marks] == [10, 8, 8]  # seed 0 went on to its third, the others end the second
    one = distill(*flags, '--seed', 1, '--output', tmp_path / 'run-1')  # one of them goes on alone
    rest = distill(*start)
    assert one.code == rest.code == 0, one.err + rest.err
    assert rest.out.count('resumed from') == 3 and 'seed 1 | Epoch' not in rest.out
    for seed in (0, 1, 2):
        assert_equal(of_seed(rest, seed), distill(*flags, '--seed', seed, '--output', tmp_path / f'alone-{seed}'))


def test_a_run_that_was_alone_goes_on_beside_others(base, tmp_path):
    with at_call(2, terminate):
        assert base(*CIFAR, '--seed', 1, '--output', tmp_path / 'run-1').code == signals.EXIT_INTERRUPTED
    assert_equal(of_seed(base(*CIFAR, '--seeds', 0, 1, '--output', tmp_path / 'run'), 1),
                 base(*CIFAR, '--seed', 1, '--output', tmp_path / 'alone-1'))


def not_a_number(monkeypatch):
    genuine = engine.Supervised.forward

    def forward(self, batch):
        logits, losses = genuine(self, batch)
        broken = threading.current_thread().name == 'seed 1'
        return logits, {'ce': losses['ce'] * float('nan')} if broken else losses
    monkeypatch.setattr(engine.Supervised, 'forward', forward)


def no_memory(monkeypatch):
    genuine = Guard.update

    def update(*args):
        if threading.current_thread().name == 'seed 1':
            raise RuntimeError('out of memory')
        return genuine(*args)
    monkeypatch.setattr(Guard, 'update', update)


@pytest.mark.parametrize('breaks, code, says', [(not_a_number, engine.EXIT_BROKEN, 'error: loss ce is nan in epoch 0'),
                                                (no_memory, 1, 'RuntimeError: out of memory')])
def test_one_that_fails_leaves_the_others_alone(base, tmp_path, breaks, code, says):
    start = [*CIFAR, '--seeds', 0, 1, 2, '--output', tmp_path / 'run']
    with pytest.MonkeyPatch.context() as patch:
        breaks(patch)
        run = base(*start)
        assert run.code == code and f'seed 1 | {says}' in run.err
        assert run.err.splitlines()[-1] == f'error: seed 1 ended with exit code {code}'
        assert [of_seed(run, seed).json()['finished'] for seed in (0, 2)] == [True, True]
        with at_call(3, terminate):
            assert base(*start, '--overwrite').code == signals.EXIT_INTERRUPTED  # two have to go on
    run = base(*start)
    assert run.code == 0
    for seed in (0, 1):
        assert_equal(of_seed(run, seed), base(*CIFAR, '--seed', seed, '--output', tmp_path / f'alone-{seed}'))


def test_a_killed_loader_process_is_missed_at_once(base, tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'load_or_next', lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.5)
    run = base(*CIFAR, '--data-backend', 'loader', '-j', 1, '--seeds', 0, 1, '--output', tmp_path / 'run')
    assert run.code == 1
    assert run.err.count('error: a loader process is gone, as for want of memory') == 2


def test_what_has_words_ends_in_them(base, tmp_path, monkeypatch):
    def update(*_):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 1 GiB')
    monkeypatch.setattr(Guard, 'update', update)
    run = base(*CIFAR, '--seeds', 0, 1, '--output', tmp_path / 'run')
    assert run.code == 1 and run.err.count('error: rank 0: CUDA out of memory. Tried to allocate 2 GiB: take a') == 2
    assert 'Traceback' not in run.err


def test_each_looks_after_its_own_folder(base, tmp_path):
    base(*CIFAR, '--seed', 1, '--output', tmp_path / 'run-1')
    run = base(*CIFAR, '--weight-decay', 0, '--seeds', 0, 1, '--output', f'{tmp_path / "run"}/')
    assert run.code == 1 and 'seed 1 | error: ' in run.err and 'a run with other arguments' in run.err
    assert of_seed(run, 0).json()['finished']


@pytest.mark.parametrize('flags, says', [
    (['--seed', 3], '--seed'), (['--evaluate'], '--evaluate'), (['--world-size', 2], '--world-size'),
    (['--multiprocessing-distributed'], '--multiprocessing-distributed'), (['--seeds', 1, 1], 'a seed twice'),
    (['--resume', 'checkpoint.pth'], '--resume checkpoint.pth'),
    (['--output', ''], '--output'), (['--compile', 'reduce-overhead'], '--compile reduce-overhead')])
def test_what_has_no_room_beside_it(base, tmp_path, flags, says):
    run = base(*CIFAR, '--seeds', 0, 1, '--output', tmp_path / 'run', *flags)
    assert run.code == 2 and says in run.err.splitlines()[-1] and not [*tmp_path.iterdir()]


def test_ranks_have_one_run(base, tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '1')
    run = base(*CIFAR, '--seeds', 0, 1, '--output', tmp_path / 'run')
    assert run.code == 2 and 'torchrun' in run.err.splitlines()[-1]


def test_lines_begin_with_who_prints_them():
    there = io.StringIO()
    labelled, me = together.Labelled(there), threading.current_thread().name
    print('one\ntwo', 3, file=labelled)
    print('fo', end='', file=labelled, flush=True)
    print('ur\n\nfive', file=labelled)
    assert there.getvalue() == f'{me} | one\n{me} | two 3\n{me} | four\n\n{me} | five\n'
    assert not labelled.isatty()  # so the display does not rewrite lines
