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
from contextlib import suppress
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distillers import DISTILLERS, Distillation, adapts
from distillers.base import hyper_parameters
from distillers.networks import build
from models import NETWORKS, torchvision_names
from utils import checkpoint, distributed, signals
from utils.args import base_parser
from utils.data import STATISTICS, Batch, CenterView, Images, PlainView, Prepare, load_source, make_loader
from utils.engine import evaluate
from utils.order import EvalOrder, spread
from utils.run import git_revision

SUFFIX = {'safetensors': '.safetensors', 'torch': '.pth', 'onnx': '.onnx', 'pt2': '.pt2'}
NEEDS = {'safetensors': ['safetensors'], 'onnx': ['onnx', 'onnxscript']}
CHECKED, CALIBRATED = 32, 256  # images
ROUNDING = 1e-4  # of the largest logit: a hundred times what kernels that sum in another order differ by

LOAD = {  # what a user does, and what the check does
    'torch': """\
saved = torch.load({file!r}, weights_only=True)
classes = saved['classes']
{construct}
network.load_state_dict(saved['model'])
network.eval()
""",
    'safetensors': """\
from safetensors import safe_open
with safe_open({file!r}, 'pt') as saved:
    classes = json.loads(saved.metadata()['classes'])
    weights = {{name: saved.get_tensor(name) for name in saved.keys()}}
{construct}
network.load_state_dict(weights)
network.eval()
""",
    'onnx': """\
import onnxruntime
session = onnxruntime.InferenceSession({file!r}, providers=['CPUExecutionProvider'])
classes = json.loads(session.get_modelmeta().custom_metadata_map['classes'])
network = lambda images: torch.from_numpy(session.run(None, {{'images': images.numpy()}})[0])
""",
    'pt2': """\
extra = {{'meta.json': ''}}
network = torch.export.load({file!r}, extra_files=extra).module()
classes = json.loads(extra['meta.json'])['classes']
""",
    'int8': """\
extra = {{'meta.json': ''}}
network = torch.jit.load({file!r}, _extra_files=extra)
classes = json.loads(extra['meta.json'])['classes']
"""}


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
    with distributed.at_end, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # exporters warn of their own insides
        export(options)


def export(options):
    path, content, record = find(options.checkpoint)
    args = argparse.Namespace(**vars(base_parser('').parse_args([])) | record['arguments'])
    args.amp, args.channels_last, args.no_accel = 'off', False, True
    file = options.output or path.parent / (args.arch.replace(':', '-') + SUFFIX[options.format])
    if file.resolve() == path.resolve() or not file.parent.is_dir():
        what = 'it is what is exported' if file.parent.is_dir() else f'{file.parent} is no folder'
        sys.exit(f'error: cannot write {file}: {what}')

    # network and images
    outputs = count_classes(content, path)
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
    view = (CenterView if args.dataset == 'imagefolder' else PlainView)(args.image_size)
    valid, prepare = Images(load_source(args, train=False), view), Prepare(args, torch.device('cpu'))
    images = some(valid, CHECKED, prepare)
    mean, std = STATISTICS[args.dataset]
    meta = {'arch': args.arch, 'classes': name_classes(valid.source.classes if real else record.get('classes', []),
                                                         outputs, args),
            'image_size': args.image_size, 'mean': mean, 'std': std}

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
    except (OSError, RuntimeError) as error:  # exporters' own errors are RuntimeErrors
        sys.exit(f'error: cannot write {file}: {str(error).strip().splitlines()[0]}')
    finally:
        unchecked.unlink(missing_ok=True)
    print(*rows, sep='\n')
    how = LOAD[options.format].format(file=file.name, construct=construct)
    file.with_name(file.name + '.md').write_text(card(file, small, args, path, record, network, meta, rows, how))
    print(f'{file}: {file.stat().st_size:,} bytes; {file.name}.md tells of it'
          + (f'; {small}: {small.stat().st_size:,} bytes' if small else ''))


# What is exported

def find(path: Path):
    """The weights' file, its content, and what is known of the run: arguments, seed, scores, the teacher."""
    path = path / 'best.pth' if path.is_dir() else path
    try:
        content = checkpoint.read(path)
    except ValueError as error:
        sys.exit(f'error: {error}')
    try:
        noted = {name: json.loads(file.read_text()) for name in ('args', 'result', 'start')
                 if (file := path.parent / f'{name}.json').is_file()}
        record = {'arguments': noted.get('args'), 'start': noted.get('start', {}), **noted.get('result', {})}
        if checkpoint.is_checkpoint(content):
            record |= {key: content[key] for key in ('arguments', 'seed')} | content['facts'] | content['progress']
        with suppress(ValueError, KeyError):
            record['classes'] = checkpoint.read(path.with_name('checkpoint.pth'))['classes']
        if not {'arch', 'dataset', 'data', 'dummy', 'image_size', 'num_classes'} <= record['arguments'].keys():
            raise KeyError
    except (KeyError, TypeError, AttributeError, ValueError):
        sys.exit(f'error: {path} does not say which network it is, and no args.json of a run lies beside it: name the '
                 'folder of a run, or a .pth file in it')
    return path, content, record


def count_classes(content, path) -> int:
    """The classifier comes last in every state dict."""
    try:
        return [*checkpoint.weights_of(content, path).values()][-1].shape[0]
    except ValueError as error:
        sys.exit(f'error: {error}')
    except IndexError:
        sys.exit(f'error: {path} ends in no classifier that would tell the number of classes')


def name_classes(names, outputs, args) -> list[str]:
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
    student.image_size = teacher.image_size = args.image_size
    return Distillation(student, teacher, {name: DISTILLERS[name](student, teacher, **values)
                                           for name, values in through.items()}).shipped()


def methods(args) -> dict[str, dict]:
    """The hyper-parameters of each distiller of the run."""
    return {name: {key: vars(args).get(f'{name}_{key}', parameter.default)
                   for key, (parameter, _) in hyper_parameters(DISTILLERS[name]).items()}
            for name in getattr(args, 'distiller', [])}


def adapting(args) -> dict[str, dict]:
    return {name: values for name, values in methods(args).items() if adapts(DISTILLERS[name])}


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
        sys.exit(f'error: --int8 cannot trace this network, {args.arch}: {str(error).splitlines()[0]}')
    for batch in images.split(32):
        observed(batch)
    eight = convert_fx(observed)
    loader = make_loader(valid, EvalOrder(range(len(valid)), 32, 0, 1), args)
    scores = evaluate({'float': network, 'int8': eight}, loader, prepare, images.device, args)
    if scores is None:
        sys.exit(signals.EXIT_INTERRUPTED)
    torch.jit.save(torch.jit.trace(eight, images[:2]), file, _extra_files={'meta.json': json.dumps(meta)})
    return [*(f'{name}: top-1 {scores[name]["top1"]:.2f} %, top-5 {scores[name]["top5"]:.2f} % of {len(valid)} '
              'validation images' for name in ('float', 'int8')),
            f'int8 and float guess the same for {scores["agreement"]:.2f} % of them; calibrated on {len(images)} '
            'training images']


def constructor(args, outputs: int, network: nn.Module) -> str:
    """Python that makes the network; torchvision's if it has it, which loads the weights as they are."""
    ours = NETWORKS.get(args.arch)
    theirs = [name for name in torchvision_names()
              if name == args.arch.removeprefix('torchvision:') or (ours and NETWORKS.get(name) is ours)]
    if through := adapting(args):
        made = ', '.join(f'{name!r}: DISTILLERS[{name!r}](student, teacher, **{values!r})'
                         for name, values in through.items())
        return ('from distillers import DISTILLERS, Distillation\nfrom models import create_model\n'
                f'student, teacher = create_model({args.arch!r}, {outputs}), '
                f'create_model({args.teacher_arch!r}, {outputs})\n'
                f'student.image_size = teacher.image_size = {args.image_size!r}\n'
                f'network = Distillation(student, teacher, {{{made}}}).shipped()')
    if theirs:
        auxiliary = ', aux_logits=False' if hasattr(network, 'aux_logits') else ''
        return f'network = torchvision.models.{theirs[0]}(num_classes={outputs}{auxiliary})'
    return f'from models import create_model\nnetwork = create_model({args.arch!r}, {outputs})'


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


# The card

CARD = """# {file}

{rows}

## Load it

{where}

```python
import json

import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

{how}
prepare = v2.Compose([{resize}, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                      v2.Normalize({mean}, {std})])
with torch.no_grad():
    logits = network(prepare(Image.open('image.jpg').convert('RGB'))[None])
print(classes[logits.argmax()])
```
{eight}
## Checked

Loaded by the lines above, against the network it was made from:

{checked}

## Licence

The code is under the MIT licence. Weights inherit the terms of the images they were trained on, and of the weights that
they started from or learned from: whoever uses these has to check them.
"""
EIGHT = """
`{name}` is the same network in eight bits, for CPUs. In place of the network above:

```python
{how}```
"""


def card(file, small, args, path, record, network, meta, checked, how) -> str:
    def score(scores):
        return f'{scores["top1"]:.2f} % / {scores["top5"]:.2f} % of {scores["n"]}' if scores else 'not known'

    def epoch(which):
        return f' (epoch {record[which]["epoch"]})' if record.get(which) else ''

    size, through = args.image_size, adapting(args)
    scored = 'best' if path.name == 'best.pth' else 'last'
    partly = f' and {record["sample"]} images of the next' if record.get('sample') else ''
    start = "torchvision's ImageNet weights" if args.pretrained else args.student_resume or 'random weights'
    rows = {'network': f'{args.arch}, {sum(p.numel() for p in network.parameters()):,} parameters'
                       + f', those of {" ".join(through)} included' * bool(through),
            'input': f'float32 [N, 3, {size}, {size}], any N; normalised RGB',
            'weights': f'{path.name}{epoch(scored)}{partly}, hash {checkpoint.fingerprint(network)}; '
                       f'started from {start}' + f'; averaged, decay {args.ema:g}' * bool(args.ema),
            'data': 'made-up images' if record['arguments']['dummy'] else
                    f'{args.dataset} {record["arguments"]["data"]}, {len(meta["classes"])} classes',
            'top-1 / top-5, best': score(record.get('best')) + epoch('best'),
            'top-1 / top-5, last': score(record.get('last')) + epoch('last')}
    if 'teacher' in record:
        rows['teacher (hash)'] = f'{record["teacher"]}; {args.teacher_resume or "no file of weights was named"}'
        rows["teacher's top-1 / top-5"] = score((record.get('last') or {}).get('teacher')
                                                or record['start'].get('scores', {}).get('teacher'))
        for name, values in methods(args).items():
            rows[f'method: {name}'] = ', '.join(f'{key} {value}' for key, value in values.items())
        own = [DISTILLERS[name].default_ce_weight for name in args.distiller]
        weight = args.ce_weight if args.ce_weight is not None else own[0] if len(own) == 1 else 1.0
        rows["factor of the labels' cross entropy"] = weight
    rows |= {'seed': record.get('seed'), 'command': f'`{record.get("command")}`',
             'code': record.get('git') or 'not known',
             'trained with': ', '.join(f'{k} {v}' for k, v in record.get('versions', {}).items()) or 'not known',
             'exported with': f'torch {torch.__version__}, torchvision {torchvision.__version__}, code '
                              f'{git_revision()}'}
    where = ('It takes a checkout of the repository: the student predicts through layers of its method.'
             if 'from distillers' in how else
             'It takes the folder `models/` of the repository, which needs nothing but torch and torchvision.'
             if 'from models' in how else 'It takes nothing of the repository.')
    eight = small and EIGHT.format(name=small.name, how=LOAD['int8'].format(file=small.name))
    resize = (f'v2.Resize({round(size * 256 / 224)}), v2.CenterCrop({size})' if args.dataset == 'imagefolder' else
              f'v2.Resize(({size}, {size}))')
    table = '\n'.join(['| | |', '|---|---|', *(f'| {key} | {value} |' for key, value in rows.items())])
    return CARD.format(file=file.name, rows=table, where=where, how=how, resize=resize, mean=meta['mean'],
                       std=meta['std'], eight=eight or '', checked='\n'.join(f'* {row}' for row in checked))


if __name__ == '__main__':
    main()
