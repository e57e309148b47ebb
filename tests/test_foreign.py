"""Networks from elsewhere: what the adapter shows of them, against passes by hand; names, weights, images."""
import copy
import json
import pickle
import shutil
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import assert_same
from test_methods import REFUSED
from torch import nn
from torchvision.transforms import functional as pixels

from distillers import DISTILLERS, Distillation
from distillers.lean import folded
from distillers.networks import build_student, build_teacher
from models import Foreign, Renormalised, create_model
from utils import checkpoint
from utils.data import Batch

CLASSES, SIZE = 5, 64


def images(n=2, size=SIZE, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def plain(name):
    torch.manual_seed(0)
    make = small_vgg if name == 'vgg11_bn' else torchvision.models.get_model
    network = make(name, num_classes=CLASSES)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return network.eval()


def small_vgg(name, num_classes):
    """Its classifier alone has 120 million weights to make up."""
    with torch.device('meta'):
        network = torchvision.models.get_model(name, init_weights=False)
    for i, layer in ((0, nn.Linear(25088, 32)), (3, nn.Linear(32, 32)), (6, nn.Linear(32, num_classes))):
        network.classifier[i] = layer
    network.features.to_empty(device='cpu')
    for layer in network.features:
        if hasattr(layer, 'reset_parameters'):
            layer.reset_parameters()
    return network


def foreign(network, **how):
    return Foreign(copy.deepcopy(network), CLASSES, **{'sizes': (SIZE,)} | how)


# The networks once more, layer by layer, in place nowhere: preact, maps, head or None for one pixel, pooled, logits

def basic(block, x):
    y = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    return y + (x if block.downsample is None else block.downsample(x))


def resnet18(m, x):
    x, preact, maps = F.max_pool2d(F.relu(m.bn1(m.conv1(x))), 3, 2, 1), [], []
    for stage in (m.layer1, m.layer2, m.layer3, m.layer4):
        x = F.relu(basic(stage[0], x))
        preact.append(basic(stage[1], x))
        maps.append(x := F.relu(preact[-1]))
    pooled = x.mean((2, 3))
    return preact, maps, x, pooled, m.fc(pooled)


def vgg11_bn(m, x):
    preact, maps = [], []
    for layer, following in zip(m.features, [*m.features[1:], None]):
        before, x = x, F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
        if isinstance(following, nn.MaxPool2d):
            preact.append(before)
            maps.append(x)
    hidden = F.relu(m.classifier[3](F.relu(m.classifier[0](m.avgpool(x).flatten(1)))))
    return preact[1:], maps[1:], None, hidden, m.classifier[6](hidden)


def mobilenet_v3_small(m, x):
    maps = []
    for i, block in enumerate(m.features[:12]):
        x = block(x)
        maps += [x.clone()] * (i in (1, 3, 8))
    preact = m.features[12][1](m.features[12][0](x))
    last = F.hardswish(preact)
    hidden = F.hardswish(m.classifier[0](last.mean((2, 3))))
    return [*maps, preact], [*maps, last], None, hidden, m.classifier[3](hidden)


def densenet121(m, x):
    maps = []
    for name, layer in m.features.named_children():
        x = layer(x.clone())
        maps += [x] * (name in ('denseblock1', 'denseblock2', 'denseblock3', 'norm5'))
    head = F.relu(x)
    return maps, maps, head, head.mean((2, 3)), m.classifier(head.mean((2, 3)))


def regnet_y_400mf(m, x):
    x, preact, maps = m.stem(x), [], []
    for stage in m.trunk_output:
        *blocks, last = stage
        for block in blocks:
            x = block(x)
        preact.append((x if last.proj is None else last.proj(x)) + last.f(x))
        maps.append(x := F.relu(preact[-1]))
    return preact, maps, x, x.mean((2, 3)), m.fc(x.mean((2, 3)))


def efficientnet_b0(m, x):
    maps = []
    for i, stage in enumerate(m.features[:8]):
        x = stage(x)
        maps += [x] * (i in (2, 3, 5))
    preact = m.features[8][1](m.features[8][0](x))
    x = F.silu(preact)
    return [*maps, preact], [*maps, x], x, x.mean((2, 3)), m.classifier[1](x.mean((2, 3)))


def convnext_tiny(m, x):
    maps = []
    for i, stage in enumerate(m.features):
        x = stage(x)
        maps += [x] * (i % 2)
    pooled = m.classifier[0](x.mean((2, 3), keepdim=True)).flatten(1)
    return maps, maps, None, pooled, m.classifier[2](pooled)


FAMILIES = [resnet18, vgg11_bn, mobilenet_v3_small, densenet121, regnet_y_400mf, efficientnet_b0, convnext_tiny]


@pytest.mark.parametrize('by_hand', FAMILIES, ids=lambda f: f.__name__)
def test_features_are_those_of_a_pass_by_hand(by_hand):
    network = plain(by_hand.__name__)
    adapted = foreign(network)
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    with torch.no_grad():
        shown, logits = adapted(images(), features=True), network(images())
        preact, maps, head, pooled, by_hand_logits = by_hand(network, images())
    assert torch.equal(shown.logits, logits) and torch.equal(adapted(images()), logits)
    close = {'rtol': 1e-4, 'atol': 1e-5}
    torch.testing.assert_close(by_hand_logits, logits, **close)
    torch.testing.assert_close(shown.maps, maps, **close)
    torch.testing.assert_close(shown.preact, preact, **close)
    torch.testing.assert_close(shown.pooled, pooled, **close)
    torch.testing.assert_close(shown.head, pooled[:, :, None, None] if head is None else head, **close)
    torch.testing.assert_close(adapted.classifier(shown.pooled), shown.logits, **close)
    assert adapted.feature_channels == [x.shape[1] for x in maps]
    for norm, channels, x in zip(adapted.feature_norms, adapted.feature_channels, preact):
        assert norm is None or (norm.num_features == channels == x.shape[1])
    assert_same(adapted.state_dict(), before)
    assert_same(adapted.state_dict(), network.state_dict())
    assert not adapted.training  # as it came


@pytest.mark.parametrize('training', [True, False])
def test_torchvisions_resnet18_is_ours(training):
    theirs = foreign(plain('resnet18')).train(training)
    ours = create_model('resnet18', CLASSES).train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for a, b in zip(theirs(images(), features=True), ours(images(), features=True)):
        for x, y in zip(a, b) if isinstance(a, list) else [(a, b)]:
            assert torch.equal(x, y)
    names = {module: name for name, module in theirs.network.named_modules()}
    assert [names[norm] for norm in theirs.feature_norms] == [f'layer{i}.1.bn2' for i in range(1, 5)]

    for network in (theirs, ours):
        s = network(images(), features=True)
        sum(x.square().sum() for x in [s.logits, s.pooled, s.head, *s.preact, *s.maps]).backward()
    assert_same(*({key.removeprefix('network.'): p.grad for key, p in network.named_parameters()}
                  for network in (theirs, ours)))


# Made-up networks

class Block(nn.Module):
    def __init__(self, c_in, c_out, relu=None):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(c_in, c_out, 3, 2, 1), relu or nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(c_out)

    def forward(self, x):
        return self.relu(self.norm(self.conv(self.relu(x))))


def nothing(network, x):
    return x


class Net(nn.Module):
    """A ReLU that all share, and something that happens to the maps after the fact."""

    def __init__(self, num_classes=CLASSES, after=nothing):
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.stem, self.after = nn.Conv2d(3, 4, 3, 2, 1), after
        self.one, self.two = Block(4, 6, relu), Block(6, 8, relu)
        self.dropout, self.fc = nn.Dropout(0.5, inplace=True), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.after(self, self.one(self.stem(x)))
        x = self.after(self, self.two(x))
        return self.fc(self.dropout(x.mean((2, 3))))


def made_up(num_classes=CLASSES, **how):
    torch.manual_seed(0)
    return Net(num_classes, **how).eval()


def not_a_network(num_classes):
    return 'resnet18'


def without_classes():
    return Net()


def by_hand(m, x):
    preact, maps = [], []
    x = m.stem(x)
    for block in (m.one, m.two):
        preact.append(block.norm(block.conv(F.relu(x))))
        maps.append(F.relu(preact[-1]))
        x = m.after(m, maps[-1].clone())
    return preact, maps, x.mean((2, 3))


def double(network, x):
    return x.mul_(2)


def double_in_training(network, x):
    return x.mul_(2) if network.training else x


@pytest.mark.parametrize('after', [nothing, double])
def test_what_is_overwritten_in_place_is_shown_as_it_was(after):
    network = made_up(after=after)
    adapted = foreign(network)
    with torch.no_grad():
        shown = adapted(images(), features=True)
        preact, maps, pooled = by_hand(network, images())
    torch.testing.assert_close((shown.preact, shown.maps, shown.pooled), (preact, maps, pooled))
    assert torch.equal(shown.logits, network(images()))
    assert len(adapted.copied) == (2 if after is double else 0) and adapted.maps[0].path == 'one'
    torch.testing.assert_close(shown.head.mean((2, 3)), pooled)  # what is pooled is the map as it is then

    adapted.train()
    shown = adapted(images(), features=True)
    assert not (shown.pooled == 0).any()  # seen ahead of the dropout, which is in place no more


OWN = '''
from torchvision.models import squeezenet1_1
from torch import nn

class Extra(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(squeezenet1_1(num_classes=num_classes))
    def get_extra_state(self):
        return {'version': 1}
    def set_extra_state(self, state):
        pass

def frozen(num_classes):
    return squeezenet1_1(num_classes=num_classes).requires_grad_(False)
'''


def test_networks_that_cannot_be_trained_or_kept_are_refused_at_once(base, images, tmp_path, monkeypatch):
    (tmp_path / 'own_odd.py').write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    for name, complaint in (('Extra', '_extra_state of its state is no tensor'), ('frozen', 'has nothing to train')):
        run = base(images, '--arch', f'own_odd:{name}', '--image-size', 64, '--output', tmp_path / name)
        assert run.code == 1 and complaint in run.err and len(run.err.splitlines()) == 1
    assert base(images, '--arch', 'own_odd:frozen', '--image-size', 64, '--evaluate').code == 0


def test_what_is_overwritten_in_training_alone_is_noticed():
    adapted = foreign(made_up(after=double_in_training))
    adapted(images(), features=True)
    with pytest.raises(RuntimeError, match=r'in place.*at one, two'):
        adapted.train()(images(), features=True)


def test_stages_by_name():
    network = plain('resnet18')
    adapted = foreign(network, stages=['layer3.0', 'layer1.0.conv1'])
    assert adapted.feature_channels == [64, 256] and 'layer3.0 [256, 4, 4] after layer3.0.relu' in adapted.told
    with pytest.raises(ValueError, match=r'^layer5 is none of its modules; stages could be .*layer1') as error:
        foreign(network, stages=['layer5'])
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='fc shows no map; '):
        foreign(network, stages=['fc'])


def test_copies_replicas_and_pickles_have_notes_of_their_own():
    adapted = foreign(made_up())
    adapted(images(), features=True)
    others = [copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted)), replica(adapted), replica(adapted)]
    expected, got = [adapted(images(seed=i), features=True) for i in range(4)], [None] * 4
    barrier = threading.Barrier(4)

    def meet(module, inputs):  # all are in the midst of their pass at once
        barrier.wait(20)
    for network in (adapted, *others[:2]):  # the replicas share the hooks
        network.network.two.register_forward_pre_hook(meet)

    def run(i):
        got[i] = others[i](images(seed=i), features=True)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(expected, got):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


def replica(network: nn.Module) -> nn.Module:
    """What DataParallel makes for another device."""
    copies = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, twin in copies.items():
        for name, child in module.named_children():
            setattr(twin, name, copies[child])
        for name, value in module.named_parameters(recurse=False):
            setattr(twin, name, value)
    return copies[network]


def test_compilation_comes_after():
    adapted = foreign(made_up(after=double))
    compiled = torch.compile(adapted, backend='eager', fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(), features=True), adapted(images(), features=True))
    network = made_up()
    network.compile()
    for late in (network, torch.compile(made_up())):
        with pytest.raises(ValueError, match='compiled already'):
            Foreign(late, CLASSES)


def test_norms_that_were_folded_are_still_seen():
    network = made_up()
    nn.init.uniform_(network.one.norm.running_mean)
    adapted = foreign(network, stages=['one.norm', 'two'])
    adapted.image_size = SIZE
    torch.testing.assert_close(folded(adapted)(images(), features=True), adapted(images(), features=True))


def test_a_network_without_maps():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 8, 1, 2, 12, 24, num_classes=CLASSES)
    nn.init.normal_(vit.heads.head.weight)
    teacher, student = foreign(vit, sizes=(224, 16)), foreign(made_up())
    teacher.image_size = student.image_size = 16
    shown = teacher(images(size=16), features=True)
    assert shown.maps == shown.preact == teacher.feature_norms == [] and shown.pooled.shape == (2, 12)
    torch.testing.assert_close(teacher.classifier(shown.head.mean((2, 3))), shown.logits)

    for name, method in DISTILLERS.items():
        reads = {*(method.teacher_reads or ())}
        if reads & {'preact', 'maps'}:
            with pytest.raises(ValueError, match='has no maps'):
                method(student, teacher)
        elif reads and 'wider' not in REFUSED.get(name, ()):
            task = Distillation(copy.deepcopy(student), teacher, {name: method(student, teacher)})
            batch = Batch(images(4, 16), torch.arange(4), torch.arange(4), None)
            task.know(torch.arange(40) % CLASSES)
            assert sum(task(batch)[1].values()).isfinite()


@pytest.mark.parametrize('name', ['mgd', 'ofd', 'at'])
def test_a_training_step(name):
    torch.manual_seed(0)
    student, teacher = foreign(made_up()).train(), foreign(plain('regnet_y_400mf'), stages=['trunk_output.block1',
                                                                                            'trunk_output.block2'])
    student.image_size = teacher.image_size = SIZE
    if name == 'mgd':
        teacher = foreign(made_up())
    task = Distillation(student, teacher, {name: DISTILLERS[name](student, teacher)})
    batch = Batch(images(4), torch.arange(4), torch.arange(4), None)
    task.start_epoch(1, lambda: [batch])
    loss = task(batch)[1][name]
    loss.backward()
    assert loss > 0 and student.network.one.conv.weight.grad.abs().sum() > 0


# Names

@pytest.mark.parametrize('name, complaint', [
    ('torchvision:resnt18', "'resnt18', close to it: .*resnet18"),
    ('nosuch.package:net', "cannot import nosuch.package .No module named 'nosuch'"),
    ('test_foreign:mad_up', "'mad_up', close to it: made_up"),
    ('test_foreign:not_a_network', 'not_a_network returns str instead of'),
    ('test_foreign:without_classes', r'without_classes\(num_classes=5\) is what is called, but'),
])
def test_a_name_that_leads_nowhere(name, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        create_model(name, CLASSES)
    assert '\n' not in str(error.value)


def test_mistakes_of_a_package_are_told_with_their_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'mistaken.py').write_text('classes = 5\nnets = clases\n')
    (tmp_path / 'careless.py').write_text('def net(num_classes):\n    return {}[num_classes]\n')
    for name, complaint in (('mistaken:net', r"cannot import mistaken: .*'clases'.*\(NameError at .*mistaken.py:2\)"),
                            ('careless:net', r'net cannot make it: 5 \(KeyError at .*careless.py:2\)')):
        with pytest.raises(ValueError, match=complaint) as error:
            create_model(name, CLASSES)
        assert '\n' not in str(error.value)


def test_what_cannot_be_taken_in():
    class Tuple(Net):
        def forward(self, x):
            return super().forward(x), x

    class Silent(Net):
        def forward(self, x):
            return x.mean((2, 3)).repeat(1, 2)[:, :CLASSES]

    for network, complaint in ((Tuple(), 'tuple of an image'), (Net(7), r'\[1, 7\] of an image.*5 classes'),
                               (Silent(), 'classifier is not found')):
        with pytest.raises(ValueError, match=complaint):
            Foreign(network, CLASSES)
    with pytest.raises(ValueError, match='does not take images of 8 or 9 pixels'):
        Foreign(torchvision.models.alexnet(num_classes=CLASSES), CLASSES, sizes=(8, 9))


class Cosine(nn.Module):
    """A classifier by angles, which is no nn.Linear."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, 8))

    def forward(self, x):
        return 10 * F.linear(F.normalize(x), F.normalize(self.weight))


def test_a_classifier_may_go_by_cosines():
    network = made_up()
    network.fc = Cosine()
    adapted = Foreign(network, CLASSES)
    shown = adapted(images(), features=True)
    torch.testing.assert_close(network.fc(shown.pooled), shown.logits)
    assert shown.pooled.shape == (2, 8) and adapted.classifier_path == 'fc'
    KD, SimKD = DISTILLERS['kd'], DISTILLERS['simkd']
    KD(adapted, adapted)
    with pytest.raises(ValueError, match='its logits are not just what fc'):
        SimKD(adapted, adapted)


def test_a_size_may_be_refused_by_any_error():
    def table(network, x):
        return x + {4: 0, 2: 0}[x.shape[-1]]  # of images of 16 pixels

    assert Foreign(made_up(after=table), CLASSES, sizes=(224, 16)).image_size == 16


class InTraining(Net):
    """Does otherwise than in an evaluation, of which the probe is one."""

    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


def in_training(num_classes):
    return InTraining(num_classes)


def test_a_network_that_returns_more_in_training_is_one_line(base, distill, images, tmp_path):
    assert base(images, '--arch', 'test_foreign:in_training', '-e').code == 0
    teacher = ['--teacher-arch', 'test_foreign:made_up', '--distiller', 'kd', '--teacher-resume', tmp_path / 't.pth']
    torch.save(Net(3).state_dict(), tmp_path / 't.pth')
    for run in (base(images, '--arch', 'test_foreign:in_training', '--epochs', 1),
                distill(images, '--arch', 'test_foreign:in_training', '--epochs', 1, *teacher)):
        assert run.code == 1 and 'returns a tuple, but it has to return its logits alone' in run.err, run.err
        assert run.err.count('\n') == 1


def test_dropout_in_place_spoils_nothing():
    """A probe passes it over; in training it would change the map that was shown before."""
    network = made_up()
    network.between = nn.Dropout2d(0.5, inplace=True)
    network.after = lambda network, x: network.between(x)
    adapted = Foreign(network, CLASSES).train()
    torch.manual_seed(0)
    shown = adapted(images(), features=True)
    assert len(shown.maps) == 2 and (shown.maps[0] > 0).any() and not network.between.inplace


def test_a_network_whose_rows_depend_on_the_size_is_taken_in_at_its_own():
    class Rows(Net):
        def forward(self, x):
            x = F.avg_pool2d(self.two(self.one(self.stem(x))), 2)
            return self.fc(x.permute(0, 2, 3, 1).reshape(-1, 8))

    adapted = Foreign(Rows(), CLASSES, sizes=(64, 16))
    assert adapted.image_size == 16 and adapted(images(3, 16), features=True).logits.shape == (3, CLASSES)
    with pytest.raises(ValueError, match=r'not take images of 64 pixels: it makes \[16, 5\] of an image'):
        Foreign(Rows(), CLASSES, sizes=(64,))


def test_a_norm_that_a_convolution_follows_tells_nothing_of_the_map():
    class Preactivated(nn.Module):
        def __init__(self, c_in, c_out):
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, 2, 1)
            self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1)

        def forward(self, x):
            x = self.conv(F.relu(self.bn(x)))
            return x + self.conv2(F.relu(self.bn2(x)))

    network = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), Preactivated(4, 8), Preactivated(8, 8), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten(), nn.Linear(8, CLASSES))
    adapted = Foreign(network, CLASSES, sizes=(32,))
    assert adapted.feature_channels == [8, 8] and adapted.feature_norms == [None, None]


@pytest.mark.filterwarnings('ignore:The default weight initialization:FutureWarning')
def test_mnasnet_takes_bare_tensors(tmp_path):
    network, other = (Foreign(create_model('mnasnet0_5', CLASSES), CLASSES, sizes=(64,)) for _ in range(2))
    torch.save(dict(network.state_dict()), tmp_path / 'w.pth')
    checkpoint.load_weights(other, tmp_path / 'w.pth')
    average = torch.optim.swa_utils.AveragedModel(other)
    average.load_state_dict(torch.optim.swa_utils.AveragedModel(network).state_dict())
    for loaded in (other, average.module, copy.deepcopy(network)):
        assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in network.state_dict().items())


def test_a_linear_layer_that_does_otherwise_tells_no_logits():
    class Cosine(nn.Linear):
        def forward(self, x):
            return 5 * F.linear(F.normalize(x), F.normalize(self.weight))

    network = made_up()
    assert Foreign(network, CLASSES).classifier is network.fc
    network.fc = Cosine(8, CLASSES)
    with pytest.raises(ValueError, match='not just what fc, its last linear layer, makes'):
        Foreign(network, CLASSES).classifier  # noqa: B018


def test_names_of_all_kinds(tmp_path, monkeypatch):
    assert type(create_model('torchvision:resnet18', 3)) is torchvision.models.ResNet
    (tmp_path / 'somebodys').mkdir()
    (tmp_path / 'somebodys' / 'nets.py').write_text('from torch import nn\n\n\ndef net(num_classes):\n'
                                                    '    return nn.Linear(2, num_classes)\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    assert create_model('somebodys.nets:net', 7, pretrained=True).out_features == 7
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ValueError, match='pip install timm'):
        create_model('timm:resnet18', 3)


# Images and classes of the teacher

def settings(**values):
    return SimpleNamespace(**{'teacher_arch': 'test_foreign:made_up', 'dataset': 'imagefolder', 'image_size': 64,
                              'mean': None, 'std': None, 'evaluate': False, 'teacher_resume': None,
                              'teacher_mean': None, 'teacher_std': None, 'teacher_size': None, 'teacher_stages': None,
                              **values})


def test_the_teacher_gets_its_own_images(capsys, tmp_path):
    raw = torch.rand(2, 3, 48, 48)
    mean, std, mean_t, std_t = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    given = pixels.normalize(raw, mean, std)
    network = nn.Sequential(nn.Identity())
    torch.testing.assert_close(Renormalised(network, (mean, std), (mean_t, std_t), 48)(given),
                               pixels.normalize(raw, mean_t, std_t))
    torch.testing.assert_close(Renormalised(network, (mean, std), (mean_t, std_t), 32)(given),
                               pixels.normalize(pixels.resize(raw, [32, 32], antialias=True), mean_t, std_t))

    assert type(build_teacher(settings(teacher_mean=mean, teacher_std=std), 3)) is Net
    (tmp_path / 'args.json').write_text(json.dumps({'dataset': 'imagefolder', 'image_size': 64, 'mean': mean_t,
                                                    'std': std_t}))
    for told, noted in (({}, True), ({'teacher_mean': mean_t, 'teacher_std': std_t}, False),
                        ({'mean': mean_t, 'std': std_t}, False),
                        ({'mean': mean_t, 'std': std_t, 'teacher_size': 32}, True)):
        build_teacher(settings(teacher_resume=tmp_path / 't.pth', **told), 3)
        assert (f'was trained on images of mean {tuple(mean_t)}' in capsys.readouterr().out) == noted, told
    seen = build_teacher(settings(teacher_std=std_t, teacher_size=32), 5, shows=True)
    assert seen.size == 32 and f'mean {tuple(mean)}, std {tuple(std_t)} and 32 pixels' in capsys.readouterr().out
    assert seen.feature_channels == [6, 8] and seen.feature_norms[0].num_features == 6
    assert seen.classifier is seen.network.network.fc
    Net().load_state_dict(seen.state_dict(), strict=True)
    other = torch.optim.swa_utils.AveragedModel(seen)
    nn.init.ones_(other.module.network.network.fc.bias)
    copy.deepcopy(seen).load_state_dict(other.module.state_dict(), strict=True)
    again = torch.optim.swa_utils.AveragedModel(build_teacher(settings(teacher_size=32), 5))
    again.load_state_dict(other.state_dict())
    assert again.module.network.fc.bias.eq(1).all()


def test_classes_in_another_order_are_refused(tmp_path, capsys):
    content = {'format': checkpoint.FORMAT, 'model': Net().state_dict(), 'classes': ['ant', 'bee', 'cat']}
    torch.save(content, tmp_path / 'c.pth')
    checkpoint.load_weights(Net(), tmp_path / 'c.pth', classes=['ant', 'bee', 'cat'])
    with pytest.raises(SystemExit, match='output 1 is bee there and cat here'):
        checkpoint.load_weights(Net(), tmp_path / 'c.pth', classes=['ant', 'cat', 'bee'])
    with pytest.raises(SystemExit, match='output 3 is None there and dog here'):
        checkpoint.load_weights(Net(), tmp_path / 'c.pth', classes=['ant', 'bee', 'cat', 'dog'])
    # names that nobody gave: outputs beyond the classes, in a file that was exported; images that are made up
    for known, here in ((['ant', 'bee', 'output 2'], ['ant', 'bee']), (['ant'], ['output 0', 'output 1']),
                        ([f'output {i}' for i in range(3)], ['ant', 'bee'])):
        torch.save(content | {'classes': known}, tmp_path / 'c.pth')
        checkpoint.load_weights(Net(), tmp_path / 'c.pth', classes=here)


def test_imagenets_network_of_a_name_that_cifar_has_is_told_of(capsys):
    for arch, dataset, told in (('resnet18', 'cifar100', True), ('resnet20', 'cifar100', False),
                                ('resnet18', 'imagefolder', False)):
        build_student(settings(arch=arch, dataset=dataset, image_size=32), CLASSES)
        assert ("resnet18 is ImageNet's" in capsys.readouterr().out) == told


def test_bare_weights_of_a_run_know_their_classes(base, images, tmp_path):
    """Of data with fewer, or others, no output would stand for what it stood for."""
    run, other = tmp_path / 'run', tmp_path / 'other'
    assert base(images, '--epochs', 1, '--output', run).code == 0
    shutil.copytree(images, other)
    for split in ('train', 'valid'):
        shutil.rmtree(other / split / 'bee')
    named = ['-e', '--student-resume', run / 'best.pth']
    for weights in (named, ['-e', '--output', run], ['--teacher-arch', 'resnet8', '--teacher-resume', run / 'last.pth',
                                                     *named]):
        refused = base(other, '--num-classes', 3, *weights)
        assert refused.code == 1 and 'output 1 is bee there and cat here' in refused.err, refused.err
    (run / 'best.pth').rename(other / 'best.pth')
    believed = base(other, '--num-classes', 3, '-e', '--student-resume', other / 'best.pth')
    assert believed.code == 0, believed.err
    assert base(images, '-e', '--student-resume', run / 'last.pth').code == 0
    (run / 'predictions.npz').write_bytes(b'torn')
    assert base(images, '-e', '--student-resume', run / 'last.pth').code == 0


def test_from_beginning_to_end(distill, base, images, tmp_path, monkeypatch):
    """A foreign student under a foreign teacher with its own images; what is shipped fits the bare network."""
    torch.manual_seed(1)
    torch.save({'state_dict': {f'module.{k}': v for k, v in Net(3).state_dict().items()}}, tmp_path / 't.pth')
    pair = ['--arch', 'test_foreign:made_up', '--teacher-arch', 'test_foreign:made_up', '--teacher-resume',
            tmp_path / 't.pth', '--teacher-mean', 0.5, 0.5, 0.5, '--teacher-size', 48]
    run = distill(images, *pair, '--epochs', 1, '--distiller', 'at', 'kd', '--ema', 0.9, '--teacher-stages', 'one',
                  '--student-stages', 'one', '--at-pairing', 'depth', '--output', tmp_path / 'run')
    assert run.code == 0, run.err
    assert 'test_foreign:made_up: stages one [6, 56, 56] after one.relu; head two' in run.out
    assert 'images of mean (0.5, 0.5, 0.5), std (0.229, 0.224, 0.225) and 48 pixels' in run.json()['teacher']
    assert run.weights('checkpoint.pth')['classes'] == ['ant', 'bee', 'cat']
    for name in ('last.pth', 'best.pth'):
        Net(3).load_state_dict(run.weights(name), strict=True)
    again = distill(images, *pair, '-e', '--distiller', 'kd', '--student-resume', tmp_path / 'run' / 'last.pth',
                    '--output', tmp_path / 'e')
    plainly = base(images, *pair, '-e', '--student-resume', tmp_path / 'run' / 'last.pth', '--output', tmp_path / 'b')
    scores = again.json('evaluate.json')['scores']
    assert scores == plainly.json('evaluate.json')['scores'] and scores['student'] == {
        **run.log()[0]['valid']} and scores['teacher'] == run.json('start.json')['scores']['teacher']


# timm

def test_timm():
    timm = pytest.importorskip('timm', reason='timm is not installed')
    with pytest.raises(ValueError, match=r"'resnet5O', close to it: .*resnet50"):
        create_model('timm:resnet5O', 3)
    adapted = Foreign(create_model('timm:resnet18', CLASSES), CLASSES, sizes=(SIZE,))
    assert [tap.path for tap in adapted.maps] == ['layer1', 'layer2', 'layer3', 'layer4']
    inside = timm.create_model('resnet18', features_only=True, out_indices=(1, 2, 3, 4)).eval()
    inside.load_state_dict(adapted.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(images(), features=True).maps, inside(images()))

    vit = build_teacher(settings(teacher_arch='timm:vit_tiny_patch16_224', teacher_mean=(0.5, 0.5, 0.5),
                                           teacher_std=(0.5, 0.5, 0.5), teacher_size=224), CLASSES, shows=True)
    shown = vit(images(), features=True)
    assert shown.maps == [] and shown.pooled.shape == (2, 192)
    torch.testing.assert_close(vit.classifier(shown.pooled), shown.logits)


def test_images_of_torchvision(monkeypatch, capsys):
    name, state = 'torchvision:squeezenet1_1', torchvision.models.squeezenet1_1().state_dict()
    weights = torchvision.models.SqueezeNet1_1_Weights
    monkeypatch.setattr(weights, 'get_state_dict', lambda self, **_: copy.deepcopy(state))
    assert not hasattr(build_teacher(settings(teacher_arch=name), 1000, pretrained=True), 'identity')
    others = torchvision.models.EfficientNet_V2_L_Weights.IMAGENET1K_V1.transforms  # half and half, alone of them all
    monkeypatch.setattr(weights, 'transforms', lambda self: others())
    teacher = build_teacher(settings(teacher_arch=name), 1000, pretrained=True)
    assert teacher.identity == ', images of mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5) and 64 pixels'
    assert teacher.identity in capsys.readouterr().out


def test_images_of_timm(monkeypatch, capsys):
    def create(name, pretrained, num_classes):
        network = made_up(num_classes)
        network.pretrained_cfg = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5), 'input_size': (3, 32, 32)}
        return network
    timm = SimpleNamespace(is_model=lambda name: True, create_model=create)
    monkeypatch.setitem(sys.modules, 'timm', timm)
    args = settings(teacher_arch='timm:x')
    teacher = build_teacher(args, CLASSES, pretrained=True)
    assert teacher.size == 32 and 'mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5) and 32' in capsys.readouterr().out
    assert type(build_teacher(args, CLASSES)) is Net  # somebody's weights
    assert 'published for images of mean (0.5, 0.5, 0.5)' in capsys.readouterr().out
