"""Switches of the whole process, and a network's way to its device."""
import os
import platform
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from . import distributed
from .depthwise import replace_strided_depthwise

PRECISIONS = {'off': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def configure(args, device: torch.device):
    """What flags ask of PyTorch itself, and what --fast stands for."""
    if args.fast:
        args.channels_last, args.amp = True, 'bf16' if args.amp == 'off' and has_bf16(device) else args.amp
        distributed.say(f'fast: --channels-last --amp {args.amp}')
    if problem := no_graph(args, device):
        distributed.stop(problem)
    torch.backends.cudnn.benchmark = not args.deterministic  # the fastest kernels may be others the next time
    if args.compile:  # per forward(): for either network, training and evaluation, whole batches and the rest
        torch._dynamo.config.recompile_limit = 32
        warnings.filterwarnings('ignore', 'TensorFloat32 tensor cores')  # losses and the matching stay exact
        warnings.filterwarnings('ignore', 'Grad strides do not match')  # in dimensions of size 1
        torch._functorch.config.donated_buffer = args.optimizer != 'dot'  # which takes gradients twice
    if args.deterministic:
        os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'
        torch.use_deterministic_algorithms(True)


def no_graph(args, device: torch.device) -> str:
    """Why --cuda-graph, if asked for, cannot be."""
    one = device.type == 'cuda' and (args.gpu is not None or torch.cuda.device_count() == 1)
    asked = args.cuda_graph and not args.evaluate
    return '--cuda-graph needs a GPU, and only one: name it with --gpu' if asked and not one else ''


def cpu_facts() -> str:
    """What Linux tells of the processor; nothing on other systems."""
    told = Path('/proc/cpuinfo')
    return told.read_text() if told.exists() else ''


def has_bf16(device: torch.device) -> bool:
    """Whether there are instructions for it; without them it is slower than float32."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not {'avx512_bf16', 'amx_bf16'}.isdisjoint(cpu_facts().split())


def device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    model = [line for line in cpu_facts().splitlines() if line.startswith('model name')]
    return model[0].partition(': ')[2] if model else platform.processor() or platform.machine()


def precision(device: torch.device, amp: str):
    """The autocast of --amp."""
    return torch.autocast(device.type, PRECISIONS[amp], enabled=amp != 'off')


@contextmanager
def full_float32():
    """Convolutions of a GPU in float32. By default PyTorch rounds to TF32, which changes results by a thousandth."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def place(network: nn.Module, device: torch.device, args) -> nn.Module:
    """To the device, in the layout the flags ask for; no name in its state_dict changes."""
    network = network.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    if device.type == 'cpu' and args.amp == 'bf16':
        replace_strided_depthwise(network)
    return compiled(network, args)


def compiled(module: nn.Module, args) -> nn.Module:
    """In place, if asked for: its state_dict and its forward(), called as such, stay as they are."""
    if args.compile:
        module.compile(mode=args.compile, dynamic=False)  # a graph for the last, smaller batch of its own
    return module


def begin_step(args):
    """CUDA graphs write where they wrote before: from here on, what came out before is not needed."""
    if args.compile:
        torch.compiler.cudagraph_mark_step_begin()
