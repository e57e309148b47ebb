"""--cuda-graph: what is recorded, and when. What stands in for a graph here calls the recorded function again."""
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same, at_call
from torch.utils._python_dispatch import TorchDispatchMode

import main_distill
from utils import closely, cost, engine, graph, setup, signals

TINY = ['--dataset', 'cifar10', '--dummy', '--dummy-images', 27, '-b', 4, '--epochs', 3, '--lr', 0.02, '--seed', 3,
        '-j', 0, '--skip-first-evaluation', '--arch', 'resnet8', '--teacher-arch', 'resnet8']


@pytest.fixture
def replays(monkeypatch):
    """As if there were a GPU: a list that grows with every replay."""
    made = []

    def record(function):
        results = []

        def replay():
            made.append(function)
            results[:] = function()
        return replay, results

    monkeypatch.setattr(graph, 'record', record)
    monkeypatch.setattr(setup, 'no_graph', lambda args, device: '')
    return made


@pytest.mark.parametrize('flags', [
    ['dkd', 'at', '--schedule', 'cosine'], ['kd', '--cache-teacher', 'lazy'],
    ['crd', '--crd-negatives', 9, '--clip-grad', 1, '--cutmix', 1], ['mgd', '--ema', 0.9]], ids=lambda flags: flags[0])
def test_a_run_is_the_same(distill, replays, monkeypatch, tmp_path, flags):
    monkeypatch.setattr(closely, 'APART', 1)  # more than one update of so short an epoch would be looked at
    eager, recorded = (distill(*TINY, '--distiller', *flags, *more, '--output', tmp_path / str(len(more)), quick=False)
                       for more in ([], ['--cuda-graph']))
    assert eager.code == recorded.code == 0, recorded.err
    # Of six whole batches in each of three epochs: one is looked at closely, and the first three warm up.
    assert len(replays) == 3 * 5 - graph.WARM_UP and len({*replays}) == 1
    assert_same(eager.weights(), recorded.weights())
    for ours, theirs in zip(recorded.log(), eager.log(), strict=True):
        for key in ('loss', 'top1', 'losses'):
            assert ours['train'][key] == theirs['train'][key]
        assert ours['lr'] == theirs['lr'] and ours['valid'] == theirs['valid']


def test_a_recorded_update_has_no_number_that_changes(distill, replays, monkeypatch, tmp_path):
    """A graph would go on with the number that it was recorded with."""
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, 'step', lambda self: (rates.append(self.param_groups[0]['lr']), step(self)))
    distill(*TINY, '--distiller', 'kd', '--schedule', 'cosine', '--cuda-graph', '--output', tmp_path, quick=False)
    assert len({id(rate) for rate in rates}) == 1 and rates[0] < 0.001


def test_an_interrupted_run_goes_on(distill, replays, tmp_path):
    def run(output, *flags):
        return distill(*TINY, '--distiller', 'kd', *flags, '--output', tmp_path / output, quick=False)
    whole = run('whole')
    with at_call(9):
        part = run('parts', '--cuda-graph')
    rest = run('parts', '--cuda-graph')
    assert (part.code, rest.code) == (signals.EXIT_INTERRUPTED, 0), rest.err
    assert_same(whole.weights(), rest.weights())


class Counted(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


def test_little_is_asked_of_the_device_besides_the_graph(distill, replays, monkeypatch, tmp_path):
    """A copy of each thing that goes in and comes out, and what is done for many batches at once: each takes as long as
    a small network's kernel."""
    counted, genuine = Counted(), engine.train_one_epoch

    def record(function):
        results = function()
        return (lambda: None), results

    def train_one_epoch(learner, data, prepare, ema, run, *rest):
        with counted if run.progress['epoch'] else nullcontext():
            genuine(learner, data, prepare, ema, run, *rest)
    monkeypatch.setattr(graph, 'record', record)
    monkeypatch.setattr(main_distill, 'train_one_epoch', train_one_epoch)
    monkeypatch.setattr(closely.Closely, 'begin', lambda self, update: None)
    run = distill(*TINY, '--dummy-images', 1024, '-b', 4, '--epochs', 2, '--distiller', 'kd', '--cuda-graph', '-p', 64,
                  '--output', tmp_path, quick=False)
    assert run.code == 0 and 6 <= counted.operations / 256 < 8, run.err


@pytest.mark.parametrize('flags', [['--accum-steps', 2], ['--optimizer', 'adamw'], ['--amp', 'fp16'], ['--no-accel'],
                                   ['--compile', 'reduce-overhead'], ['--multiprocessing-distributed']])
def test_what_does_not_go_with_it(distill, flags):
    run = distill(*TINY, '--distiller', 'kd', '--cuda-graph', *flags, quick=False)
    assert run.code == 2 and f'not together with {flags[0]}' in run.err


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_it_needs_a_gpu(distill):
    run = distill(*TINY, '--distiller', 'kd', '--cuda-graph', quick=False)
    assert run.code == 1 and '--cuda-graph needs a GPU' in run.err


def test_a_look_records_before_it_measures(distill, replays):
    run = distill(*TINY, '--distiller', 'kd', '--cuda-graph', '--inspect', quick=False)
    assert run.code == 0 and len(replays) >= cost.UPDATES, run.out


def test_a_stream_for_the_teacher_is_not_for_graphs_that_share_memory(distill):
    run = distill(*TINY, '--distiller', 'kd', '--teacher-stream', '--compile', 'max-autotune', quick=False)
    assert run.code == 2 and '--compile max-autotune' in run.err


def test_a_stream_for_the_teacher_needs_a_gpu(distill):
    run = distill(*TINY, '--distiller', 'dml', '--teacher-stream', '--no-accel', quick=False)
    assert run.code == 1 and '--teacher-stream is for a GPU' in run.err


@pytest.mark.parametrize('also', [None, RuntimeError('operation failed due to a previous error during capture')])
def test_memory_that_runs_out_while_recording_is_told_as_such(monkeypatch, also):
    """It has words of its own (errors.py), also where the end of the recording fails for it."""
    @contextmanager
    def recording(*_, **__):
        try:
            yield
        finally:
            if also:
                raise also

    def full():
        raise torch.OutOfMemoryError('CUDA out of memory')
    stream = SimpleNamespace(device=SimpleNamespace(index=0))
    for name, stand_in in {'CUDAGraph': object, 'graph': recording, 'current_stream': lambda: stream,
                           'default_stream': lambda: stream, 'default_generators': [None]}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with pytest.raises(torch.OutOfMemoryError):
        graph.record(full)
