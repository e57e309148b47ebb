"""The small tools of scripts/."""
import json
import subprocess
import sys

from conftest import ROOT

from utils.data import Folder


def tool(name, *args):
    command = [sys.executable, str(ROOT / 'scripts' / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_images_are_a_function_of_the_arguments(tmp_path):
    few = ['--classes', 3, '--train', 4, '--valid', 2, '--size', 32]
    for name in 'ab':
        assert tool('make_images.py', tmp_path / name, *few).returncode == 0
    files = sorted(p.relative_to(tmp_path / 'a') for p in (tmp_path / 'a').rglob('*.jpg'))
    assert len(files) == 18 and len(Folder(tmp_path / 'a' / 'train')) == 12
    assert all((tmp_path / 'a' / f).read_bytes() == (tmp_path / 'b' / f).read_bytes() for f in files)
    assert len({(tmp_path / 'a' / f).read_bytes() for f in files}) == 18
    assert 'are there already' in tool('make_images.py', tmp_path / 'a', *few).stdout
    other = tool('make_images.py', tmp_path / 'a', *few, '--seed', 1)
    assert other.returncode == 2 and 'holds something else' in other.stderr


def test_an_interrupted_drawing_is_drawn_again(tmp_path):
    few = ['--classes', 2, '--train', 2, '--valid', 1, '--size', 32]
    tool('make_images.py', tmp_path / 'whole', *few)
    tool('make_images.py', tmp_path / 'part', *few)
    (tmp_path / 'part' / 'made_by.json').rename(tmp_path / 'part' / 'drawing.json')
    victim = next((tmp_path / 'part' / 'valid').rglob('*.jpg'))
    victim.write_bytes(b'half')
    assert tool('make_images.py', tmp_path / 'part', *few).returncode == 0
    assert victim.read_bytes() == (tmp_path / 'whole' / victim.relative_to(tmp_path / 'part')).read_bytes()
    assert not (tmp_path / 'part' / 'drawing.json').exists()


def test_curves_of_runs_also_of_one_that_goes_on(tmp_path):
    for name, half in (('a', ''), ('b', '{"epoch": 2, "lr"')):
        (tmp_path / name).mkdir()
        records = [{'epoch': e, 'lr': 0.1, 'train': {'loss': 2.0 - e, 'top1': 10 * e, 'top5': 50},
                    'valid': {'loss': 2.0, 'top1': 9.0 * e, 'top5': 50.0}, 'seconds': e} for e in range(2)]
        (tmp_path / name / 'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records) + half)
    drawn = tool('plot.py', tmp_path / 'a', tmp_path / 'b', '-o', tmp_path / 'curves.png')
    assert drawn.returncode == 0 and (tmp_path / 'curves.png').read_bytes()[:4] == b'\x89PNG'
    missing = tool('plot.py', tmp_path / 'c', '-o', tmp_path / 'x.png')
    assert missing.returncode == 2 and 'log.jsonl' in missing.stderr and 'Traceback' not in missing.stderr


def finished_run(folder, arch, seed, *correct, **arguments):
    """What a run over 40 images leaves behind, as far as it is compared."""
    folder.mkdir()
    scores = [{'epoch': e, 'top1': 2.5 * c, 'correct1': c, 'n': 40} for e, c in enumerate(correct)]
    records = [{'epoch': s['epoch'], 'lr': 0.1, 'train': {'loss': 1, 'top1': 1}, 'valid': s} for s in scores]
    (folder / 'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    arguments = {'arch': arch, 'seed': seed, 'output': str(folder), 'lr': 0.1} | arguments
    (folder / 'result.json').write_text(json.dumps({
        'finished': True, 'last': scores[-1], 'best': max(scores, key=lambda s: s['correct1']),
        'seconds': 10 + 4 * seed, 'seed': seed, 'arguments': arguments}))
    return folder


def test_compared_are_last_epochs_over_seeds(tmp_path):
    runs = [finished_run(tmp_path / name, 'net', *numbers) for name, *numbers in (
        ('alone-0', 0, 2, 8, 4), ('alone-1', 1, 2, 3, 6), ('kd-0', 0, 4, 8, 12))]
    teacher = finished_run(tmp_path / 'teacher', 'big', 5, 30, 32)
    done = tool('compare.py', *runs, '--teacher', teacher, '-o', tmp_path / 'curves.png')
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in done.stdout.splitlines()[2:]]
    assert rows == [['teacher', 'big', '80.00', '1', '80.00', '30'],
                    ['alone', 'net', '12.50 ± 3.54', '2', '17.50 ± 3.54', '12'],  # 10 and 15: (15 - 10) / sqrt(2)
                    ['kd', 'net', '30.00', '1', '30.00', '10']]
    assert (tmp_path / 'curves.png').read_bytes()[:4] == b'\x89PNG'


def test_only_runs_that_differ_in_the_seed_are_averaged(tmp_path):
    first = finished_run(tmp_path / 'kd-0', 'net', 0, 2)
    for name, seed, arguments, complaint in (('kd-1', 1, {'lr': 0.2}, 'differ in lr'), ('kd-2', 0, {}, 'same seed')):
        refused = tool('compare.py', first, finished_run(tmp_path / name, 'net', seed, 3, **arguments))
        assert refused.returncode == 2 and complaint in refused.stderr
    half = json.loads((first / 'result.json').read_text()) | {'finished': False}
    (first / 'result.json').write_text(json.dumps(half))
    assert 'not finished' in tool('compare.py', first).stderr
    assert 'No such file' in tool('compare.py', tmp_path / 'nowhere').stderr


def demo(tmp_path, broken):
    """scripts/demo.sh in another checkout with a stand-in for python, in which runs of the name `broken` fail."""
    (tmp_path / 'scripts').mkdir(exist_ok=True)
    (tmp_path / 'scripts' / 'demo.sh').write_bytes((ROOT / 'scripts' / 'demo.sh').read_bytes())
    (tmp_path / 'python').write_text(f'''#!/bin/bash
echo "$@" >> {tmp_path}/told
case "$*" in *demo/{broken}) echo of no use; exit 3; esac
echo "done: last top1 1.00; more"
''')
    (tmp_path / 'python').chmod(0o755)
    return subprocess.run(['bash', str(tmp_path / 'scripts' / 'demo.sh')], capture_output=True, text=True,
                          env={'PATH': '/usr/bin:/bin', 'BIN': str(tmp_path)})


def test_demo_trains_all_students_alike_and_stops_at_an_error(tmp_path):
    done = demo(tmp_path, broken='none')
    assert done.returncode == 0 and 'kd-1: done: last top1 1.00\n' in done.stdout
    told = [line.split() for line in (tmp_path / 'told').read_text().splitlines()]
    students = [words for words in told if 'shufflenet_v2_x0_5' in words]
    names = {words[-1].split('/')[-1] for words in students}
    assert names == {f'{way}-{seed}' for way in ('alone', 'kd', 'mgd', 'mgd+kd') for seed in range(3)}
    shared = [' '.join(words[1:words.index('--no-tensorboard')]) for words in students]
    assert len(set(shared)) == 1 and '--lr' in shared[0] and '--epochs' in shared[0]
    assert 'compare.py' in told[-1][0]

    (tmp_path / 'told').unlink()
    failed = demo(tmp_path, broken='alone-1')
    told = (tmp_path / 'told').read_text()
    assert failed.returncode != 0 and 'alone-1 failed' in failed.stderr and 'of no use' in failed.stderr
    assert 'main_distill.py' not in told and 'compare.py' not in told


def slurm(tmp_path, *args, interrupted: bool, torchrun_exit: int):
    """scripts/slurm.sh with stand-ins for the cluster's commands that write down what they were told."""
    stubs = tmp_path / 'stubs'
    stubs.mkdir(exist_ok=True)
    run = tmp_path / 'run'
    run.mkdir(exist_ok=True)
    (run / 'interrupted').write_text('of an earlier attempt')
    for name, body in {'srun': f'echo "$@" > {tmp_path}/srun; {"touch" if interrupted else "true"} {run}/interrupted; '
                               f'exit {torchrun_exit}',
                       'scontrol': f'[ $1 = show ] && echo node1 || echo "$@" > {tmp_path}/scontrol'}.items():
        (stubs / name).write_text(f'#!/bin/bash\n{body}\n')
        (stubs / name).chmod(0o755)
    return subprocess.run(['bash', str(ROOT / 'scripts' / 'slurm.sh'), *map(str, args)], capture_output=True, text=True,
                          env={'PATH': f'{stubs}:/usr/bin:/bin', 'SLURM_JOB_ID': '7', 'SLURM_NNODES': '2',
                               'SLURM_JOB_NODELIST': 'node[1-2]', 'SLURM_GPUS_ON_NODE': '8'})


def test_slurm_puts_an_interrupted_run_back_into_the_queue(tmp_path):
    args = ['main_base.py', '/data', '--output', tmp_path / 'run']
    assert slurm(tmp_path, *args, interrupted=False, torchrun_exit=1).returncode == 1  # failed: not again
    assert not (tmp_path / 'scontrol').exists()
    slurm(tmp_path, *args, interrupted=True, torchrun_exit=1)
    assert (tmp_path / 'scontrol').read_text() == 'requeue 7\n'
    command = (tmp_path / 'srun').read_text()
    assert '--nnodes 2' in command and ' main_base.py /data' in command and '--rdzv-endpoint node1:' in command
    refused = slurm(tmp_path, 'main_base.py', '/data', interrupted=False, torchrun_exit=0)
    assert refused.returncode == 2 and '--output' in refused.stderr
