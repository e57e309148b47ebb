"""What a step does on a GPU, as far as a machine without one can tell.

Its tensors have a shape and a device, and no values: an operation that mixes devices fails, and so does one that would
have to wait for a value. Backward passes ask the driver for a stream, so they are not among it.
"""
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.parallel import DataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from distillers import DISTILLERS, Distillation, Distiller
from distillers.base import probe
from distillers.cache import Table, TeacherCache
from distillers.parts import averaged
from utils import distributed
from utils.data import Batch
from utils.guard import Guard
from utils.meters import hits
from utils.resident import Resident

GPU = torch.device('cuda', 0)
pytestmark = [
    pytest.mark.filterwarnings('ignore:.*CUDA is not available'),  # of autocast
    pytest.mark.skipif(torch.__version__ < (2, 11), reason='torch 2.8 ends the process where a GPU is only made up')]


@pytest.fixture
def valueless():
    return FakeTensorMode()


def there(mode: FakeTensorMode, x: torch.Tensor) -> torch.Tensor:
    x = mode.from_tensor(x.detach())
    with mode:
        return x.to(GPU)


def on_gpu(mode: FakeTensorMode, network: torch.nn.Module):
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(there(mode, p), p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = there(mode, buffer)


def step(mode, name, method, **how):
    """Forward, and what the loop does with the results before it goes back; the losses."""
    student, teacher = zoo.make('same')
    task = Distillation(student, teacher, {name: method(student, teacher)}, **how)
    task.know(torch.arange(20) % zoo.CLASSES)
    task.start_epoch(1, lambda: [zoo.make_batch()] * 2)
    for network in (task, teacher):
        on_gpu(mode, network)
    batch = zoo.make_batch()
    ready = batch._replace(**{name: there(mode, getattr(batch, name)) for name in ('images', 'target', 'index')})
    with mode:
        logits, losses = task(ready)
        return [*losses.values(), Guard(GPU).loss(sum(losses.values())), hits(logits, ready.target)]


@pytest.mark.parametrize('name', DISTILLERS)
def test_a_method_stays_on_the_device_and_waits_for_nothing(valueless, name):
    assert {x.device for x in step(valueless, name, DISTILLERS[name])} == {GPU}


def test_standardized_logits(valueless):
    assert {x.device for x in step(valueless, 'dkd', DISTILLERS['dkd'], standardize=True)} == {GPU}


class Operations(TorchDispatchMode):
    """The names of all that are done meanwhile."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


# On a GPU these are refused under --deterministic. Not among them is upsample_bilinear2d_backward, as interpolate goes
# another way then.
UNSTEADY = {'_adaptive_avg_pool2d_backward', 'adaptive_max_pool2d_backward', '_upsample_bilinear2d_aa_backward',
            'upsample_bicubic2d_backward', 'grid_sampler_2d_backward', 'reflection_pad2d_backward', 'max_unpool2d',
            'nll_loss2d_forward', 'scatter_reduce', 'put_', 'histc', 'median'}


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('name', DISTILLERS)
def test_a_method_can_be_deterministic(deterministic, name):
    """Of any pair: both have maps that the other has not, and at 28 pixels sides that are no multiples."""
    with Operations() as done:
        for pair in zoo.PAIRS:
            student, teacher = zoo.make(pair)
            student.image_size = teacher.image_size = 28
            try:
                method = DISTILLERS[name](student, teacher)
            except ValueError:  # not of this pair
                continue
            task = Distillation(student, teacher, {name: method})
            task.know(torch.arange(20) % zoo.CLASSES)
            sum(task(zoo.make_batch(size=28))[1].values()).backward()
    assert 'convolution_backward' in done.names and not done.names & UNSTEADY


@pytest.mark.parametrize('shape, size', [((8, 4), (4, 2)), ((7, 7), (4, 4)), ((14, 9), (5, 1)), ((3, 4), (7, 4))])
def test_averages_are_those_of_an_adaptive_pool(deterministic, shape, size):
    f = torch.randn(2, 3, *shape, dtype=torch.float64)
    torch.testing.assert_close(averaged(f, size), F.adaptive_avg_pool2d(f, size))
    torch.use_deterministic_algorithms(False)
    assert torch.equal(averaged(f, size), F.adaptive_avg_pool2d(f, size))


class Mixes(Distiller):
    def __init__(self, student, teacher):
        super().__init__()

    def forward(self, s, t, batch):
        return {'mixes': (s.logits * torch.ones(len(s.logits), 1)).mean()}


class Waits(Mixes):
    def forward(self, s, t, batch):
        return {'waits': s.logits.mean() * s.logits.max().item()}


@pytest.mark.parametrize('method, error', [(Mixes, RuntimeError), (Waits, DataDependentOutputException)])
def test_these_tests_can_fail(valueless, method, error):
    with pytest.raises(error, match=r'two .*devices|_local_scalar_dense'):
        step(valueless, method.__name__.lower(), method)


def test_views_and_cached_logits(valueless):
    resident, cache = object.__new__(Resident), object.__new__(TeacherCache)
    with valueless:
        resident.padded = torch.zeros(50, 3, 40, 40, dtype=torch.uint8, device=GPU)
        cache.tables = {'logits': Table(50 * 162, 10, GPU)}
        numbers = torch.arange(8, device=GPU)
        images = resident.views(numbers, numbers)
        assert images.shape == (8, 3, 32, 32) and images.device == GPU
        assert cache(Batch(images, numbers, numbers, numbers, view=numbers)).logits.device == GPU


# Several GPUs in one process

@pytest.fixture
def gpus(monkeypatch):
    """Three, as DataParallel sees them; what it computes there it computes on the CPU, in threads as there."""
    def twin(module):
        new = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            setattr(new, name, twin(child))
        for name, value in module._parameters.items():
            setattr(new, name, value)
        return new

    def apply(self, replicas, inputs, kwargs):
        autocast, grad, outputs = torch.is_autocast_enabled('cuda'), torch.is_grad_enabled(), {}

        def work(i):
            with torch.set_grad_enabled(grad), torch.autocast('cuda', enabled=autocast):
                outputs[i] = replicas[i](*inputs[i], **kwargs[i])
        for i in range(len(replicas)):
            thread = threading.Thread(target=work, args=(i,))
            thread.start()
            thread.join()
        return [outputs[i] for i in range(len(replicas))]

    monkeypatch.setattr(DataParallel, 'replicate', lambda self, network, gpus: [twin(network) for _ in gpus])
    monkeypatch.setattr(DataParallel, 'parallel_apply', apply)
    for name, stand_in in {'nn.parallel.scatter_gather.Scatter': lambda gpus, _, dim, x: x.chunk(len(gpus), dim),
                           'nn.parallel.scatter_gather.Gather': lambda _, dim, *parts: torch.cat(parts, dim)}.items():
        monkeypatch.setattr(f'torch.{name}.apply', stand_in)
    for name, answer in {'device_count': 3, 'is_available': True, 'is_bf16_supported': True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(sys.modules[DataParallel.__module__], '_check_balance', lambda gpus: None)


def replicas(network):
    parallel = distributed.replicated(network, GPU, SimpleNamespace(gpu=None, compile=False))
    parallel.src_device_obj = torch.device('cpu')
    return parallel


@pytest.mark.parametrize('images', [1, 4, 6])  # which reach one of the three, two, and all of them
def test_a_batch_need_not_fill_the_gpus(gpus, images):
    student, teacher = zoo.make('same')
    batch, methods = zoo.make_batch(images), {'mgd': DISTILLERS['mgd'](student, teacher)}
    expected = Distillation(student, teacher, methods).eval()(batch)
    task = Distillation(replicas(student), replicas(teacher), methods).eval()
    torch.testing.assert_close(task(batch), expected)
    assert probe(task.teacher).logits.shape == (1, zoo.CLASSES)
    torch.testing.assert_close([*task.pairs([batch])], [*Distillation(student, teacher, methods).pairs([batch])])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, None])
def test_every_gpu_computes_in_the_precision_asked_for(gpus, dtype):
    seen = []

    class Network(zoo.Tiny):
        def forward(self, x):
            seen.append(torch.is_autocast_enabled('cuda') and torch.get_autocast_dtype('cuda'))
            return super().forward(x)

    with torch.autocast('cuda', dtype, enabled=dtype is not None):
        replicas(Network(**zoo.THREE))(zoo.make_batch().images)
    assert seen == [dtype or False] * 3


def test_compiled_networks_are_not_replicated(gpus):
    with pytest.raises(SystemExit, match='--compile needs one process per GPU'):
        distributed.replicated(zoo.make('same')[0], GPU, SimpleNamespace(gpu=None, compile='default'))


def test_what_a_rank_has_on_the_host_stays_there(monkeypatch):
    """DistributedDataParallel brings all of a batch to a device it is told of, and waits until that is done."""
    told = {}

    class Parallel:
        def __init__(self, module, device_ids=None, output_device=None, **others):
            told.update(device_ids=device_ids, output_device=output_device)

    monkeypatch.setattr(distributed, 'DistributedDataParallel', Parallel)
    monkeypatch.setattr(distributed.dist, 'is_initialized', lambda: True)
    distributed.wrap(zoo.make('same')[0], GPU, SimpleNamespace(sync_bn=False))
    assert told == {'device_ids': None, 'output_device': None}
