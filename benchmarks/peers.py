"""Other projects, from checkouts on this machine. Their code is imported as it is.

The only help it gets: stand-ins for modules that cannot be imported, and on a CPU tensors whose .cuda() does nothing.
"""
import contextlib
import importlib
import importlib.util
import io
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment
from torch import nn
from torchvision import datasets

from utils.setup import precision

from .harness import Settings

MGD, MDISTILLER, TORCHDISTILL = 'KaiyuYue/mgd', 'megvii-research/mdistiller', 'yoshitomo-matsubara/torchdistill'
PEERS = (MGD, MDISTILLER, TORCHDISTILL)


class LinearSumAssignment(SimpleLinearSumAssignment):
    """ortools.graph.pywrapgraph's, by its names of today."""
    AddArcWithCost = SimpleLinearSumAssignment.add_arc_with_cost
    Solve = SimpleLinearSumAssignment.solve
    RightMate = SimpleLinearSumAssignment.right_mate
    NumNodes = SimpleLinearSumAssignment.num_nodes
    AssignmentCost = SimpleLinearSumAssignment.assignment_cost


@cache
def load(folder):
    """Its distiller and its networks, under names that do not collide with ours."""
    pywrapgraph = ModuleType('ortools.graph.pywrapgraph')
    pywrapgraph.LinearSumAssignment = LinearSumAssignment
    sys.modules[pywrapgraph.__name__] = pywrapgraph
    return SimpleNamespace(distiller=package('mgd_peer', folder / 'mgd'),
                           networks=package('mgd_peer_networks', folder / 'cls' / 'models'))


def package(name, folder):
    spec = importlib.util.spec_from_file_location(name, folder / '__init__.py')
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imported(folder: Path, *modules: str) -> list[ModuleType]:
    """Of a project that is not installed, by their own names; what it misses is stood in for meanwhile."""
    if not folder.is_dir():
        raise FileNotFoundError('there is no such folder')
    stand_ins = []
    with patch.object(sys, 'path', [str(folder), *sys.path]):
        while True:
            try:
                found = [importlib.import_module(module) for module in modules]
                break
            except ModuleNotFoundError as error:
                if error.name.partition('.')[0] == folder.name:
                    raise
                stand_ins.append(error.name)
                sys.modules[error.name] = MagicMock()
    for name in stand_ins:
        del sys.modules[name]
    return found


@cache
def trouble(settings: Settings, *names: str) -> tuple[str, ...]:
    """A line for each of the named peers (MGD's, if none) that was asked for and cannot be had."""
    lines = []
    for name in names or (MGD,):
        try:
            if settings.peers:
                LOADERS[name](folder(settings, name))
        except (ImportError, OSError) as error:
            lines.append(f'{name} in {folder(settings, name)}: {error}')
    return tuple(lines)


def available(settings: Settings, name: str = MGD) -> bool:
    """Whether it was asked for and can be had."""
    return settings.peers is not None and not trouble(settings, name)


def folder(settings: Settings, name: str) -> Path:
    return settings.peers / name.partition('/')[2]


def revision(settings: Settings, name: str) -> str:
    command = ['git', '-C', str(folder(settings, name)), 'rev-parse', 'HEAD']
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or 'of unknown revision'


@contextlib.contextmanager
def helped(settings: Settings):
    """Silent, and without a GPU where there is none."""
    stay = patch.object(torch.Tensor, 'cuda', lambda tensor, *args, **kwargs: tensor)
    with stay if settings.device.type == 'cpu' else contextlib.nullcontext(), contextlib.redirect_stdout(io.StringIO()):
        yield


def copied(network: nn.Module, source: nn.Module) -> nn.Module:
    """With the weights of ours, which come in the same order under other names."""
    network.load_state_dict(dict(zip(network.state_dict(), source.state_dict().values())))
    return network.to(next(source.parameters()).device)


def mgd_step(settings: Settings, student, teacher, method, batch, amp='off'):
    """A step as in its main_mgd.py."""
    peer = load(folder(settings, MGD))
    t_net = copied(peer.networks.resnet50(), teacher)
    s_net = copied(peer.networks.mobilenet_v1(), student)
    with helped(settings):
        network = peer.distiller.MGDistiller(t_net, s_net).to(settings.device)
    network.guided_inds = [stage.flow.flatten() for stage in method.stages]
    network.train()
    network.t_net.eval()
    optimizer = torch.optim.SGD([*s_net.parameters(), *network.BNs.parameters()], 1e-4, 0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss()

    def run():
        with precision(settings.device, amp):
            logits, distance = network(batch.images)
            loss = criterion(logits, batch.target) + distance.sum() / len(logits) / method.loss_factor
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {'loss': loss}
    return run


class Shape(nn.Module):
    """Stands for a network of which only the numbers of channels are asked."""

    def __init__(self, channels):
        super().__init__()
        self.get_channel_num, self.get_bn_before_relu = lambda: channels, list


def flow_of(settings: Settings, s_channels, t_channels):
    with helped(settings):
        return load(folder(settings, MGD)).distiller.MGDistiller(Shape(t_channels), Shape(s_channels))


def tracking(settings: Settings, stages, features):
    peer = flow_of(settings, [sc for sc, _, _ in stages], [tc for _, tc, _ in stages])
    f_s, f_t = zip(*features)

    def run():
        with helped(settings):
            peer.init_flow()
        peer.track_running_stats(f_t, f_s)
        return {f'cost {size}': total / peer.num_tracked_imgs for total, (*_, size) in zip(peer.adj_matrix, stages)}
    return run


def assignment(settings: Settings, cost, g):
    sc, tc = cost.shape
    peer = flow_of(settings, [sc], [tc])
    peer.adj_matrix, peer.num_tracked_imgs = [np.array(cost)], 1

    def solve():
        with helped(settings):
            peer.update_flow()
        return peer.guided_inds[0].view(g, sc)
    return solve


def mobilenet_v2(settings: Settings, network):
    return copied(load(folder(settings, MGD)).networks.mobilenet_v2(), network).train()


def features(network, x):
    preact, logits = network.extract_feature(x, preReLU=True)
    return logits, preact


# CIFAR

@cache
def load_mdistiller(folder: Path):
    distillers, models, dataset = imported(folder, 'mdistiller.distillers', 'mdistiller.models',
                                           'mdistiller.dataset.cifar100')
    return SimpleNamespace(KD=distillers.KD, networks=models.cifar_model_dict, dataset=dataset)


@cache
def load_torchdistill(folder: Path):
    return imported(folder, 'torchdistill.core.distillation')[0]


LOADERS = {MGD: load, MDISTILLER: load_mdistiller, TORCHDISTILL: load_torchdistill}


def mdistiller_kd(settings: Settings, student, teacher, names: tuple[str, str], batch):
    """A step as in its trainer, without the meters, with its own networks."""
    peer = load_mdistiller(folder(settings, MDISTILLER))
    s_net, t_net = (copied(peer.networks[name][0](num_classes=100), network)
                    for name, network in zip(names, (student, teacher)))
    weights = SimpleNamespace(CE_WEIGHT=0.1, KD_WEIGHT=0.9)
    distiller = peer.KD(s_net, t_net, SimpleNamespace(KD=SimpleNamespace(TEMPERATURE=4, LOSS=weights))).train()
    optimizer = torch.optim.SGD(distiller.get_learnable_parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def run():
        optimizer.zero_grad()
        _, losses = distiller(image=batch.images, target=batch.target, epoch=1)
        loss = sum(part.mean() for part in losses.values())
        loss.backward()
        optimizer.step()
        return {'loss': loss}
    return run


def torchdistill_kd(settings: Settings, student, teacher, batch):
    """A step of its DistillationBox with our networks, as it does not have these."""
    peer = load_torchdistill(folder(settings, TORCHDISTILL))
    ends = {f'{who}_module_{what}': value for who in ('student', 'teacher')
            for what, value in (('path', '.'), ('io', 'output'))}
    loss = {'key': 'KDLoss', 'kwargs': {**ends, 'temperature': 4.0, 'alpha': 0.1, 'reduction': 'batchmean'}}
    box = peer.DistillationBox(teacher, student, {}, {
        'num_epochs': 1, 'teacher': {'requires_grad': False, 'forward_proc': 'forward_batch_only'},
        'student': {'forward_proc': 'forward_batch_only'},
        'optimizer': {'key': 'SGD', 'kwargs': {'lr': 0.01, 'momentum': 0.9, 'weight_decay': 5e-4}},
        'criterion': {'key': 'WeightedSumLoss', 'kwargs': {'sub_terms': {'kd': {'criterion': loss, 'weight': 1.0}}}},
    }, settings.device, None, False, 1)
    box.pre_epoch_process()

    def run():
        loss = box.forward_process(batch.images, batch.target, None)
        box.post_forward_process(loss=loss)
        return {'loss': loss}
    return run


def mdistiller_crd_loader(settings: Settings, images: np.ndarray, targets: list[int], batch: int, negatives: int):
    """Its loader for CRD over these images in place of the official files."""
    dataset = load_mdistiller(folder(settings, MDISTILLER)).dataset

    def fill(data, transform, **_):
        data.data, data.targets, data.transform, data.target_transform = images, targets, transform, None

    with patch.object(datasets.CIFAR100, '__init__', fill):
        samples = dataset.CIFAR100InstanceSample('', transform=dataset.get_cifar100_train_transform(), k=negatives)
    return torch.utils.data.DataLoader(samples, batch_size=batch, shuffle=True)
