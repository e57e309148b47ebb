"""ImageNet weights of torchvision under the names of Detectron2's backbones.

    python d2/convert_weights.py resnet18 r-18.pth              torchvision's own, downloaded
    python d2/convert_weights.py resnet18-f37072fd.pth r-18.pth   a file of them
    python d2/convert_weights.py runs/NAME/best.pth r-18.pth      a ResNet or MobileNetV2 that main_base.py trained
"""
import argparse
import re
import sys
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.checkpoint import read, weights_of

RULES = [  # of a ResNet; MobileNetV2 keeps its names
    (r'^(conv1|bn1)\.', r'stem.\1.'),
    (r'^layer(\d)', lambda found: f'res{int(found[1]) + 1}'),
    (r'\bbn(\d)', r'conv\1.norm'),
    (r'downsample\.0', 'shortcut'),
    (r'downsample\.1', 'shortcut.norm'),
]
NOT_USED = re.compile(r'^(fc|classifier)\.|num_batches_tracked$')
OWN = {'stem.conv1.weight', 'features.1.conv.0.0.weight'}  # of a ResNet, and of MobileNetV2 alone


def renamed(key: str) -> str:
    for pattern, name in RULES:
        key = re.sub(pattern, name, key)
    return key


def convert(state: dict) -> dict:
    """A checkpoint whose entries Detectron2 looks up by the ends of their names."""
    model = {renamed(key): value for key, value in state.items() if not NOT_USED.search(key)}
    stem = model.get('stem.conv1.weight')
    if not OWN & model.keys() or (stem is not None and stem.shape[2] != 7):  # as in ResNets for CIFAR
        raise ValueError(f"weights of no ResNet and no MobileNetV2 of torchvision's: {next(iter(state))}, ...")
    return {'model': model, 'matching_heuristics': True}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='name of a network of torchvision, or a file')
    parser.add_argument('target', type=Path, help='file to write')
    args = parser.parse_args()
    if args.target.suffix == '.pkl':
        parser.error(f'{args.target}: Detectron2 would unpickle it, and this is a file of torch.save: call it .pth')
    try:
        if args.source in torchvision.models.list_models(module=torchvision.models):
            state = torchvision.models.get_model_weights(args.source).IMAGENET1K_V1.get_state_dict(check_hash=True)
        else:
            state = weights_of(read(Path(args.source)), args.source)
        torch.save(convert(state), args.target)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f'error: {str(error).splitlines()[0]}')
