"""The model card of an exported network: what it is, where it comes from, and the lines of Python that load it."""
import sys
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distillers import DISTILLERS, adapts
from distillers.base import default_ce_weight
from distillers.flags import values_of
from distillers.networks import is_function
from models import NETWORKS, torchvision_names
from utils import checkpoint
from utils.args import shorter_side
from utils.run import git_revision

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


def card(file, small, args, rows, meta, checked, how) -> str:
    """rows: of facts(); checked: what is to be said of the check; how: the lines that load the network."""
    size, source = args.image_size, args.arch.rpartition(':')[0]
    more = ', and timm' if source == 'timm' else f', and the module `{source}`' if is_function(args.arch) else ''
    where = ('It takes a checkout of the repository: the student predicts through layers of its method.'
             if 'from distillers' in how else
             f'It takes the folder `models/` of the repository, which needs nothing but torch and torchvision{more}.'
             if 'from models' in how else 'It takes nothing of the repository.')
    eight = small and EIGHT.format(name=small.name, how=LOAD['int8'].format(file=small.name))
    resize = (f'v2.Resize({shorter_side(args)}), v2.CenterCrop({size})' if args.dataset == 'imagefolder' else
              f'v2.Resize(({size}, {size}))')
    table = '\n'.join(['| | |', '|---|---|', *(f'| {key} | {value} |' for key, value in rows.items())])
    return CARD.format(file=file.name, rows=table, where=where, how=how, resize=resize, mean=meta['mean'],
                       std=meta['std'], eight=eight or '', checked='\n'.join(f'* {row}' for row in checked))


def facts(args, path, record, network, meta) -> dict:
    """What the network is, and how it came about."""
    def score(scores):
        return f'{scores["top1"]:.2f} % / {scores["top5"]:.2f} % of {scores["n"]}' if scores else 'not known'

    def epoch(which):
        return f' (epoch {record[which]["epoch"]})' if record.get(which) else ''

    size, through = args.image_size, adapting(args)
    scored = 'best' if path.name == 'best.pth' else 'last'
    partly = f' and {record["sample"]} images of the next' if record.get('sample') else ''
    published = ("timm's weights" if args.arch.startswith('timm:') else f'the weights that {args.arch} returns'
                 if is_function(args.arch) else "torchvision's ImageNet weights")
    start = args.student_resume or (published if args.pretrained or is_function(args.arch) else 'random weights')
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
        for name in args.distiller:
            values = values_of(DISTILLERS, name, args).items()
            rows[f'method: {name}'] = ', '.join(f'{key} {value}' for key, value in values)
        default = default_ce_weight([DISTILLERS[name] for name in args.distiller])
        rows["factor of the labels' cross entropy"] = default if args.ce_weight is None else args.ce_weight
    return rows | {
        'seed': record.get('seed'), 'command': f'`{record.get("command")}`',
        'code': record.get('git') or 'not known',
        'trained with': ', '.join(f'{k} {v}' for k, v in record.get('versions', {}).items()) or 'not known',
        'exported with': f'torch {torch.__version__}, torchvision {torchvision.__version__}, code {git_revision()}'}


def constructor(args, outputs: int, network: nn.Module) -> str:
    """Python that makes the network; torchvision's if it has it, which loads the weights as they are."""
    ours = NETWORKS.get(args.arch)
    theirs = [name for name in torchvision_names()
              if name == args.arch.removeprefix('torchvision:') or (ours and NETWORKS.get(name) is ours)]
    if through := adapting(args):
        made = ', '.join(f'{name!r}: DISTILLERS[{name!r}](student, teacher, **{values_of(DISTILLERS, name, args)!r})'
                         for name in through)
        return ('from distillers import DISTILLERS, Distillation\nfrom models import create_model\n'
                f'student, teacher = create_model({args.arch!r}, {outputs}), '
                f'create_model({args.teacher_arch!r}, {outputs})\n'
                f'student.image_size, teacher.image_size = {args.image_size!r}, '
                f'{args.teacher_size or args.image_size!r}\n'
                f'network = Distillation(student, teacher, {{{made}}}).shipped()')
    if theirs and not theirs[0].startswith('mnasnet'):  # which loads no bare tensors
        switches = ', aux_logits=False, transform_input=True' if hasattr(network, 'aux_logits') else ''
        return f'network = torchvision.models.{theirs[0]}(num_classes={outputs}{switches})'
    return f'from models import create_model\nnetwork = create_model({args.arch!r}, {outputs})'


def adapting(args) -> list[str]:
    """The methods that the student predicts through."""
    return [name for name in args.distiller if adapts(DISTILLERS[name])]
