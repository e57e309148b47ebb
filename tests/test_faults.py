"""Real processes, ranks, signals and crashes. tests/programs/faulty.py makes them happen at a given update."""
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from conftest import (
    PROGRAMS,
    QUICK,
    ROOT,
    Outcome,
    assert_close,
    assert_same,
    forked_command,
    output_of,
    start,
    torchrun_command,
    write_images,
)
from torch.distributed.run import get_args_parser

import main_base
from models import create_model
from utils import data, engine
from utils.signals import EXIT_INTERRUPTED

SPAWN2 = ['--multiprocessing-distributed', '--procs-per-node', 2]


def launch(mode, *args, **extra) -> Outcome:
    """One process, or ranks: 'process', 'spawn', 'torchrun 2', or 'forked 2' (programs/forked.py)."""
    how, *options = mode.split()
    more = SPAWN2 if how == 'spawn' else []
    command = {'torchrun': torchrun_command, 'forked': forked_command}.get(how, lambda: [sys.executable])(*options)
    args = [*QUICK, *map(str, [*args, *more])]
    with tempfile.TemporaryFile('w+') as said:  # no pipe: loader workers outlive a kill -9 for some seconds
        process = start(*command, PROGRAMS / 'faulty.py', *args, stdout=said, **extra)
        try:
            process.wait(timeout=150)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        out = said.read()
    return Outcome(process.returncode, out, out, output_of(args))


def short(images, output, *more):
    """Two epochs of five updates, the last of seven samples."""
    return [images, '--epochs', 2, '-p', 1, '--save-every', 2, *more, '--output', output]


@pytest.fixture
def whole(base):
    """A launch without a fault. What needs one process only happens in this one, which has torch imported already."""
    def go(mode, *args, **extra) -> Outcome:
        run = base(*args) if mode == 'process' and not extra else launch(mode, *args, **extra)
        assert run.code == 0, run.out + run.err
        return run
    return go


@pytest.fixture
def unharmed(images, once, whole, tmp_path_factory):
    """The short run without a fault, done once for each number of ranks and network."""
    def get(ranks, **extra) -> Outcome:
        output = tmp_path_factory.mktemp('unharmed') / 'run'
        mode = 'process' if ranks == 1 else f'forked {ranks}'
        return once((ranks, *extra), lambda: whole(mode, *short(images, output), **extra))
    return get


def test_every_launch_mode_gives_the_same_weights(images, tmp_path, unharmed):
    alone, two = unharmed(1, GROUP_NORM=1), unharmed(2, GROUP_NORM=1)
    spawned = launch('spawn', *short(images, tmp_path / 'spawned', '-j', 1), GROUP_NORM=1)
    three = launch('forked 3', *short(images, tmp_path / 'three', '--accum-steps', 2, '-b', 4), GROUP_NORM=1)
    assert spawned.code == three.code == 0, spawned.out + three.out
    assert_same(two.weights(), spawned.weights())
    for other in (two, three):  # shares of an update differ between ranks: 8 over 3, and the last 7
        assert_close(alone.weights(), other.weights())
        for a, b in zip(alone.log(), other.log(), strict=True):
            assert all(a['valid'][count] == b['valid'][count] for count in ('correct1', 'correct5', 'n'))
            assert a['train']['top1'] == b['train']['top1'] and a['train']['loss'] == pytest.approx(b['train']['loss'])
    assert re.search(r'%  rank 0: loss [\d.]+  top1', two.out) and re.search(r'%  loss [\d.]+  top1', alone.out)
    assert 'global batch 8 = 4 x 2 ranks' in two.out and 'x 3 ranks x 2 batches per update' in three.out


def test_one_rank_is_one_process(images, tmp_path, unharmed):
    assert_same(launch('torchrun 1', *short(images, tmp_path)).weights(), unharmed(1).weights())


def test_evaluation_integers_are_those_of_one_process(tmp_path, base):
    """Of student and teacher, where a rank has no image at all; the runs above have uneven shares and batches."""
    torch.manual_seed(0)
    torch.save(create_model('resnet8', 3).state_dict(), tmp_path / 'w.pth')
    write_images(tmp_path / 'few' / 'valid', 1, 1, classes=('ant', 'bee'))
    flags = [tmp_path / 'few', '-e', '--num-classes', 3, '--student-resume', tmp_path / 'w.pth', '--teacher-arch',
             'resnet8', '--teacher-resume', tmp_path / 'w.pth']
    one = base(*flags, '-b', 7, '--output', tmp_path / 'one').json('evaluate.json')['scores']
    three = launch('forked 3', *flags, '-b', 6, '--output', tmp_path / 'three').json('evaluate.json')['scores']
    assert three['student']['n'] == 2 and three['agreement'] == 100
    for name in ('student', 'teacher'):
        assert [one[name][k] for k in ('correct1', 'correct5', 'n')] == \
               [three[name][k] for k in ('correct1', 'correct5', 'n')]
        np.testing.assert_allclose(*(np.load(tmp_path / n / 'evaluate.npz')[name] for n in ('one', 'three')), rtol=1e-4)


@pytest.mark.parametrize('mode, updates', [('process', (3, 3, 4)), ('forked 2', (3, 2))])
def test_kill_9_at_any_update_and_again(images, tmp_path, whole, unharmed, mode, updates):
    """Killed in the first epoch, again in the same one, and in the second; ends as if nothing had been."""
    args = short(images, tmp_path / 'run', '-j', 1)
    for update in updates:
        killed = launch(mode, *args, FAULT=f'{update} kill')
        assert killed.code != 0 and 'done:' not in killed.out
    rest, never_killed = whole(mode, *args), unharmed(1 if mode == 'process' else 2)
    assert 'resumed from' in rest.out
    assert_same(rest.weights(), never_killed.weights())
    assert [r['valid'] for r in rest.log()] == [r['valid'] for r in never_killed.log()]


@pytest.mark.parametrize('mode, name', [('process', 'SIGTERM'), ('spawn', 'SIGINT'), ('torchrun 2', 'SIGTERM'),
                                        ('torchrun 2 --signals-to-handle SIGTERM,SIGINT,SIGUSR1', 'SIGUSR1')])
def test_signals_save_the_update_and_the_same_command_goes_on(images, tmp_path, whole, unharmed, mode, name):
    """To the whole process group, loader workers included; twice in one epoch."""
    if '--signals-to-handle' in mode and '--signals-to-handle' not in get_args_parser().format_help():
        pytest.skip('this torchrun cannot forward SIGUSR1')
    args = short(images, tmp_path, '-j', 2)
    for update in (1, 2) if mode == 'process' else (2,):
        part = launch(mode, *args, FAULT=f'{update} {name}')
        assert part.code == (1 if 'torchrun' in mode else EXIT_INTERRUPTED), part.out
        assert (tmp_path / 'interrupted').exists() and 'the same command' in part.out
        assert 'exited unexpectedly' not in part.out
    rest = whole(mode, *args)
    assert not (tmp_path / 'interrupted').exists()
    assert_same(rest.weights(), unharmed(1 if mode == 'process' else 2).weights())


def test_one_killed_rank_is_started_again_by_torchrun(images, unharmed):
    """An elastic restart finds the folder that the first attempt named."""
    run = launch('torchrun 2 --max-restarts 1', images, '--epochs', 2, '-p', 1, '--save-every', 2,
                 FAULT='4 kill-rank-1')
    folder = ROOT / re.search(r'in (runs/\S+)', run.out).group(1)
    assert run.code == 0 and f'resumed from {folder.relative_to(ROOT)}' in run.out, run.out
    assert_same(Outcome(0, '', '', folder).weights(), unharmed(2).weights())
    shutil.rmtree(folder)


def test_another_world_size_goes_on_at_the_same_sample(images, tmp_path, unharmed):
    """1, 2 and 1 ranks in one epoch: the weights of one process, so every sample was seen exactly once."""
    args = short(images, tmp_path)
    for mode, update in (('process', 2), ('torchrun 2', 1)):
        assert launch(mode, *args, FAULT=f'{update} SIGTERM', GROUP_NORM=1).code != 0
        assert (tmp_path / 'interrupted').exists()
    rest, alone = launch('process', *args, GROUP_NORM=1), unharmed(1, GROUP_NORM=1)
    assert_close(alone.weights(), rest.weights())
    assert rest.log()[0]['train']['top1'] == alone.log()[0]['train']['top1']


def test_a_broken_loss_on_one_rank_stops_all_before_the_update(images, tmp_path, unharmed):
    run = launch('torchrun 2', *short(images, tmp_path), FAULT='7 nan-rank-1', GROUP_NORM=1)
    assert run.code != 0
    assert 'loss ce is nan in epoch 1, update 2, samples' in run.out
    report = run.json('nonfinite.json')
    assert len(report['samples']) == 4 and report['files'][0].endswith('.jpg') and report['losses'] == {'ce': 'nan'}
    # nothing of the broken update is in what is left: going on without the fault ends where it would have
    rest = launch('forked 2', *short(images, tmp_path), GROUP_NORM=1)
    assert_same(rest.weights(), unharmed(2, GROUP_NORM=1).weights())


def test_a_broken_loss_has_its_exit_code(images, tmp_path):
    run = launch('process', *short(images, tmp_path), FAULT='1 inf-rank-0', GROUP_NORM=1)
    assert run.code == 3 and 'loss ce is inf in epoch 0, update 1' in run.out and 'Traceback' not in run.out


@pytest.mark.parametrize('amp', ['off', 'fp16'])
def test_a_broken_update_is_left_out_where_that_is_allowed(images, tmp_path, amp):
    """On all ranks, and after an interruption too; the network has norms, whose statistics are those of rank 0."""
    flags = ['--max-broken-updates', 1, '--amp', amp]
    run = launch('forked 2', *short(images, tmp_path, *flags), FAULT='7 nan-rank-1')
    assert run.code == 0 and 'note: loss ce is nan in epoch 1, update 2, samples' in run.out
    assert [record['broken'] for record in run.log()] == [0, 1]
    assert all(math.isfinite(record['train']['loss']) for record in run.log())
    assert all(value.isfinite().all() for value in run.weights().values())


def test_broken_updates_are_counted_over_a_resume(images, tmp_path, base, monkeypatch):
    class Supervised(engine.Supervised):
        calls, broken = 0, ()

        def forward(self, batch):
            Supervised.calls += 1
            logits, losses = super().forward(batch)
            return logits, {'ce': losses['ce'] * (float('nan') if Supervised.calls in self.broken else 1.0)}
    monkeypatch.setattr(main_base, 'Supervised', Supervised)
    args = short(images, tmp_path, '--max-broken-updates', 1, '-j', 0, '--ema', 0.9)
    monkeypatch.setattr(Supervised, 'broken', (2, 5))
    run = base(*args)
    assert run.code == 3 and 'note: loss ce is nan in epoch 0, update 2' in run.out
    assert 'error: loss ce is nan in epoch 0, update 5' in run.err and 'checkpoint' in run.err
    monkeypatch.setattr(Supervised, 'calls', 4)  # from the checkpoint after update 4 on
    assert 'error: loss ce is nan in epoch 0, update 5' in base(*args).err  # it knows of the other
    monkeypatch.setattr(Supervised, 'broken', ())
    run = base(*args)
    assert run.code == 0 and [record['broken'] for record in run.log()] == [1, 0]
    assert run.weights('checkpoint.pth')['ema']['n_averaged'] == 2 * 5 - 1


def test_a_full_disk_leaves_the_old_checkpoint(images, tmp_path, whole):
    """Files may not grow beyond a limit that lies below the size of a checkpoint."""
    args = short(images, tmp_path / 'run')
    assert launch('process', *args, FAULT='3 SIGTERM').code == EXIT_INTERRUPTED
    before = (tmp_path / 'run' / 'checkpoint.pth').read_bytes()
    full = start(sys.executable, '-c', 'import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, '
                 '(500_000, 500_000)); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")',
                 ROOT / 'main_base.py', *QUICK, *args)
    out, _ = full.communicate(timeout=120)
    assert full.returncode == 1 and 'Traceback' not in out, out
    assert 'error: cannot write' in out and 'the files that were there are intact' in out
    assert (tmp_path / 'run' / 'checkpoint.pth').read_bytes() == before
    whole('process', *args)


def test_a_hung_rank_ends_the_run_in_time(images, tmp_path):
    began = time.time()
    run = launch('spawn', *short(images, tmp_path, '--dist-timeout', 5), FAULT='3 hang-rank-1')
    assert run.code not in (0, EXIT_INTERRUPTED) and time.time() - began < 100
    assert 'rank 0 waits no longer' in run.out and '--dist-timeout is 5 seconds' in run.out


def test_a_hung_loader_process_ends_the_run_in_time(images, tmp_path, base, monkeypatch):
    monkeypatch.setattr(data, 'load_or_next', lambda source, index: time.sleep(60))
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.5)  # how long torch waits for it to go
    began, run = time.time(), base(*short(images, tmp_path, '-j', 1, '--dist-timeout', 1))
    assert run.code == 1 and time.time() - began < 30
    while multiprocessing.active_children():  # for which the end of the process would wait
        assert time.time() - began < 30
    assert run.err.splitlines()[-1].startswith('error: no images have come from the loader processes for 1 seconds')


def test_a_killed_loader_process_ends_the_run_at_once(images, tmp_path, base, monkeypatch):
    monkeypatch.setattr(data, 'load_or_next', lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.5)
    run = base(*short(images, tmp_path, '-j', 1))
    assert run.code == 1
    assert run.err.splitlines()[-1].startswith('error: a loader process is gone, as for want of memory')


def test_a_signal_at_the_end_of_a_process_changes_no_exit_code():
    """For which Python takes its time, and in which it takes the handlers of signals away."""
    program = '''if True:
        import os, signal, sys
        from utils import signals

        class Late:
            def __del__(self, kill=os.kill, process=os.getpid(), numbers=signals.SIGNALS):
                for number in numbers:
                    kill(process, number)
        late = Late()
        signals.listen()
        sys.exit(signals.EXIT_INTERRUPTED)'''
    assert start(sys.executable, '-c', program).wait(timeout=60) == EXIT_INTERRUPTED


def test_a_second_signal_exits_at_once(images, tmp_path):
    """While rank 0 waits inside a collective for a rank that hangs."""
    args = [*QUICK, *map(str, short(images, tmp_path, *SPAWN2))]
    process = start(sys.executable, PROGRAMS / 'faulty.py', *args, FAULT='3 hang-rank-1')
    for line in process.stdout:
        if 'Epoch 0 [2/5]' in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_run_goes_on_when_nobody_reads_what_it_prints(images, tmp_path):
    process = start(sys.executable, ROOT / 'main_base.py', *QUICK, images, '--epochs', 3, '-p', 1, '--output', tmp_path)
    process.stdout.readline()
    process.stdout.close()  # as of `| head -1`
    assert process.wait(120) == 0
    assert Outcome(0, '', '', tmp_path).json()['finished']


def test_ranks_that_were_started_otherwise_are_refused(images, tmp_path):
    with tempfile.TemporaryDirectory() as place:
        runs = [start(sys.executable, ROOT / 'main_base.py', *QUICK, images, '--output', tmp_path, '--lr', 0.1 + node,
                      *SPAWN2[:2], 1, '--world-size', 2, '--rank', node, '--dist-url', f'file://{place}/meet')
                for node in range(2)]
        said = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [1, 1]
    assert said[0].endswith('otherwise than rank 0, which is "there": --lr is 1.1 here, 0.1 there\n')
    assert 'Traceback' not in said[1]
