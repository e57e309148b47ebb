"""The small tools of scripts/."""
import json
import subprocess
import sys

from conftest import ROOT

from utils.sources import Folder


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
    for name, half in (('a', ''), ('$5_to_$9', '{"epoch": 2, "lr"')):  # which is no formula
        (tmp_path / name).mkdir()
        records = [{'epoch': e, 'lr': 0.1, 'train': {'loss': 2.0 - e, 'top1': 10 * e, 'top5': 50},
                    'valid': {'loss': 2.0, 'top1': 9.0 * e, 'top5': 50.0}, 'seconds': e} for e in range(2)]
        (tmp_path / name / 'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records) + half)
    drawn = tool('plot.py', tmp_path / 'a', tmp_path / '$5_to_$9', '-o', tmp_path / 'curves.png')
    assert drawn.returncode == 0 and (tmp_path / 'curves.png').read_bytes()[:4] == b'\x89PNG'
    drawn = tool('plot.py', tmp_path / 'a', '-o', tmp_path / 'plain')
    assert drawn.stdout == f'{tmp_path / "plain.png"}\n' and (tmp_path / 'plain.png').exists()
    missing = tool('plot.py', tmp_path / 'c', '-o', tmp_path / 'x.png')
    assert missing.returncode == 2 and 'log.jsonl' in missing.stderr and 'Traceback' not in missing.stderr


def demo(tmp_path, broken):
    """scripts/demo.sh in another checkout with a stand-in for python that fails where it is told to run `broken`."""
    (tmp_path / 'scripts').mkdir(exist_ok=True)
    (tmp_path / 'scripts' / 'demo.sh').write_bytes((ROOT / 'scripts' / 'demo.sh').read_bytes())
    (tmp_path / 'python').write_text(f'''#!/bin/bash
echo "$@" >> {tmp_path}/told
case "$*" in *{broken}*) echo of no use; exit 3; esac
''')
    (tmp_path / 'python').chmod(0o755)
    return subprocess.run(['bash', str(tmp_path / 'scripts' / 'demo.sh')], capture_output=True, text=True,
                          env={'PATH': '/usr/bin:/bin', 'BIN': str(tmp_path)})


def test_demo_compares_students_under_the_teacher_it_trained_and_stops_at_an_error(tmp_path):
    done = demo(tmp_path, broken='none')
    assert done.returncode == 0, done.stderr
    images, teacher, students = (line.split() for line in (tmp_path / 'told').read_text().splitlines())
    assert 'make_images.py' in images[0] and teacher[0] == 'main_base.py' and students[0].endswith('compare.py')
    weights = students[students.index('--teacher-resume') + 1]
    assert weights == teacher[teacher.index('--output') + 1] + '/last.pth'
    recipe = ' '.join(teacher[teacher.index('--image-size'):teacher.index('--lr')])
    assert recipe in ' '.join(students[students.index('--'):])

    (tmp_path / 'told').unlink()
    failed = demo(tmp_path, broken='main_base.py')
    assert failed.returncode == 3 and 'of no use' in failed.stderr
    assert 'compare.py' not in (tmp_path / 'told').read_text()


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
