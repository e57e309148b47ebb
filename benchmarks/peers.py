"""Other projects, from checkouts on this machine. Their code is imported as it is.

The only help it gets: stand-ins for modules that no longer exist, and on a CPU tensors whose .cuda() does nothing.
"""
import contextlib
import importlib.util
import io
import subprocess
import sys
from functools import cache
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment
from torch import nn

from .harness import Settings

MGD = 'KaiyuYue/mgd'


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


@cache
def trouble(settings: Settings) -> tuple[str, ...]:
    """A line where the peer was asked for and cannot be had."""
    if not settings.peers:
        return ()
    try:
        load(settings.peers / 'mgd')
    except (ImportError, OSError) as error:
        return (f'{MGD} in {settings.peers / "mgd"}: {error}',)
    return ()


def revision(settings: Settings) -> str:
    command = ['git', '-C', str(settings.peers / 'mgd'), 'rev-parse', 'HEAD']
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


def mgd_step(settings: Settings, student, teacher, method, batch):
    """A step as in its main_mgd.py."""
    peer = load(settings.peers / 'mgd')
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
        return load(settings.peers / 'mgd').distiller.MGDistiller(Shape(t_channels), Shape(s_channels))


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
    return copied(load(settings.peers / 'mgd').networks.mobilenet_v2(), network).train()


def features(network, x):
    preact, logits = network.extract_feature(x, preReLU=True)
    return logits, preact
