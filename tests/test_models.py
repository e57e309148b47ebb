"""Networks for ImageNet: equality with torchvision, the stages they show; and `create_model`."""
import pytest
import torch
import torchvision
from zoo import build, pictures, with_statistics

from models import create_model, model_names
from models.imagenet import NETWORKS
from utils import checkpoint

TORCHVISION = [name for name in torchvision.models.list_models(module=torchvision.models) if name in NETWORKS]


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
    x = 10 * pictures(64)  # large enough to tell ReLU from ReLU6
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


@pytest.mark.parametrize('name, maps', [
    ('mobilenet_v2', [(144, 56), (192, 28), (576, 14), (960, 7)]),
    ('mobilenet_v2_mgd', [(144, 28), (192, 28), (384, 14), (960, 7)]),
])
def test_mobilenet_v2_taps(name, maps):
    with torch.no_grad():
        out = build(name).eval()(pictures(224, n=1), features=True)
    assert [(m.shape[1], m.shape[2]) for m in out.maps] == maps
    assert out.head.shape[1] == 1280


def test_mgds_mobilenet_v2_has_no_dropout():
    networks, images = [build(name).train() for name in ('mobilenet_v2', 'mobilenet_v2_mgd')], pictures(32, n=2)
    with torch.no_grad():
        assert [torch.equal(network(images), network(images)) for network in networks] == [False, True]


def test_stages_of_the_other_networks():
    with torch.no_grad():
        for name, maps in {
            'resnet18': [(64, 16), (128, 8), (256, 4), (512, 2)],
            'resnet50': [(256, 16), (512, 8), (1024, 4), (2048, 2)],
            'mobilenet_v1': [(128, 16), (256, 8), (512, 4), (1024, 2)],
            'shufflenet_v2': [(116, 8), (232, 4), (464, 2)],
        }.items():
            assert [(m.shape[1], m.shape[2]) for m in build(name).eval()(pictures(64), features=True).maps] == maps


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
    assert getattr(create_model(name, 10), 'transform_input', True)  # as those with published weights
    assert create_model(name, 10).train()(pictures(size)).shape == (2, 10)


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
def google(num_classes):
    return torchvision.models.googlenet(num_classes=num_classes, init_weights=False)


def test_auxiliary_heads_go_whoever_makes_the_network():
    assert create_model('test_models:google', 5).train()(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


def test_pretrained_inception_loses_its_auxiliary_head_only(monkeypatch):
    state = torchvision.models.inception_v3(init_weights=False).state_dict()
    publish(monkeypatch, 'inception_v3', state)
    model = create_model('inception_v3', pretrained=True)
    assert model.train()(pictures(96)).shape == (2, 1000)
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


@pytest.mark.parametrize('name', ['mobilenet_v2', 'mobilenet_v2_mgd', 'shufflenet_v2', 'shufflenet_v2_x0_5'])
def test_files_of_mgd_load(name, tmp_path):
    """Whose MobileNetV2 begins and ends in blocks, and whose ShuffleNetV2 counts the ReLU that a branch begins with."""
    network = with_statistics(build(name))
    own, theirs = network.state_dict(), {}
    for key, value in own.items():
        first, *_ = parts = key.split('.')
        if 'mobilenet' in name:
            parts = [first, parts[1], 'conv', *parts[2:]] if parts[1] in ('0', '18') else parts
            parts = ['classifier', '0', parts[2]] if first == 'classifier' else parts
        elif first == 'conv5' or (first.startswith('stage') and parts[:2] != ['stage2', '0']):
            parts[-2] = str(int(parts[-2]) + 1)
        theirs['.'.join(parts)] = value
    assert theirs.keys() != own.keys() and len(theirs) == len(own)
    for content in theirs, own:  # and torchvision's
        torch.save(content, tmp_path / 'w.pth')
        loaded = build(name)
        checkpoint.load_weights(loaded, tmp_path / 'w.pth')
        assert_same_tensors(loaded.state_dict(), own)


def test_files_of_networks_with_dataparallel_inside_load(tmp_path):
    network = torch.nn.ModuleDict({'features': torch.nn.Conv2d(3, 4, 1), 'classifier': torch.nn.Linear(4, 2)})
    torch.save({'state_dict': {key.replace('features.', 'features.module.'): value
                               for key, value in network.state_dict().items()}}, tmp_path / 'w.pth')
    other = torch.nn.ModuleDict({'features': torch.nn.Conv2d(3, 4, 1), 'classifier': torch.nn.Linear(4, 2)})
    checkpoint.load_weights(other, tmp_path / 'w.pth')
    assert_same_tensors(other.state_dict(), network.state_dict())
