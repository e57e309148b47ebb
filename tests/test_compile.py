"""--compile: the same losses and gradients, of every method, and what cannot go with it."""
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import zoo

from distillers import DISTILLERS, Distillation
from utils.optim import make_ema

TINY = ['--dummy', '--dataset', 'cifar10', '--dummy-images', 6, '-b', 4, '--arch', 'resnet8', '--teacher-arch',
        'resnet8', '--epochs', 1, '--skip-first-evaluation', '--distiller', 'kd']


@pytest.fixture(autouse=True)
def fresh():
    """No graphs of other tests, no settings for other tests."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8), torch._functorch.config.patch(donated_buffer=True):
        yield


def traced(monkeypatch):
    """Compiling goes as far as the graphs of both directions; no code is generated."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda called, mode, dynamic:
                        compile_(called, backend='aot_eager', dynamic=dynamic))


def updates(name, batches, backend=None):
    """Losses and gradients of some batches, and the state after them."""
    student, teacher = zoo.make('same')
    torch.manual_seed(1)
    method = DISTILLERS[name](student, teacher, **({'negatives': 32} if name == 'crd' else {}))
    task = Distillation(student, teacher, {name: method}).train()
    task.know(torch.arange(20) % zoo.CLASSES)
    if backend:
        task.compile(backend=backend, dynamic=False)
    results = []
    for seed in range(batches):
        torch.manual_seed(5)
        task.zero_grad()
        losses = task(zoo.make_batch(seed=seed))[1]
        sum(losses.values()).backward()
        grads = {key: p.grad.clone() for key, p in task.named_parameters() if p.grad is not None}
        results.append((losses, grads))
    return results, task.state_dict()


def assert_alike(name, backend, batches):
    (eager, state), (compiled, state_compiled) = updates(name, batches), updates(name, batches, backend)
    for (losses, grads), (losses_compiled, grads_compiled) in zip(eager, compiled):
        torch.testing.assert_close(losses_compiled, losses, rtol=1e-5, atol=1e-6)
        largest = max(g.abs().max().item() for g in grads.values())
        torch.testing.assert_close(grads_compiled, grads, rtol=1e-5, atol=1e-5 * largest)
    torch.testing.assert_close(state_compiled, state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', DISTILLERS)
def test_a_compiled_update_is_the_same(name):
    assert_alike(name, 'aot_eager', batches=2)


@pytest.mark.skipif(not shutil.which('g++'), reason='no compiler for C++')
@pytest.mark.parametrize('name', ['kd', 'crd'])  # which writes into what it has read, before the backward pass
def test_an_update_is_the_same_in_generated_code(name):
    assert_alike(name, 'inductor', batches=1)


def test_what_no_loss_reads_leaves_no_graph():
    """Else its gradient, of zeros, would be made and carried back with the others."""
    student, teacher = zoo.make('same')
    task, outputs = Distillation(student, teacher, {'kd': DISTILLERS['kd'](student, teacher)}), []

    def counted(graph, inputs):
        outputs.append(len(graph.graph.output_node().args[0]))
        return graph.forward
    for part in (student, task):
        part.compile(backend=counted, dynamic=False)
    task(zoo.make_batch())
    assert outputs == [3]  # the logits, and two losses


def test_a_teacher_beside_takes_student_and_losses_apart(monkeypatch):
    """Once, where the losses wait for it."""
    student, teacher = zoo.make('same')
    methods = {name: DISTILLERS[name](student, teacher) for name in ('kd', 'mgd')}
    task, outputs, waits = Distillation(student, teacher, methods), [], []

    def counted(graph, inputs):
        outputs.append(len(graph.graph.output_node().args[0]))
        return graph.forward
    # One of a GPU that is not there: it can be asked for, but not waited for.
    task.stream = torch.Stream(stream_id=1, device_index=0, device_type=1)
    monkeypatch.setattr('distillers.base.beside', lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: SimpleNamespace(wait_stream=waits.append))
    task.compile(backend=counted, dynamic=False)
    for _ in range(2):
        task(zoo.make_batch())
    assert outputs[1:] == [3] and len(waits) == 2  # behind what the student shows: the labels' loss and two others


@pytest.mark.parametrize('name', ['dkd', 'edkd', 'reviewkd'])
def test_a_warm_up_is_compiled_once(name):
    """Each epoch has a factor of its own, which is no part of the graph."""
    student, teacher = zoo.make('same')
    method, graphs, losses = DISTILLERS[name](student, teacher), [], []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward
    task = Distillation(student, teacher, {name: method}).eval()
    task.compile(backend=counted, dynamic=False)
    for epoch in (1, 2, 20, 40):
        task.start_epoch(epoch, lambda: ())
        losses.append(sum(v.item() for k, v in task(zoo.make_batch())[1].items() if k != 'ce'))
    assert len(graphs) == 1
    assert losses == pytest.approx([losses[3] * share for share in (1 / 20, 2 / 20, 1, 1)], rel=1e-5)


def test_singular_values_are_in_no_graph():
    student, teacher = zoo.make('same')
    method, operations = DISTILLERS['kdsvd'](student, teacher), []

    def listed(graph, inputs):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward
    task = Distillation(student, teacher, {'kdsvd': method})
    task.compile(backend=listed, dynamic=False)
    task(zoo.make_batch())
    assert operations and not any('linalg' in operation for operation in operations)


def test_cuda_graphs_start_anew_with_each_batch(distill, tmp_path, monkeypatch):
    """Else an evaluation, which holds the logits of the batch before, records a graph behind the other for each."""
    traced(monkeypatch)
    marks = []
    monkeypatch.setattr(torch.compiler, 'cudagraph_mark_step_begin', lambda: marks.append(1))
    monkeypatch.setattr('utils.data.EVALUATED', 4)
    run = distill(*TINY, '--dummy-images', 24, '--compile', 'reduce-overhead', '--data-backend', 'loader', '--output',
                  tmp_path)
    assert run.code == 0 and len(marks) == 6 + 2, run.err  # of 24 images, and of a quarter as many


def test_times_of_what_is_compiled_apart(distill, tmp_path, monkeypatch):
    """Student and losses have one each again where a method breaks the graph, as CRD does where it draws."""
    traced(monkeypatch)
    run = distill(*TINY[:-1], 'crd', '--crd-negatives', 2, '--compile', '--output', tmp_path)
    assert run.log()[0]['train']['update'].keys() == {'teacher', 'student', 'losses', 'backward'}, run.err


def test_the_average_that_is_evaluated_is_compiled_as_well():
    student = zoo.make('same')[0]
    args = SimpleNamespace(ema=0.9, compile='default')
    assert make_ema(student, args).module._compiled_call_impl
    args.compile = False
    assert not make_ema(student, args).module._compiled_call_impl


def test_dot_goes_back_twice_through_compiled_graphs(distill, tmp_path, monkeypatch):
    traced(monkeypatch)
    eager, compiled = (distill(*TINY, '--distiller', 'fitnet', '--optimizer', 'dot', *flags,
                               '--output', tmp_path / str(len(flags))) for flags in ([], ['--compile']))
    assert eager.code == compiled.code == 0, compiled.err
    parts = [run.weights('checkpoint.pth')['optimizer']['state'].values() for run in (eager, compiled)]
    shared = [[part['shared'] for part in of_run] for of_run in parts]
    assert shared[0] == shared[1] and {*shared[0]} == {True, False}  # the classifier and the connector have one loss
    assert compiled.log()[0]['train']['loss'] == pytest.approx(eager.log()[0]['train']['loss'], rel=1e-5)


@pytest.mark.parametrize('mode', ['reduce-overhead', 'max-autotune'])
def test_dot_and_cuda_graphs_are_refused(distill, mode):
    refused = distill(*TINY, '--optimizer', 'dot', '--compile', mode)
    assert refused.code == 2 and f'--compile {mode}' in refused.err
