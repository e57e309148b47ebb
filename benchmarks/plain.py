"""The baselines: each as one writes it down at first, with nothing but what PyTorch and torchvision offer."""
import numpy as np
import torch
import torch.nn.functional as F
from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import functional as pil

from utils.views import STATISTICS


class PlainMGD(nn.Module):
    """The loss with absolute max pooling, from the flow and the margins of a distillers.mgd.MGD."""

    def __init__(self, method):
        super().__init__()
        self.flows = [stage.flow for stage in method.stages]
        self.margins = [stage.margins for stage in method.stages]
        self.norms = nn.ModuleList(nn.BatchNorm2d(flow.shape[1]) for flow in self.flows)
        self.pairing, self.factors, self.divisor = method.pairing, method.stage_factors, method.loss_factor

    def forward(self, s, t):
        total = 0.0
        for (i, j), norm, flow, margins, factor in zip(self.pairing, self.norms, self.flows, self.margins,
                                                       self.factors):
            wanted = torch.stack([t[j][:, members] for members in flow], dim=2)  # [N, sc, g, H, W]
            strongest = wanted.abs().argmax(dim=2, keepdim=True)
            wanted = wanted.gather(2, strongest).squeeze(2)
            wanted = torch.max(wanted, margins[flow].mean(0).view(1, -1, 1, 1))
            shown = norm(s[i])
            counts = (shown > wanted) | (wanted > 0)
            total = total + factor * (F.mse_loss(shown, wanted, reduction='none') * counts).sum()
        return total / (len(s[0]) * self.divisor)


def plain_step(student, teacher, method, batch):
    """A training step in float32."""
    loss = PlainMGD(method).to(batch.images.device)
    parameters = [*student.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss()

    def run():
        with torch.no_grad():
            t = teacher(batch.images, features=True)
        s = student(batch.images, features=True)
        total = criterion(s.logits, batch.target) + loss(s.preact, t.preact)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return {'loss': total}
    return run


def plain_tracking(f_s, f_t) -> np.ndarray:
    """Squared distances of all pairs of normalised channels, summed over the images."""
    s, t = F.normalize(f_s.flatten(2), dim=2), F.normalize(f_t.flatten(2), dim=2)
    distances = 2 - 2 * torch.bmm(s, t.transpose(1, 2))
    return distances.sum(dim=0).cpu().numpy()


def plain_assignment(cost: np.ndarray, g: int) -> np.ndarray:
    """Rows repeated g times, one call per arc. [sc, tc] -> [g, sc]"""
    sc = len(cost)
    solver = SimpleLinearSumAssignment()
    for copy in range(g):
        for row in range(sc):
            for column in range(cost.shape[1]):
                solver.add_arc_with_cost(copy * sc + row, column, int(1e5 * cost[row][column]))
    assert solver.solve() == solver.OPTIMAL
    return np.array([solver.right_mate(row) for row in range(g * sc)]).reshape(g, sc)


def restarted_features(network, x):
    """Logits, then the pre-activation of every tapped block of a MobileNetV2, each from the image on."""
    logits = network(x)
    stem, *blocks, _ = network.features
    preacts = []
    for tap in network.taps:
        at = F.relu6(stem(x))
        for block in blocks[:tap - 1]:
            at = block(at)[2]
        *expand, depthwise, _, _ = blocks[tap - 1].conv
        for layer in expand:
            at = F.relu6(layer(at))
        preacts.append(depthwise(at))
    return logits, preacts


def plain_kd_step(student, teacher, batch):
    """A training step of KD in float32."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    criterion, T = nn.CrossEntropyLoss(), 4.0

    def run():
        with torch.no_grad():
            t = teacher(batch.images)
        s = student(batch.images)
        softened = F.kl_div(F.log_softmax(s / T, dim=1), F.softmax(t / T, dim=1), reduction='batchmean')
        total = 0.1 * criterion(s, batch.target) + 0.9 * T**2 * softened
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return {'loss': total}
    return run


def plain_views(pictures: list, index: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
    """Crop, flip, ToTensor and Normalize of one PIL image after the other."""
    images = []
    for number, view in zip(index.tolist(), views.tolist()):
        image = pil.crop(pil.pad(pictures[number], 4), view // 18, view // 2 % 9, 32, 32)
        image = pil.to_tensor(pil.hflip(image) if view % 2 else image)
        images.append(pil.normalize(image, *STATISTICS['cifar100']))
    return torch.stack(images)


def plain_negatives(targets: torch.Tensor, index: torch.Tensor, negatives: int) -> torch.Tensor:
    """For each sample, some of other classes, without replacement."""
    others = [np.flatnonzero(targets.numpy() != c) for c in range(int(targets.max()) + 1)]
    return torch.stack([torch.from_numpy(np.random.choice(others[targets[i]], negatives, replace=False))
                        for i in index.tolist()])


def plain_loader(folder, batch: int, workers: int) -> DataLoader:
    """Training images of a folder."""
    recipe = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
                                 transforms.ToTensor(), transforms.Normalize(*STATISTICS['imagefolder'])])
    return DataLoader(datasets.ImageFolder(folder, recipe), batch, shuffle=True, num_workers=workers,
                      pin_memory=torch.cuda.is_available(),
                      multiprocessing_context='fork')  # a benchmark that was spawned itself would spawn them
