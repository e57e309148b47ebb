"""Switches of the whole process, and a network's way to its device."""
import os

import torch
from torch import nn


def configure(args):
    """cudnn.benchmark picks the fastest kernels, which need not be the same the next time."""
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'
        torch.use_deterministic_algorithms(True)


def place(network: nn.Module, device: torch.device, args) -> nn.Module:
    """To the device, in the layout the flags ask for; no name in its state_dict changes."""
    network = network.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    if args.compile:
        network.compile()
    return network
