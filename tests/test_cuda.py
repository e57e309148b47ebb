"""What only a GPU can show: the same results as on a CPU, by every fast path. Skipped where there is none.

TF32, by which convolutions round more, is off; results of one device are compared to the bit with --deterministic.
"""
import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import zoo
from conftest import ROOT, arguments, assert_same, at_call, environment, torchrun_command

from distillers import DISTILLERS, Distillation
from distillers.cache import TeacherCache
from distillers.lean import LeanTeacher
from models import create_model
from utils import data, signals
from utils.args import base_parser
from utils.crops import ResidentImages
from utils.data import CropLoader, Images, Prepare, ResidentLoader, TrainData
from utils.learner import Learner
from utils.meters import Meter
from utils.optim import make_ema, make_optimizer
from utils.order import TrainOrder
from utils.resident import VIEWS, Resident
from utils.sources import Dummy
from utils.views import CropView, ShiftView

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
GPU, CPU = torch.device('cuda', 0), torch.device('cpu')
TINY = ['--dataset', 'cifar10', '--dummy', '--dummy-images', 72, '-b', 16, '--epochs', 2, '--lr', 0.02, '-j', 2,
        '--seed', 3, '--arch', 'resnet8']
DISTIL = [*TINY, '--teacher-arch', 'resnet14', '--distiller']
EXACT = ['--gpu', 0, '--deterministic']


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


def gradients(name, device, backend=None):
    """Losses and gradients of a batch, and the state after it."""
    student, teacher = zoo.make('same')
    task = Distillation(student, teacher, {name: DISTILLERS[name](student, teacher)}).train()
    task.know(torch.arange(20) % zoo.CLASSES)
    if name == 'crd':  # draws, and the GPU has other ones
        task.distillers[name].draw = lambda index: torch.arange(20, device=index.device).expand(len(index), -1)
    task.start_epoch(1, lambda: [zoo.make_batch()] * 2)
    teacher.to(device)
    task.to(device)
    if backend:
        for part in (student, teacher, task):
            part.compile(mode=backend, dynamic=False)
    batch = zoo.make_batch()
    ready = batch._replace(images=batch.images.to(device), target=batch.target.to(device), index=batch.index.to(device))
    for _ in range(3 if backend else 1):  # CUDA graphs warm up, record, replay
        task.zero_grad()
        state = copy.deepcopy(task.state_dict())
        torch.compiler.cudagraph_mark_step_begin()
        losses = task(ready)[1]
        sum(losses.values()).backward()
        found = [{k: v.detach().cpu().clone() for k, v in of.items()} for of in (
            losses, {k: p.grad for k, p in task.named_parameters() if p.grad is not None}, task.state_dict())]
        task.load_state_dict(state)
    return found


def assert_alike(expected, found, tolerance):
    for wanted, got in zip(expected, found):
        largest = max(v.double().abs().max().item() for v in wanted.values())
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize('name', DISTILLERS)
def test_a_method_is_the_same(name):
    assert_alike(gradients(name, CPU), gradients(name, GPU), 1e-3)


@pytest.mark.parametrize('name', sorted({*DISTILLERS} - {'kdsvd'}))  # whose solver reads on the host if it converged
def test_an_update_waits_for_nothing(name):
    student, teacher = zoo.make('same')
    task = Distillation(student, teacher, {name: DISTILLERS[name](student, teacher)}).train()
    task.know(torch.arange(20) % zoo.CLASSES)
    task.start_epoch(1, lambda: [zoo.make_batch()] * 2)
    teacher.to(GPU)
    task.to(GPU)
    args = base_parser('').parse_args(['--dummy', '--ema', '0.9', '--max-broken-updates', '1'])
    ema = make_ema(student, args)
    learner = Learner(task, make_optimizer(task, args), torch.amp.GradScaler(enabled=False), GPU, args)
    prepare, meter, batch = Prepare(args, GPU), Meter({}), zoo.make_batch()
    batch = batch._replace(images=batch.images.mul(50).add(128).clamp(0, 255).byte())  # as it comes from a loader
    batch = batch._replace(**{field: getattr(batch, field).pin_memory() for field in ('images', 'target', 'index')})
    try:
        for mode in ('default', 'error', 'error'):  # the first time libraries are set up
            torch.cuda.set_sync_debug_mode(mode)
            learner.guard.begin()
            values = learner.learn(prepare(batch))
            meter.add(batch, learner.names, values)
            meter.add_norm(learner.step())
            ema.update_parameters(student)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert meter.read(watch_norms=True) == []


@pytest.mark.parametrize('kind', [ResidentLoader, TeacherCache, CropLoader])
def test_batches_on_the_device_wait_for_nothing(kind, monkeypatch):
    monkeypatch.setattr(data, 'AT_ONCE', 8)
    source, args = Dummy(40, 3, 32), base_parser('').parse_args(['--dummy', '--image-size', '32'])
    prepare = Prepare(args, GPU)
    if kind is CropLoader:
        view, held = CropView(args, 1), ResidentImages(source, GPU, 1)
    else:
        args.dataset = 'cifar10'
        view, held = ShiftView(args, 1, 40), Resident(source, GPU)
    order = TrainOrder(40, 8, 1, 1, 0, 1)
    order.at(0, 0)
    loader = (CropLoader if kind is CropLoader else ResidentLoader)(Images(source, view), order, held, prepare)
    if kind is TeacherCache:  # all that it looks at is new
        teacher, _ = zoo.make('same')
        args.cache_dir = None
        loader.prepare = TeacherCache(teacher.to(GPU).eval(), 'teacher', {'logits'}, TrainData(loader), prepare, GPU,
                                      args).prepare
    batches = iter(loader)
    try:
        for mode in ('default', 'error', 'error'):
            torch.cuda.set_sync_debug_mode(mode)
            assert prepare(next(batches)).images.shape == (8, 3, 32, 32)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('name', ['kd', 'dkd', 'mrkd', 'crd', 'ofd', 'reviewkd', 'simkd', 'dml', 'mgd'])
def test_an_update_as_a_graph_is_the_update(distill, teacher, tmp_path, name):
    if name == 'dml':
        teacher = []
    runs = [distill(*DISTIL, name, *teacher, '--gpu', 0, '--skip-first-evaluation', *more, '--output',
                    tmp_path / str(len(more)), quick=False) for more in ([], ['--cuda-graph'])]
    assert [run.code for run in runs] == [0, 0], runs[1].out + runs[1].err
    for eager, recorded in zip(*(run.log() for run in runs), strict=True):
        assert recorded['train']['loss'] == pytest.approx(eager['train']['loss'], rel=1e-3)


@pytest.mark.parametrize('flags', ['kd', 'kd --cuda-graph', 'kd --cache-teacher full', 'crd --crd-negatives 32',
                                   'reviewkd', 'expkd', 'mgd kd --pair-images 32'])
def test_an_interrupted_run_goes_on_to_the_bit(distill, teacher, tmp_path, flags):
    def run(output):
        return distill(*DISTIL, *flags.split(), *teacher, *EXACT, '--output', tmp_path / output, quick=False)
    whole = run('whole')
    with at_call(7):  # of five in each of two epochs
        part = run('parts')
    rest = run('parts')
    assert (whole.code, part.code, rest.code) == (0, signals.EXIT_INTERRUPTED, 0), whole.err + part.err + rest.err
    assert_same(whole.weights(), rest.weights())


@pytest.mark.parametrize('flags', ['kd', 'kd --cache-teacher full --cuda-graph', 'crd --crd-negatives 32 --cuda-graph'])
def test_seeds_side_by_side_are_those_alone(distill, teacher, tmp_path, flags):
    """Each has a stream; what draws in a graph finds its own seed all the same."""
    run = distill(*[word for word in DISTIL if word not in ('--seed', 3)], *flags.split(), *teacher, *EXACT,
                  '--dummy-images', 720, '--seeds', 3, 4, '--output', tmp_path / 'run', quick=False)
    assert run.code == 0, run.out + run.err
    for seed in (3, 4):
        alone = distill(*DISTIL, *flags.split(), *teacher, *EXACT, '--dummy-images', 720, '--seed', seed,
                        '--output', tmp_path / f'alone-{seed}', quick=False)
        assert_same(torch.load(tmp_path / f'run-{seed}' / 'last.pth', weights_only=True), alone.weights())


def test_a_look_at_a_run_with_a_cache(distill, teacher, tmp_path):
    """Which asks for views that the teacher was not shown together."""
    run = distill(*DISTIL, 'kd', *teacher, '--gpu', 0, '--cache-teacher', 'lazy', '--inspect', '--output', tmp_path,
                  quick=False)
    assert run.code == 0, run.out + run.err


@pytest.mark.parametrize('padding', ['zeros', 'reflect'])
def test_views_of_cifar(padding):
    source, numbers = Dummy(40, 10, 32), torch.randint(VIEWS, (40,), generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = (Resident(source, device, padding).views(torch.arange(40, device=device), numbers.to(device))
                      for device in (CPU, GPU))
    assert torch.equal(on_cpu, on_gpu.cpu())


def test_crops_of_a_folder():
    """As by the same products on a CPU, which test_prepare.py compares with what loaders do."""
    source = Dummy(6, 2, 90)
    view = CropView(arguments('x', '--image-size', 48), seed=1)
    numbers, boxes = torch.arange(6), view.boxes(0, range(6), [(90, 90)] * 6)
    a = ResidentImages(source, CPU, 1).resample(numbers, boxes, 48).int()
    b = ResidentImages(source, GPU, 1).crops(numbers, boxes, 48).cpu().int()
    assert (a - b).abs().max() <= 1 and (a != b).float().mean() < 0.01


@pytest.mark.parametrize('amp', ['off', 'bf16'])
def test_the_lean_teacher(amp):
    torch.manual_seed(0)
    student, teacher = (create_model('resnet8', 10).to(GPU) for _ in range(2))
    with torch.no_grad():
        teacher.train()(torch.randn(64, 3, 32, 32, device=GPU))
    task = Distillation(student, teacher, {'mgd': DISTILLERS['mgd'](student, teacher)})
    args = SimpleNamespace(fold_teacher=True, fast=False, teacher_amp=amp, amp=amp, channels_last=True, compile=False,
                           gpu=0)
    batch = zoo.make_batch(size=32)
    batch = batch._replace(images=batch.images.to(GPU))
    lean, exact = LeanTeacher(task, teacher, GPU, args)(batch), teacher(batch.images, features=True)
    for x, y in zip(lean.preact, exact.preact, strict=True):
        assert (x.float() - y).abs().max() <= (5e-2 if amp == 'bf16' else 1e-3) * y.abs().max()


def in_its_own_process(*command) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240,
                          env=environment() | {'CUDA_VISIBLE_DEVICES': '0', 'NVIDIA_TF32_OVERRIDE': '0'})


def test_one_rank_under_nccl_is_one_process(distill, teacher, tmp_path):
    """DDP, its buckets, the exchange of gradients on the device."""
    alone = distill(*DISTIL, 'kd', *teacher, *EXACT, '--output', tmp_path / 'alone', quick=False)
    ended = in_its_own_process(*torchrun_command(1), ROOT / 'main_distill.py', *DISTIL, 'kd', *teacher,
                               '--deterministic', '--output', tmp_path / 'ddp')
    assert ended.returncode == 0, ended.stdout + ended.stderr
    ours = torch.load(tmp_path / 'ddp' / 'last.pth', weights_only=True)
    for name, value in alone.weights().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_recorded_is_said(teacher, tmp_path):
    """KDSVD's decomposition asks how it went."""
    ended = in_its_own_process(sys.executable, ROOT / 'main_distill.py', *DISTIL, 'kdsvd', *teacher, '--cuda-graph',
                               '--output', tmp_path)
    assert ended.returncode == 1 and '--cuda-graph: not all of an update can be recorded' in ended.stderr


@pytest.fixture(scope='module')
def loss_on_cpu(once, teacher, tmp_path_factory):
    def get(distill):
        folder = tmp_path_factory.mktemp('cpu')
        return once('cpu', lambda: distill(*DISTIL, 'kd', *teacher, '--no-accel', '--output', folder, quick=False))
    return get


FLAGS = ['', '--fast', '--amp bf16 --teacher-amp off', '--amp fp16', '--channels-last', '--fold-teacher',
         '--cuda-graph', '--cuda-graph --teacher-stream --fast', '--data-backend loader', '--cache-teacher lazy',
         '--accum-steps 2 -b 8', '--cuda-graph --max-broken-updates 1']
COMPILED = ['--compile', '--compile reduce-overhead', '--cuda-graph --teacher-stream --compile',
            '--cuda-graph --cache-teacher lazy --compile', '--cache-teacher full --compile reduce-overhead --amp bf16']


@pytest.mark.parametrize('flags', [*FLAGS, *COMPILED])
def test_a_run_learns_what_it_does_on_a_cpu(distill, teacher, loss_on_cpu, tmp_path, flags):
    torch._dynamo.reset()
    expected = loss_on_cpu(distill)
    run = distill(*DISTIL, 'kd', *teacher, '--gpu', 0, *flags.split(), '--output', tmp_path, quick=False)
    assert expected.code == run.code == 0, run.out + run.err
    half = '--fast' in flags or '--amp' in flags
    for ours, theirs in zip(run.log(), expected.log(), strict=True):
        assert ours['train']['loss'] == pytest.approx(theirs['train']['loss'], rel=0.05 if half else 0.02)
        assert ours['valid']['n'] == theirs['valid']['n']


@pytest.mark.parametrize('name', ['kd', 'crd', 'kdsvd', 'reviewkd', 'mgd'])  # it takes some seconds each
def test_a_method_is_the_same_as_a_cuda_graph(name):
    torch._dynamo.reset()
    assert_alike(gradients(name, GPU), gradients(name, GPU, 'reduce-overhead'), 1e-3)
