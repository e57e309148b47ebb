"""What a step does on a GPU, as far as a machine without one can tell.

Its tensors have a shape and a device, and no values: an operation that mixes devices fails, and so does one that would
have to wait for a value. Backward passes ask the driver for a stream, so they are not among it.
"""
import pytest
import torch
import zoo
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from distillers import DISTILLERS, Distillation, Distiller
from distillers.cache import Table, TeacherCache
from utils.data import Batch
from utils.guard import Guard
from utils.meters import hits
from utils.resident import Resident

GPU = torch.device('cuda', 0)
pytestmark = pytest.mark.filterwarnings('ignore:.*CUDA is not available')  # of autocast


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


def step(mode, method, **how):
    """Forward, and what the loop does with the results before it goes back; the losses."""
    student, teacher = zoo.make('same')
    task = Distillation(student, teacher, {'method': method(student, teacher)}, **how)
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
    assert {x.device for x in step(valueless, DISTILLERS[name])} == {GPU}


def test_standardized_logits(valueless):
    assert {x.device for x in step(valueless, DISTILLERS['dkd'], standardize=True)} == {GPU}


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
    with pytest.raises(error, match=r'two devices|_local_scalar_dense'):
        step(valueless, method)


def test_views_and_cached_logits(valueless):
    resident, cache = object.__new__(Resident), object.__new__(TeacherCache)
    with valueless:
        resident.padded = torch.zeros(50, 3, 40, 40, dtype=torch.uint8, device=GPU)
        cache.tables = {'logits': Table(50 * 162, 10, GPU)}
        numbers = torch.arange(8, device=GPU)
        images = resident.views(numbers, numbers)
        assert images.shape == (8, 3, 32, 32) and images.device == GPU
        assert cache(Batch(images, numbers, numbers, numbers, view=numbers)).logits.device == GPU
