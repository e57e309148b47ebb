"""Loss curves with each option that makes a run faster, and without: they have to agree as those of other seeds do.

    python -m benchmarks.curves                          on a CPU, two runs at a time: some ten minutes
    python -m benchmarks.curves --device cuda --jobs 6

A student learns the images of scripts/make_images.py by MGD and KD, under a teacher that has learned them before: with
several seeds, and with the first of them again under each option. How far a curve is from the mean of the seeds' is
told in their standard deviations, as a root mean square over the epochs: another seed is at 1 or 2. It is a curve of
the logarithm of the training loss, the smaller the loss the less may be missing. Exits with 1 where an option is
further off than LIMIT. The same command goes on with the runs that are missing.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from utils.run import git_revision
from utils.setup import device_name

from .harness import ROOT
from .run import command, versions

LIMIT, SEEDS, EPOCHS, BATCH = 3.0, 5, 6, 40
OPTIONS = ('--channels-last', '--amp bf16', '--fold-teacher', '--teacher-amp bf16', '--compile',
           f'--accum-steps 2 --batch-size {BATCH // 2}', '--data-backend device')
ON_CUDA = ('--fast', '--amp fp16', '--compile reduce-overhead', '--fast --compile', '--cuda-graph',
           '--cuda-graph --teacher-stream', '--fast --cuda-graph --compile')
RECIPE = (f'--image-size 40 --epochs {EPOCHS} --schedule cosine --warmup --warmup-epochs 1 --warmup-by iteration '
          f'--batch-size {BATCH}')
TEACHER = f'main_base.py {{images}} --arch resnet18 --lr 0.05 --seed 0 {RECIPE}'
STUDENT = ('main_distill.py {images} --arch shufflenet_v2_x0_5 --teacher-arch resnet18 --teacher-resume {teacher} '
           f'--distiller mgd kd --kd-temperature 1.5 --kd-weight 1 --pair-images 256 --lr 0.02 {RECIPE}')


def train(script: str, output: Path, args) -> np.ndarray:
    """Training losses by epoch, of a run that is made if it is not there."""
    device = ['--gpu', '0'] if args.device == 'cuda' else ['--no-accel']
    words = [*script.split(), *device, '--workers', str(args.workers), '--output', str(output)]
    run = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
                         env={'OMP_NUM_THREADS': '1'} | os.environ)
    if run.returncode:
        sys.exit(f'error: {" ".join(words)}\n{run.stderr[-2000:]}')
    losses = [json.loads(line)['train']['loss'] for line in (output / 'log.jsonl').read_text().splitlines()]
    print(f'{output.name:<44}' + ''.join(f'{loss:10.4f}' for loss in losses), flush=True)
    return np.array(losses)


def distances(seeds: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """[S, E], [C, E] -> [C]"""
    seeds, curves = np.log(seeds), np.log(curves)
    return np.sqrt(np.mean(((curves - seeds.mean(0)) / seeds.std(0, ddof=1)) ** 2, 1))


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--options', nargs='+', metavar='FLAGS',
                        help="only these, each as one word without its first --: 'amp bf16' (all for the device)")
    parser.add_argument('--train', type=int, default=60, metavar='N', help='images per class, of twelve (%(default)s)')
    parser.add_argument('--workers', type=int, default=0, metavar='N', help='loader processes of a run (%(default)s)')
    parser.add_argument('--jobs', type=int, default=2, metavar='N', help='runs at a time (%(default)s)')
    parser.add_argument('--output', type=Path, default=ROOT / 'runs' / 'curves', metavar='DIR',
                        help='folder of the runs, and for curves.json')
    args = parser.parse_args(arguments)
    args.output = args.output.resolve()
    options = [f'--{option}' for option in args.options or ()] or OPTIONS + ON_CUDA * (args.device == 'cuda')
    images, teacher = args.output / 'images', args.output / 'teacher'
    subprocess.run([sys.executable, ROOT / 'scripts' / 'make_images.py', images, '--classes', '12',
                    '--train', str(args.train), '--valid', '40'], check=True)
    train(TEACHER.format(images=images), teacher, args)
    student = STUDENT.format(images=images, teacher=teacher / 'last.pth')
    runs = {f'seed-{seed}': f'--seed {seed}' for seed in range(SEEDS)}
    runs |= {option.lstrip('-').replace(' ', '_'): f'--seed 0 {option}' for option in options}
    with ThreadPoolExecutor(args.jobs) as pool:
        curves = np.stack([*pool.map(lambda name: train(f'{student} {runs[name]}', args.output / name, args), runs)])

    far = distances(curves[:SEEDS], curves[SEEDS:]).tolist()
    print(f'\n{"deviations from the mean of the seeds":<44}{"":8}at most {LIMIT:g}')
    for option, distance in zip(options, far):
        print(f'{option:<44}{distance:10.2f}  {"ok" if distance <= LIMIT else "TOO FAR"}')
    record = {'command': command(), 'git': git_revision(), 'device': device_name(torch.device(args.device)),
              'versions': versions(), 'seeds': curves[:SEEDS].tolist(), 'limit': LIMIT,
              'options': {option: {'losses': curve, 'deviations': distance}
                          for option, curve, distance in zip(options, curves[SEEDS:].tolist(), far)}}
    (args.output / 'curves.json').write_text(json.dumps(record, indent=1))
    print(f'\n{args.output / "curves.json"}')
    return int(max(far) > LIMIT)


if __name__ == '__main__':
    sys.exit(main())
