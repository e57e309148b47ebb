"""Networks: the contract of `Features`, equality with torchvision, and `create_model`."""
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import Features, create_model, model_names
from models.imagenet import NETWORKS

torch.set_num_threads(1)

# one network of each kind of block, each variant of a path
NAMES = ['resnet18', 'resnet50', 'mobilenet_v1', 'mobilenet_v2', 'mobilenet_v2_mgd', 'shufflenet_v2_x0_5']
TORCHVISION = [name for name in torchvision.models.list_models(module=torchvision.models) if name in NETWORKS]


def images(height=64, width=64, n=2):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(0))


def build(name, num_classes=10):
    torch.manual_seed(0)
    return create_model(name, num_classes)


def activation(name):
    return F.relu6 if name.startswith('mobilenet_v2') else F.relu


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def with_statistics(model):
    """Eval mode, with the running statistics of one batch."""
    for norm in norms(model):
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images())
    return model.eval()


def assert_same_tensors(a, b):
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a)


# equality with torchvision

@pytest.mark.parametrize('name', TORCHVISION)
def test_names_initialisation_and_logits_are_those_of_torchvision(name):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name)
    ours = build(name, 1000)
    assert_same_tensors(ours.state_dict(), theirs.state_dict())

    ours.load_state_dict(with_statistics(theirs).state_dict(), strict=True)
    x = 10 * images()  # large enough to tell ReLU from ReLU6
    with torch.no_grad():
        expected, logits = theirs(x), ours.eval()(x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_torchvision_has_all_but_the_variants():
    assert set(NETWORKS) - set(TORCHVISION) == {'mobilenet_v1', 'mobilenet_v2_mgd', 'shufflenet_v2'}


@pytest.mark.parametrize('name', ['mobilenet_v2', 'mobilenet_v2_mgd'])
def test_mobilenet_v2_weights_go_to_torchvision_and_come_from_it(name):
    ours, theirs = build(name), torchvision.models.mobilenet_v2(num_classes=10)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(theirs.classifier[1].weight, ours.classifier.weight)
    incomplete = {key: value for key, value in theirs.state_dict().items() if key != 'classifier.1.bias'}
    with pytest.raises(RuntimeError, match=r'Missing key.*classifier.1.bias'):
        ours.load_state_dict(incomplete)


def test_mobilenet_v1_has_the_public_names_and_parameter_count():
    model = create_model('mobilenet_v1')
    assert sum(p.numel() for p in model.parameters()) == 4_231_976
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes['model.0.0.weight'] == (32, 3, 3, 3)
    assert shapes['model.1.0.weight'] == (32, 1, 3, 3)
    assert shapes['model.1.1.running_mean'] == (32,)
    assert shapes['model.1.3.weight'] == (64, 32, 1, 1)
    assert shapes['model.13.4.bias'] == (1024,)
    assert shapes['fc.weight'] == (1000, 1024)
    assert not any(key.startswith('model.14') for key in shapes)
    assert model.feature_channels == [128, 256, 512, 1024]
    assert [model.feature_norms[i] is model.model[item][4] for i, item in enumerate((3, 5, 11, 13))] == [True] * 4


# the contract

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('height, width', [(64, 64), (97, 65)])
def test_features_belong_together(name, height, width):
    model = with_statistics(build(name))
    x = 10 * images(height, width)  # large enough to tell ReLU from ReLU6
    out = model(x, features=True)
    assert isinstance(out, Features)
    assert torch.equal(out.logits, model(x))
    assert out.logits.shape == (2, 10)
    torch.testing.assert_close(out.pooled, out.head.mean((2, 3)))
    assert isinstance(model.classifier, nn.Linear)
    torch.testing.assert_close(model.classifier(out.pooled), out.logits)

    assert len(out.preact) == len(out.maps) == len(model.feature_channels) == len(model.feature_norms)
    assert [m.shape[1] for m in out.maps] == model.feature_channels
    for preact, after in zip(out.preact, out.maps, strict=True):
        assert preact.min() < 0
        assert torch.equal(activation(name)(preact), after)
    sizes = [m.shape[2] for m in out.maps]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize('name', NAMES)
def test_norms_are_the_last_before_the_activation(name):
    model = with_statistics(build(name))
    stages = [model.layer1, model.layer2, model.layer3, model.layer4] if name.startswith('resnet') else []
    seen = {}
    for module in [*norms(model), *(stage[-2] for stage in stages)]:
        module.register_forward_hook(lambda module, args, output: seen.update({module: output.clone()}))
    out = model(images(), features=True)
    if name.startswith('shufflenet'):
        assert model.feature_norms == [None] * 3
    elif name.startswith('mobilenet'):
        assert all(torch.equal(seen[norm], m) for norm, m in zip(model.feature_norms, out.preact, strict=True))
    else:
        # the preact is a residual sum: the norm's output plus the input of the stage's last block
        for stage, norm, preact in zip(stages, model.feature_norms, out.preact, strict=True):
            assert torch.equal(seen[norm] + F.relu(seen[stage[-2]]), preact)


@pytest.mark.parametrize('name', NAMES)
def test_nothing_that_is_shown_is_changed_in_place(name):
    out = build(name).train()(images(), features=True)
    assert all(t._version == 0 for t in [out.logits, out.pooled, out.head, *out.preact, *out.maps])


@pytest.mark.parametrize('name', NAMES)
def test_gradients_reach_every_map(name):
    out = build(name).train()(images(), features=True)
    tensors = [*out.preact, *out.maps, out.head, out.pooled]
    loss = out.logits.square().sum() + sum(p.square().mean() for p in out.preact)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize('name', NAMES)
def test_every_norm_runs_once(name):
    model = build(name).train()
    calls = Counter()
    for norm in norms(model):
        norm.register_forward_hook(lambda module, args, output: calls.update([module]))
    model(images(), features=True)
    assert calls == Counter(norms(model))
    assert all(norm.num_batches_tracked == 1 for norm in norms(model))


@pytest.mark.parametrize('name, maps', [
    ('mobilenet_v2', [(144, 56), (192, 28), (576, 14), (960, 7)]),
    ('mobilenet_v2_mgd', [(144, 28), (192, 28), (384, 14), (960, 7)]),
])
def test_mobilenet_v2_taps(name, maps):
    with torch.no_grad():
        out = build(name).eval()(images(224, 224, n=1), features=True)
    assert [(m.shape[1], m.shape[2]) for m in out.maps] == maps
    assert out.head.shape[1] == 1280


def test_stages_of_the_other_networks():
    with torch.no_grad():
        for name, maps in {
            'resnet18': [(64, 16), (128, 8), (256, 4), (512, 2)],
            'resnet50': [(256, 16), (512, 8), (1024, 4), (2048, 2)],
            'mobilenet_v1': [(128, 16), (256, 8), (512, 4), (1024, 2)],
            'shufflenet_v2': [(116, 8), (232, 4), (464, 2)],
        }.items():
            assert [(m.shape[1], m.shape[2]) for m in build(name).eval()(images(), features=True).maps] == maps


# create_model

def test_model_names_are_ours_then_those_of_torchvision():
    names = model_names()
    assert names[:len(NETWORKS)] == list(NETWORKS)
    assert len(names) == len(set(names))
    assert 'squeezenet1_1' in names and 'fcn_resnet50' not in names


def test_unknown_name_suggests_close_ones():
    with pytest.raises(ValueError, match=r'resnet5O.*resnet50') as error:
        create_model('resnet5O')
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='unknown model'):
        create_model('fcn_resnet50')


@pytest.mark.parametrize('name, size', [('squeezenet1_1', 64), ('googlenet', 64), ('inception_v3', 96)])
@pytest.mark.filterwarnings('ignore:The default weight initialization:FutureWarning')
def test_networks_of_torchvision_give_logits_in_training(name, size):
    assert create_model(name, 10).train()(images(size, size)).shape == (2, 10)


def publish(monkeypatch, name, state):
    """Let torchvision have `state` as the first version of the weights of `name`, and nothing to download."""
    versions = torchvision.models.get_model_weights(name)

    def get_state_dict(self, *args, check_hash=False, **kwargs):
        assert self is versions.IMAGENET1K_V1 and check_hash
        return state

    monkeypatch.setattr(versions, 'get_state_dict', get_state_dict)


PRETRAINED = [
    ('resnet50', 'resnet50', 'fc.'),
    ('mobilenet_v2', 'mobilenet_v2', 'classifier.1.'),
    ('mobilenet_v2_mgd', 'mobilenet_v2', 'classifier.1.'),
    ('shufflenet_v2', 'shufflenet_v2_x1_0', 'fc.'),
    ('squeezenet1_1', 'squeezenet1_1', 'classifier.1.'),
]


@pytest.mark.parametrize('name, source, head', PRETRAINED)
def test_pretrained(monkeypatch, name, source, head):
    torch.manual_seed(1)
    state = with_statistics(torchvision.models.get_model(source)).state_dict()
    publish(monkeypatch, source, state)
    assert_same_tensors(create_model(name, pretrained=True).state_dict(), state)

    other = create_model(name, 10, pretrained=True).state_dict()
    assert list(other) == list(state)
    assert {key for key in state if other[key].shape != state[key].shape} == {f'{head}weight', f'{head}bias'}
    assert other[f'{head}weight'].shape[0] == 10
    assert all(torch.equal(other[key], state[key]) for key in state if not key.startswith(head))


@pytest.mark.filterwarnings('ignore:The default weight initialization:FutureWarning')
def test_pretrained_inception_loses_its_auxiliary_head_only(monkeypatch):
    state = torchvision.models.inception_v3(init_weights=False).state_dict()
    publish(monkeypatch, 'inception_v3', state)
    model = create_model('inception_v3', pretrained=True)
    assert model.train()(images(96, 96)).shape == (2, 1000)
    assert set(state) - set(model.state_dict()) == {key for key in state if key.startswith('AuxLogits')}


@pytest.mark.parametrize('num_classes', [1000, 10])
def test_pretrained_is_strict(monkeypatch, num_classes):
    state = torchvision.models.resnet18().state_dict()
    del state['layer4.1.bn2.weight']
    publish(monkeypatch, 'resnet18', state)
    with pytest.raises(RuntimeError, match=r'Missing key.*layer4.1.bn2.weight'):
        create_model('resnet18', num_classes, pretrained=True)


def test_a_failed_download_is_told_as_it_is(monkeypatch):
    def fail(self, *args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, 'get_state_dict', fail)
    with pytest.raises(OSError, match='no network'):
        create_model('resnet18', pretrained=True)


def test_mobilenet_v1_has_no_published_weights():
    with pytest.raises(ValueError, match=r'mobilenet_v1.*file') as error:
        create_model('mobilenet_v1', pretrained=True)
    assert '\n' not in str(error.value)
