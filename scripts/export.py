"""Ship a student: one file with all that its user needs, and a model card beside it. docs/export.md tells more.

    python scripts/export.py RUN --format onnx -o student.onnx
    python scripts/export.py RUN/last.pth --format pt2 --images DIR --int8

RUN is the folder of a run of main_base.py or main_distill.py; its best.pth is taken. What was written is loaded again,
by the lines that the card shows, and has to give the logits of the network it was made from.
"""
import argparse
import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torchvision
from model_card import LOAD, adapting, card, constructor, facts
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distillers import DISTILLERS, Distillation, from_flags
from distillers.networks import build
from models import NETWORKS
from models.errors import line
from utils import checkpoint, distributed, signals
from utils.args import completed, shorter_side
from utils.data import Batch, Images, Prepare, make_loader
from utils.engine import evaluate
from utils.errors import one_line
from utils.folder import FILES
from utils.order import EvalOrder, spread
from utils.sources import load_source
from utils.views import plain_view, statistics

SUFFIX = {'safetensors': '.safetensors', 'torch': '.pth', 'onnx': '.onnx', 'pt2': '.pt2'}
NEEDS = {'safetensors': ['safetensors'], 'onnx': ['onnx', 'onnxscript']}
CHECKED, CALIBRATED = 32, 256  # images
ROUNDING = 1e-4  # of the largest logit: a hundred times what kernels that sum in another order differ by


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', type=Path, metavar='CKPT', help='folder of a run, or a .pth file in it')
    parser.add_argument('--format', choices=SUFFIX, default='safetensors',
                        help='weights (safetensors, torch), or the whole computation (onnx, pt2)')
    parser.add_argument('-o', '--output', type=Path, metavar='FILE', help='(default: in the run, named by the network)')
    parser.add_argument('--images', metavar='DIR', help="data to use in place of the run's, laid out in the same way")
    parser.add_argument('--int8', action='store_true', help='also write the network in eight bits, for CPUs')
    options = parser.parse_args()
    if missing := [name for name in NEEDS.get(options.format, []) if not importlib.util.find_spec(name)]:
        sys.exit(f'error: --format {options.format} needs packages that are not here: pip install {" ".join(missing)}')
    try:
        with distributed.at_end, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # exporters warn of their own insides
            export(options)
    except KeyboardInterrupt:
        sys.exit(signals.EXIT_INTERRUPTED)


def export(options):
    path, content, outputs, record = find(options.checkpoint)
    args = argparse.Namespace(**{'distiller': []} | completed(record['arguments']))
    args.amp, args.channels_last, args.no_accel = 'off', False, True
    file = options.output or path.parent / (args.arch.replace(':', '-') + SUFFIX[options.format])
    if not file.parent.is_dir():
        sys.exit(f'error: cannot write {file}: {file.parent} is no folder')
    if file.resolve() == path.resolve():
        sys.exit(f'error: cannot write {file}: it is what is exported')
    if file.resolve().parent == path.resolve().parent and any(map(file.match, FILES)):
        sys.exit(f'error: cannot write {file}: a file of the run has this name')

    # network and images
    network = shipped(args, outputs)
    checkpoint.fill(network, content, path)
    network.eval()
    if options.images:
        args.data, args.dummy = options.images, False
    real = not args.dummy and Path(args.data).is_dir()
    if not real:
        if options.images or options.int8:
            sys.exit(f'error: {args.data or "--dummy"} is no folder of images: --images DIR names one like that of '
                     'the training')
        print('note: the data of the run is not here (--images DIR names it), so noise is what this is checked on'
              + ', and classes have no names' * ('classes' not in record))
        args.dummy, args.dummy_images = True, 4 * CHECKED
    valid, prepare = Images(load_source(args, train=False), plain_view(args)), Prepare(args, torch.device('cpu'))
    try:
        images = some(valid, CHECKED, prepare)
    except RuntimeError as error:  # not one can be read
        sys.exit(f'error: {error}')
    mean, std = statistics(args)
    meta = {'arch': args.arch, 'classes': name_classes(valid.source.classes if real else [],
                                                         record.get('classes', []), outputs, args),
            'image_size': args.image_size, 'mean': mean, 'std': std,
            'resize_size': shorter_side(args) if args.dataset == 'imagefolder' else args.image_size}

    # the file gets its name when it has been checked
    unchecked, small = file.with_name('unchecked-' + file.name), file.with_suffix('.int8.pt') if options.int8 else None
    construct, rows = constructor(args, outputs, network), []
    try:
        write(options.format, unchecked, network, meta)
        if options.format == 'onnx' and not importlib.util.find_spec('onnxruntime'):
            rows.append('not checked: that takes onnxruntime (pip install onnxruntime)')
        else:
            loaded = run_code(LOAD[options.format].format(file=str(unchecked), construct=construct))
            rows += compare(network, loaded, images, 'validation images' if real else 'images of noise')
        if small:
            rows += eight_bits(small, network, args, valid, prepare, meta)
        os.replace(unchecked, file)
        how = LOAD[options.format].format(file=file.name, construct=construct)
        told = facts(args, path, record, network, meta)
        file.with_name(file.name + '.md').write_text(card(file, small, args, told, meta, rows, how))
    except (OSError, RuntimeError, ValueError) as error:  # exporters' own errors are RuntimeErrors
        sys.exit(f'error: cannot write {file}: {checkpoint.why(error, file)}')
    finally:
        checkpoint.remove(unchecked)
    print(*rows, sep='\n')
    print(f'{file}: {file.stat().st_size:,} bytes; {file.name}.md tells of it'
          + (f'; {small}: {small.stat().st_size:,} bytes' if small else ''))


# What is exported

def find(path: Path):
    """The weights' file, its content, the outputs, and what is known of the run: arguments, seed, scores, teacher."""
    path = path / 'best.pth' if path.is_dir() else path
    if path.name == 'teacher.pth':
        sys.exit(f'error: {path} learned beside the student of the run, which is what is exported: name {path.parent}')
    with one_line():
        content = checkpoint.read(path)
    try:
        noted = {name: json.loads(file.read_text()) for name in ('args', 'result', 'start')
                 if (file := path.parent / f'{name}.json').is_file()}
        record = {'arguments': noted.get('args'), 'start': noted.get('start', {}), **noted.get('result', {})}
        if checkpoint.is_checkpoint(content):
            record |= {key: content[key] for key in ('arguments', 'seed')} | content['progress'] | content['facts']
        if known := checkpoint.classes_of(content, path) or checkpoint.classes_of(None, path.with_name('best.pth')):
            record['classes'] = known
        if not {'arch', 'dataset', 'data', 'dummy', 'image_size', 'num_classes'} <= record['arguments'].keys():
            raise KeyError
    except (KeyError, TypeError, AttributeError, ValueError):
        sys.exit(f'error: {path} does not say which network it is, and no args.json of a run lies beside it: name the '
                 'folder of a run, or a .pth file in it')
    with one_line():
        return path, content, record['arguments']['num_classes'] or checkpoint.outputs_of(content, path), record


def name_classes(there, known, outputs, args) -> list[str]:
    """there: the classes of the data as they are today; known: those of the run. Either may be missing."""
    names = [*there] or [*known]
    if other := [pair for pair in zip(there, known) if pair[0] != pair[1]]:
        sys.exit(f'error: {args.data} has a class {other[0][0]} where the run had {other[0][1]}: name the data as they '
                 'were, by --images DIR')
    if names and (len(names) > outputs or outputs not in (len(names), args.num_classes)):
        sys.exit(f'error: {args.data} has {len(names)} classes, the network {outputs}: is it another data set?')
    return [*names, *(f'output {i}' for i in range(len(names), outputs))]


def shipped(args, outputs: int) -> nn.Module:
    """The student, with the distillers that it predicts through."""
    student = build(args.arch, outputs)
    through = adapting(args)
    if not through:
        return student
    if foreign := [arch for arch in (args.arch, args.teacher_arch) if arch not in NETWORKS]:
        sys.exit(f'error: a student of {" ".join(through)} is shipped with networks of models/, not {foreign[0]}')
    teacher = build(args.teacher_arch, outputs)
    student.image_size, teacher.image_size = args.image_size, args.teacher_size or args.image_size
    return Distillation(student, teacher, from_flags(DISTILLERS, through, args, student, teacher)).shipped()


def some(images: Images, n: int, prepare) -> torch.Tensor:
    """n of the images, or all of fewer, spread over the data set and so over its classes."""
    picked = torch.stack([images[0, i].images for i in spread(len(images), n)])
    return prepare(Batch(picked, *torch.zeros(3, len(picked)))).images


# Files

def write(kind: str, path: Path, network: nn.Module, meta: dict):
    weights = {name: value.clone().contiguous() for name, value in network.state_dict().items()}
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in meta.items()}
    example = torch.zeros(2, 3, meta['image_size'], meta['image_size'])
    plain, dynamic = Logits(network).eval(), {'dynamic_shapes': ({0: torch.export.Dim('batch')},)}
    if kind == 'torch':
        torch.save({'model': weights, **meta}, path)
    elif kind == 'safetensors':
        from safetensors.torch import save_file
        save_file(weights, path, words)
    elif kind == 'pt2':
        torch.export.save(torch.export.export(plain, (example,), **dynamic), path,
                          extra_files={'meta.json': json.dumps(meta)})
    else:
        program = torch.onnx.export(plain, (example,), input_names=['images'], output_names=['logits'],
                                    dynamo=True, verbose=False, **dynamic)
        program.model.metadata_props.update(words)
        program.save(path)


class Logits(nn.Module):
    """A network without the switch that asks for its features, to be traced."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images)


def eight_bits(file: Path, network: nn.Module, args, valid: Images, prepare, meta: dict) -> list[str]:
    """Weights in eight bits per channel, activations in the range that training images have; what came of it."""
    try:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    except ImportError:
        sys.exit(f'error: --int8 needs torch.ao.quantization, which torch {torch.__version__} no longer has')
    images = some(Images(load_source(args, train=True), valid.view), CALIBRATED, prepare)
    try:
        observed = prepare_fx(Logits(network).eval(), get_default_qconfig_mapping(torch.backends.quantized.engine),
                              (images[:1],))
    except (torch.fx.proxy.TraceError, TypeError, RuntimeError) as error:
        sys.exit(f'error: --int8 cannot trace this network, {args.arch}: {line(error)}')
    for batch in images.split(32):
        observed(batch)
    eight = convert_fx(observed)
    loader = make_loader(valid, EvalOrder(range(len(valid)), 32, 0, 1), args)
    scores = evaluate({'float': network, 'int8': eight}, loader, prepare, images.device, args)
    if scores is None:
        sys.exit(signals.EXIT_INTERRUPTED)
    if 'unreadable' in scores:
        sys.exit(f'error: cannot evaluate: {scores["unreadable"]}')
    torch.jit.save(torch.jit.trace(eight, images[:2]), file, _extra_files={'meta.json': json.dumps(meta)})
    return [*(f'{name}: top-1 {scores[name]["top1"]:.2f} %, top-5 {scores[name]["top5"]:.2f} % of {len(valid)} '
              'validation images' for name in ('float', 'int8')),
            f'int8 and float guess the same for {scores["agreement"]:.2f} % of them; calibrated on {len(images)} '
            'training images']


def run_code(code: str):
    """The network that the card's lines load. They are made of names in our tables and of plain values."""
    scope = {'torch': torch, 'torchvision': torchvision, 'json': json}
    exec(code, scope)
    return scope['network']


def compare(network, loaded, images, kind: str) -> list[str]:
    """What is to be said of both in batches of 1 and 8, unless they differ."""
    rows, expected = [], network(images)
    for size in (1, 8):
        logits = torch.cat([loaded(batch) for batch in images.split(size)])
        largest, agree = (logits - expected).abs().max().item(), (logits.argmax(1) == expected.argmax(1)).float().mean()
        rows.append(f'batches of {size}: logits differ by at most {largest:.2g} (the largest is '
                    f'{expected.abs().max():.3g}), top-1 agrees for {100 * agree:.2f} % of {len(images)} {kind}')
        if not largest <= ROUNDING * expected.abs().max() + 1e-7:
            sys.exit(f'error: the exported network is another than the original, nothing is kept; {rows[-1]}')
    return rows


if __name__ == '__main__':
    main()
