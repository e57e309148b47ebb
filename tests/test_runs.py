"""main_base.py from beginning to end, in this process."""
import argparse
import copy
import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
import torchvision
from conftest import ROOT, arguments, assert_close, assert_same, at_call, write_images

import main_base
from models import create_model
from models.errors import Unfit
from utils import checkpoint, distributed, engine, errors, folder, signals, streams
from utils.data import Images
from utils.engine import Supervised
from utils.randomness import generator, seed_everything, seeded
from utils.run import Run
from utils.sources import Folder
from utils.views import CenterView


@pytest.fixture(scope='module')
def plain(images):
    """Flags of a short run."""
    return [images, '--epochs', 1, '-b', 13]


def test_a_run_leaves_everything_needed_to_judge_and_repeat_it(base, images, tmp_path):
    run = base(images, '-a', 'shufflenet_v2_x0_5', '--epochs', 2, '--output', tmp_path, '--tensorboard')
    assert run.code == 0
    names = {p.name.split('.tfevents')[0] for p in tmp_path.iterdir()}
    assert names >= {'args.json', 'log.jsonl', 'result.json', 'checkpoint.pth', 'best.pth', 'last.pth', 'events.out'}
    result, log = run.json(), run.log()
    assert result['finished'] and result['seed'] == 3 and result['arguments']['epochs'] == 2
    assert result['versions']['torch'] == torch.__version__ and 'main_base.py' in result['command']
    assert [record['epoch'] for record in log] == [0, 1] and log[1]['valid']['n'] == 15
    assert result['last'] == {'epoch': 1, **log[1]['valid']}
    assert result['best']['correct1'] == max(record['valid']['correct1'] for record in log)
    assert log[0]['train']['losses']['ce'] == pytest.approx(log[0]['train']['loss'])
    assert '39 training and 15 validation images, 3 classes' in run.out and 'global batch 8' in run.out
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=3)
    network.load_state_dict(run.weights('best.pth'))


def test_it_learns(base, images, tmp_path):
    run = base(images, '--arch', 'resnet8', '--epochs', 6, '--schedule', 'cosine', '--output', tmp_path)
    first, *later = (record['train']['loss'] for record in run.log())
    assert run.json()['best']['top1'] > 90 and min(later) < first / 2
    assert not [*tmp_path.glob('events.*')]  # which are for those who ask


def test_an_epoch_is_what_a_plain_loop_does(base, images, tmp_path):
    """The same two epochs written down naively: torch's own SGD and loss, one image after the other.

    Of a network that does not magnify rounding, as larger ones do within a few updates of so small a batch.
    """
    run = base(images, '--arch', 'resnet8', '--epochs', 2, '--nesterov', '--label-smoothing', 0.1, '--exact-pixels',
               '--output', tmp_path)
    seed_everything(3, 'initial weights')
    network = create_model('resnet8', 3)
    optimizer = torch.optim.SGD(network.parameters(), 0.02, 0.9, weight_decay=1e-4, nesterov=True)
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    crop = torchvision.transforms.Compose([torchvision.transforms.RandomResizedCrop(32),
                                           torchvision.transforms.RandomHorizontalFlip()])
    folder = torchvision.datasets.ImageFolder(images / 'train')
    for epoch in range(2):
        order = torch.randperm(39, generator=generator(3, 'order', epoch)).tolist()
        for begin in range(0, 39, 8):
            views, targets = [], []
            for i in order[begin:begin + 8]:
                with seeded(3, 'view', epoch, i):
                    views.append(normalize(torchvision.transforms.functional.to_tensor(crop(folder[i][0]))))
                targets.append(folder[i][1])
            loss = torch.nn.functional.cross_entropy(network(torch.stack(views)), torch.tensor(targets),
                                                     label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_close(run.weights(), network.state_dict(), atol=1e-5)


def test_best_is_kept_on_strict_improvement_only(base, images, tmp_path):
    """With a learning rate of 0 and frozen statistics nothing improves after the first epoch."""
    run = base(images, '--epochs', 3, '--lr', 0, '-a', 'squeezenet1_1', '--image-size', 64, '--output', tmp_path)
    assert run.json()['best']['epoch'] == 0 and run.json()['last']['epoch'] == 2


def test_the_best_weights_are_those_of_the_best_epoch_that_is_known(tmp_path, capsys):
    """A later one had left its own, but no checkpoint; or a copy of the folder is not whole. Times tell nothing."""
    weights, target = {'w': torch.arange(4.0)}, tmp_path / 'target'
    best, file = {'epoch': 1, 'weights': checkpoint.fingerprint(weights)}, tmp_path / 'best.pth'
    target.mkdir()
    for content, kept in ((weights, best), ({'w': torch.ones(4)}, None), ([1], None), (None, None)):
        torch.save(content, file) if content else file.unlink()
        assert folder.bring_best(tmp_path, target, best) == kept
        assert ('does not hold the weights of epoch 1' in capsys.readouterr().err) == (kept is None)
        assert (target / 'best.pth').exists()  # once brought, it stays
    assert_close(torch.load(target / 'best.pth'), weights)


def test_the_best_weights_of_an_older_run_are_told_by_its_result(tmp_path, capsys):
    """Which is there behind them, of the same epoch."""
    weights, result = tmp_path / 'best.pth', tmp_path / 'result.json'
    for found, older, kept in (({'epoch': 1}, weights, {'epoch': 1}), ({'epoch': 2}, weights, None),
                               ({'epoch': 1}, result, None)):
        weights.touch()
        result.write_text(json.dumps({'best': found}))
        os.utime(older, (1, 1))
        assert folder.bring_best(tmp_path, tmp_path, {'epoch': 1}) == kept
        assert ('does not hold the weights of epoch 1' in capsys.readouterr().err) == (kept is None)


def test_an_evaluation_tells_where_it_sees_images_otherwise(base, images, tmp_path):
    seen = ['--mean', 0.5, 0.5, 0.5, '--std', 0.2, 0.2, 0.2, '--val-resize-size', 32]
    assert base(images, '--epochs', 1, '--output', tmp_path, *seen).code == 0
    for more, told in ((seen, []), ([], ['--mean is None here', '--std is ', '--val-resize-size is ']),
                       (seen[:8], ['--val-resize-size is None here, 32 there'])):
        for weights in (['--output', tmp_path], ['--student-resume', tmp_path / 'last.pth']):
            run = base(images, '-e', *weights, *more)
            assert run.code == 0 and ('of a run that saw images otherwise: ' in run.out) == bool(told)
            assert all(words in run.out for words in told)


def test_results_tell_on_what_each_part_of_a_run_was_computed(base, images, tmp_path, monkeypatch):
    for code, calls in (('a', 1), ('a', 2), ('b', 6)):
        monkeypatch.setattr('utils.run.git_revision', lambda code=code: code)
        with at_call(calls):  # in the first epoch, again in it, and in the second
            base(images, '--epochs', 3, '--output', tmp_path)
    monkeypatch.setattr('utils.run.device_name', lambda device: 'abacus')
    result = base(images, '--epochs', 3, '--output', tmp_path).json()
    assert [(stint['epoch'], stint['git']) for stint in result['stints']] == [(0, 'a'), (0, 'b'), (1, 'b')]
    assert [stint['device'] == 'abacus' for stint in result['stints']] == [False, False, True]
    assert result['device'] == 'abacus' and result['git'] == 'b'


def test_a_run_goes_on_under_a_version_that_has_more_flags(base, images, tmp_path):
    with at_call(1):
        assert base(images, '--output', tmp_path).code == signals.EXIT_INTERRUPTED
    saved = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)
    del saved['arguments']['flip'], saved['arguments']['crop_area']
    torch.save(saved, tmp_path / 'checkpoint.pth')
    run = base(images, '--epochs', 1, '--output', tmp_path)
    assert run.code == 1 and '--epochs is 1 here, 90 there;' in run.err
    run = base(images, '--flip', 0, '--output', tmp_path)
    assert run.code == 1 and '--flip is 0.0 here, 0.5 there;' in run.err
    with at_call(1):
        run = base(images, '--output', tmp_path)
    assert run.code == signals.EXIT_INTERRUPTED and 'resumed from' in run.out


def test_what_the_global_batch_is_does_not_change(base, images, tmp_path, monkeypatch):
    with at_call(1):
        assert base(images, '-b', 8, '--output', tmp_path).code == signals.EXIT_INTERRUPTED
    monkeypatch.setattr(distributed, 'planned', lambda args: (2, 2))
    other = base(images, '-b', 8, '--output', tmp_path)
    assert other.code == 1 and '--global-batch is 16 here, 8 there' in other.err
    with at_call(1):
        base(images, '-b', 8, '--output', tmp_path, '--overwrite')
    monkeypatch.undo()
    look = base(images, '-b', 8, '--output', tmp_path, '--inspect', '--world-size', 2, '--rank', 0,
                '--dist-url', 'tcp://nowhere:1')
    assert look.code == 0, look.out  # at what two nodes would do


def test_a_run_that_goes_on_in_a_new_folder_has_the_best_weights_there(base, images, tmp_path):
    def run(output, epochs, *flags):
        return base(images, '--epochs', epochs, '--lr', 0, '-a', 'squeezenet1_1', '--image-size', 64, *flags,
                    '--output', tmp_path / output)
    first, resume = run('a', 1), ('--resume', tmp_path / 'a' / 'checkpoint.pth')
    second = run('b', 2, *resume)
    assert second.code == 0 and second.json()['best']['epoch'] == 0 and second.json()['last']['epoch'] == 1
    assert_same(second.weights('best.pth'), first.weights('best.pth'))
    done = run('c', 1, *resume)
    assert done.code == 1 and 'is of a run that is done' in done.err and not (tmp_path / 'c').exists()
    (tmp_path / 'a' / 'best.pth').unlink()
    third = run('d', 2, *resume)
    assert 'does not hold the weights of epoch 0' in third.err and third.json()['best']['epoch'] == 1
    assert (tmp_path / 'd' / 'best.pth').exists()


def test_what_was_changed_on_the_way_is_told_by_the_result(base, images, tmp_path):
    resume = ['--epochs', 2, '--resume', tmp_path / 'a' / 'checkpoint.pth', '--output']
    assert base(images, '--epochs', 1, '--output', tmp_path / 'a').json()['changed'] == []
    changed = base(images, *resume, tmp_path / 'b', '--lr', 0.01, '--seed', 4)
    assert changed.code == 0 and changed.json()['changed'] == [
        'epoch 1: --epochs is 2 here, 1 there, --lr is 0.01 here, 0.02 there, --seed is 4 here, 3 there']
    for flags, name in ((['--optimizer', 'adamw'], 'optimizer'), (['--ema', 0.9], 'ema'),
                        (['--no-bias-decay'], 'no-bias-decay')):
        refused = base(images, *resume, tmp_path / 'c', *flags)
        assert refused.code == 1 and f'has another --{name}, which a run keeps' in refused.err, refused.err
        assert refused.err.count('\n') == 1 and not (tmp_path / 'c').exists()


def test_evaluation_counts_are_exact(base, images, monkeypatch, tmp_path):
    """Against a slow loop, for batch sizes that divide and that do not, at once and in parts."""
    torch.manual_seed(1)
    network = create_model('resnet8', 3).eval()
    torch.save(network.state_dict(), tmp_path / 'w.pth')
    dataset = Images(Folder(images / 'valid', by_pil=True), CenterView(32, 37))
    prepare = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    right, loss = 0, 0.0
    for i in range(len(dataset)):
        sample = dataset[(0, i)]
        with torch.no_grad():
            logits = network(prepare(sample.images / 255)[None])
        right += int(logits.argmax()) == sample.target
        loss -= logits.double().log_softmax(1)[0, sample.target].item() / len(dataset)
    for batch in (1, 4, 15, 64, 15):
        run = base(images, '-e', '--student-resume', tmp_path / 'w.pth', '-b', batch, '--output', tmp_path / 'e')
        if batch == 64:
            monkeypatch.setattr(engine, 'parts', lambda images: images.split(4))
        score = run.json('evaluate.json')['scores']['student']
        assert (score['correct1'], score['correct5'], score['n']) == (right, 15, 15)  # top-5 of 3 classes
        assert score['loss'] == pytest.approx(loss, rel=1e-5)


def test_a_cpu_looks_at_few_large_images_or_more_small_ones():
    for size, at_once in (224, [8, 8, 4]), (64, [16, 4]), (32, [20]):
        assert [len(x) for x in engine.parts(torch.zeros(20, 3, size, size))] == at_once  # one thread


def test_teacher_and_student_in_one_pass(base, images, tmp_path):
    paths = []
    for name, seed in (('resnet8', 1), ('mobilenet_v2', 2)):
        torch.manual_seed(seed)
        paths.append(tmp_path / f'{name}.pth')
        torch.save(create_model(name, 3).state_dict(), paths[-1])
    both = base(images, '-e', '--student-resume', paths[0], '--teacher-arch', 'mobilenet_v2',
                '--teacher-resume', paths[1], '--output', tmp_path / 'both').json('evaluate.json')['scores']
    alone = base(images, '-e', '-a', 'mobilenet_v2', '--student-resume', paths[1], '--output', tmp_path / 'alone')
    assert both['teacher'] == alone.json('evaluate.json')['scores']['student']
    same = base(images, '-e', '--student-resume', paths[0], '--teacher-arch', 'resnet8', '--teacher-resume', paths[0],
                '--output', tmp_path / 'same').json('evaluate.json')['scores']
    assert same['agreement'] == 100 and same['teacher'] == same['student']


def test_a_finished_run_can_be_evaluated_by_its_folder_or_files(base, images, tmp_path):
    run = base(images, '--epochs', 1, '--output', tmp_path / 'run')
    last = run.log()[-1]['valid']
    for flags in (['--output', tmp_path / 'run'], ['--resume', tmp_path / 'run' / 'checkpoint.pth'],
                  ['--resume', tmp_path / 'run' / 'last.pth'], ['--student-resume', tmp_path / 'run' / 'last.pth']):
        assert f'({last["correct1"]}/15)' in base(images, '-e', *flags).out
    assert 'random weights' in base(images, '-e').out


def test_the_same_command_goes_on_and_another_is_refused(base, images, tmp_path):
    flags = [images, '--epochs', 1, '--output', tmp_path]
    first = base(*flags)
    before = first.weights()
    again = base(*flags)
    assert again.code == 0 and 'resumed from' in again.out and 'done:' in again.out
    assert len(again.log()) == 1
    other = base(*flags, '--lr', 0.5)
    assert other.code == 1 and '--lr is 0.5 here, 0.02 there' in other.err and '--overwrite' in other.err
    assert_same(other.weights(), before)
    assert base(*flags, '-j', 1, '-p', 3).code == 0  # says how to run, not what
    (tmp_path / 'evaluate.json').write_text('of weights that go')
    anew = base(*flags, '--lr', 0.5, '--overwrite')
    assert anew.code == 0 and 'resumed' not in anew.out and len(anew.log()) == 1
    assert not (tmp_path / 'evaluate.json').exists()
    after = anew.weights()
    assert any(not torch.equal(after[k], before[k]) for k in before)


def test_what_lies_in_a_folder_is_not_written_over(base, images, tmp_path):
    flags = [images, '--epochs', 2, '--output', tmp_path / 'run']
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'notes.tmp').write_text('mine')
    assert base(*flags).code == 0 and (tmp_path / 'run' / 'notes.tmp').exists()
    best = (tmp_path / 'run' / 'best.pth').read_bytes()
    for path in (tmp_path / 'run').glob('checkpoint*'):
        path.unlink()
    assert "run whose checkpoint.pth is gone" in base(*flags).err
    run = base(*flags, '--student-resume', tmp_path / 'run' / 'best.pth', '--overwrite')
    assert run.code == 1 and 'lies in --output, where this run would write over it' in run.err
    assert (tmp_path / 'run' / 'best.pth').read_bytes() == best
    shutil.copytree(images, tmp_path / 'images')
    inside = tmp_path / 'images' / 'train' / 'run'
    run = base(tmp_path / 'images', '--output', inside)
    assert run.code == 1 and 'lies among the images' in run.err and not inside.exists()
    run = base(tmp_path / 'images', '--output', inside, '--evaluate')
    assert run.code == 1 and 'lies among the images' in run.err and not inside.exists()
    (tmp_path / 'brought').mkdir()
    (tmp_path / 'brought' / 'best.pth').write_bytes(best)
    run = base(images, '--epochs', 1, '--output', tmp_path / 'brought')
    assert run.code == 1 and 'brought/best.pth would be written over' in run.err
    assert (tmp_path / 'brought' / 'best.pth').read_bytes() == best
    assert base(images, '--epochs', 1, '--output', tmp_path / 'brought', '--overwrite').code == 0


def test_a_name_that_no_file_can_have(base, images):
    run = base(images, '--output', 'x' * 300)
    assert run.code == 1 and run.err == f'error: {"x" * 300}/checkpoint.pth.new: File name too long\n'


def test_a_run_that_began_on_an_empty_folder_does_not_write_over_a_later_one(base, images, tmp_path, monkeypatch):
    """The same job twice: the first one saves and ends while the second one still lists its images."""
    flags = [images, '--epochs', 1, '--output', tmp_path / 'run']
    genuine = main_base.load_data

    def slowly(*args):
        with monkeypatch.context() as patch:
            patch.setattr(main_base, 'load_data', genuine)
            assert base(*flags).code == 0
        return genuine(*args)
    monkeypatch.setattr(main_base, 'load_data', slowly)
    late = base(*flags, '--seed', 9)
    assert late.code == 1 and 'another run has written to' in late.err and late.json()['seed'] == 3


def test_the_weights_a_run_starts_from_may_move_but_not_change(base, images, tmp_path):
    base(images, '--epochs', 1, '--output', tmp_path / 'first')
    shutil.copy(tmp_path / 'first' / 'best.pth', tmp_path / 'a.pth')
    flags = [images, '--epochs', 1, '--output', tmp_path / 'run', '--student-resume']
    with at_call(2):
        assert base(*flags, tmp_path / 'a.pth').code == signals.EXIT_INTERRUPTED
    torch.save({name: value + 1 for name, value in torch.load(tmp_path / 'a.pth').items()}, tmp_path / 'b.pth')
    assert 'its start: ' in base(*flags, tmp_path / 'b.pth').err
    assert base(*flags, tmp_path / 'first' / 'best.pth').code == 0


def test_a_damaged_log_does_not_stop_a_run(base, images, tmp_path):
    base(images, '--epochs', 2, '--output', tmp_path)
    lines = (tmp_path / 'log.jsonl').read_bytes().splitlines(keepends=True)
    (tmp_path / 'log.jsonl').write_bytes(lines[0] + b'garb\xffage\n{"epoch": "x"}\n' + lines[1])
    assert base(images, '--epochs', 2, '--output', tmp_path).code == 0
    assert (tmp_path / 'log.jsonl').read_bytes() == b''.join(lines)


def test_one_image_in_the_last_batch_is_one_line(base, images, tmp_path):
    run = base(images, '-a', 'shufflenet_v2_x0_5', '--epochs', 1, '-b', 19, '--output', tmp_path)
    assert run.code == 1 and run.err.startswith('error: of the 39 images an epoch has a batch of 1, which')
    assert 'Epoch 0' not in run.out and not (tmp_path / 'args.json').exists()  # it is known beforehand
    fine = base(images, '--epochs', 1, '-b', 19, '--image-size', 32, '--output', tmp_path)  # maps of 8 x 8 pixels
    assert fine.code == 0, fine.err


def test_resume_of_another_network_or_another_optimizer(base, images, tmp_path):
    base(images, '--epochs', 1, '--output', tmp_path / 'a')
    path = tmp_path / 'a' / 'checkpoint.pth'
    run = base(images, '--resume', path, '-a', 'mobilenet_v2', '--output', tmp_path / 'b')
    assert run.code == 1 and 'is a resnet8, not a mobilenet_v2' in run.err
    run = base(images, '--resume', path, '--num-classes', 7, '--output', tmp_path / 'c')
    assert run.code == 1 and 'fc.weight is [3, 64] instead of [7, 64]' in run.err
    run = base(images, '--resume', path, '--epochs', 2, '--wd', 0.1, '--output', tmp_path / 'd')
    assert run.code == 0 and 'note:' in run.err and '--weight-decay is 0.1 here' in run.err
    assert len(run.log()) == 1 and run.log()[0]['epoch'] == 1
    saved = torch.load(tmp_path / 'd' / 'checkpoint.pth', weights_only=True)
    assert saved['optimizer']['param_groups'][0]['weight_decay'] == 0.1
    again = base(images, '--resume', path, '--epochs', 2, '--wd', 0.1, '--output', tmp_path / 'd')
    assert again.code == 0 and f'resumed from {tmp_path / "d"}' in again.out  # not from where it once started


def test_two_runs_do_not_share_a_folder(images, base, tmp_path):
    import subprocess
    import sys
    hold = ('import fcntl, sys; f = open(sys.argv[1], "w"); fcntl.lockf(f, fcntl.LOCK_EX); print("held", flush=True); '
            'sys.stdin.read()')
    holder = subprocess.Popen([sys.executable, '-c', hold, str(tmp_path / '.lock')], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    holder.stdout.readline()
    run = base(images, '--epochs', 1, '--output', tmp_path)
    holder.communicate()
    assert run.code == 1 and 'another run is writing to' in run.err
    assert base(images, '--epochs', 1, '--output', tmp_path).code == 0


def test_default_output_tells_script_data_network_and_time(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base('--dummy', '--dummy-images', 4, '--num-classes', 1000, '--epochs', 1, '-b', 4).code == 0
    made, = (tmp_path / 'runs').iterdir()
    assert re.fullmatch(r'base-dummy-resnet8-\d{8}-\d{6}', made.name)
    monkeypatch.setattr(sys, 'argv', ['main_distill.py'])
    args = argparse.Namespace(**vars(arguments('--dummy', '--arch', 'resnet8')), distiller=['mgd', 'kd'])
    assert folder.default_output(args).name.startswith('distill-dummy-resnet8-mgd-kd-20')


@pytest.mark.parametrize('flags', [
    ['-a', 'mobilenet_v2', '--ema', '0.9'],                                          # dropout, average
    ['--optimizer', 'adamw', '--accum-steps', '2', '-b', '5'],                        # a tail of two unequal batches
    ['--mixup', '0.2', '--cutmix', '1', '--auto-augment', 'randaugment', '--random-erasing', '0.5'],
    ['--amp', 'bf16', '--channels-last', '--clip-grad', '1'],
    ['--amp', 'fp16', '--image-size', '16'],                                          # the scaler's state
], ids=lambda flags: ' '.join(flags))
def test_resume_is_exact_to_the_bit(base, images, tmp_path, flags):
    """Stopped twice inside the first epoch and once in the second; ends as if never stopped."""
    flags = [images, '--epochs', 2, '--warmup', '--warmup-epochs', 1, *flags]
    whole = base(*flags, '--output', tmp_path / 'whole')
    assert whole.code == 0, whole.err
    for updates in (2, 1, 4):
        with at_call(updates):
            part = base(*flags, '--output', tmp_path / 'parts')
        assert part.code == signals.EXIT_INTERRUPTED and (tmp_path / 'parts' / 'interrupted').exists()
    rest = base(*flags, '--output', tmp_path / 'parts')
    assert rest.code == 0 and not (tmp_path / 'parts' / 'interrupted').exists()
    assert_same(rest.weights(), whole.weights())
    assert_same(rest.weights('best.pth'), whole.weights('best.pth'))
    for a, b in zip(rest.log(), whole.log(), strict=True):
        assert a['valid'] == b['valid'] and a['train']['top1'] == b['train']['top1']
        assert a['train']['loss'] == pytest.approx(b['train']['loss'])


def test_a_signal_during_the_evaluation_loses_no_training(base, images, tmp_path, monkeypatch):
    flags = [images, '--epochs', 1, '--output', tmp_path]
    genuine = main_base.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(main_base, 'evaluate', lambda *a: signals._note(15) or genuine(*a))
        assert base(*flags).code == signals.EXIT_INTERRUPTED
        assert ' without --overwrite goes on from epoch' in base(*flags, '--overwrite').err
    assert json.loads((tmp_path / 'interrupted').read_text()) == {'signal': 15, 'epoch': 0, 'sample': 39}
    assert base(*flags).log()[0]['train']['top1'] > 0


SWITCHES = ['--seed 4', '--lr 0.1', '--momentum 0.5', '--nesterov', '--wd 0.1', '--wd 0.1 --no-bias-decay',
            '--random-erasing 1', '--clip-grad 0.01', '--label-smoothing 0.2', '--mixup 0.5', '--cutmix 1',
            '--auto-augment autoaugment',
            '--auto-augment randaugment', '--auto-augment trivialaugment', '--auto-augment augmix',
            '--accum-steps 2', '--warmup --warmup-epochs 1', '--warmup --warmup-epochs 1 --warmup-by iteration',
            '--schedule cosine', '--schedule linear', '--lr-drop-epochs 0', '--lr-drop-epochs 0 --lr-drop-ratio 0.5',
            '--start-epoch 1 --epochs 2', '--optimizer adamw', '-b 12', '--image-size 40', '--amp bf16', '--ema 0.5',
            '--num-classes 5', '-a resnet14', '--crop random', '--crop centre', '--crop-area 0.5', '--flip 0',
            '--val-resize-size 48 --crop random', '--mean 0.5 0.5 0.5 --std 0.229 0.224 0.225',
            '--mean 0.485 0.456 0.406 --std 0.5 0.5 0.5']


def test_every_switch_changes_the_result_and_nothing_else_does(base, plain, tmp_path):
    def digest(number, *flags):
        run = base(*plain, '--output', tmp_path / str(number), *flags)
        assert run.code == 0, (flags, run.err)
        return sum(v.double().abs().sum().item() for v in run.weights().values())
    results = {'': digest('plain')}
    for number, switch in enumerate(SWITCHES):
        results[switch] = digest(number, *switch.split())
    # of these, --schedule constant is --schedule step before its first drop; --deterministic and the layout of the
    # memory, workers and log are about how to run
    assert digest('again', '--schedule', 'constant', '-p', 1, '--save-every', 1, '-j', 1) == results['']
    values = list(results.values())
    assert len(set(values)) == len(values), [k for k, v in results.items() if values.count(v) > 1]


def test_deterministic_channels_last_and_compile_run(base, plain, tmp_path):
    a, b = (base(*plain, '--deterministic', '--output', tmp_path / name) for name in 'ab')
    assert_same(a.weights(), b.weights())
    torch.use_deterministic_algorithms(False)
    one_update = [*plain, '-b', 39]  # in more, the kernels' rounding grows
    slow = base(*one_update, '--output', tmp_path / 'c').weights()
    for name, flag in (('d', '--channels-last'), ('e', '--compile')):
        other = base(*one_update, flag, '--output', tmp_path / name).weights()
        assert other.keys() == slow.keys() and all(v.is_contiguous() for v in other.values())
        seed_everything(3, 'initial weights')
        moved = apart = 0.0
        for key, value in create_model('resnet8', 3).named_parameters():
            moved += (slow[key] - value).square().sum()
            apart += (slow[key] - other[key]).square().sum()
        assert apart < 1e-4 * moved, flag


def test_what_cannot_be_deterministic_is_named(base, plain, tmp_path, monkeypatch):
    def forward(self, batch):
        return torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
    monkeypatch.setattr(Supervised, 'forward', forward)
    run = base(*plain, '--deterministic', '--output', tmp_path)
    torch.use_deterministic_algorithms(False)
    assert (run.code, run.err) == (1, 'error: --deterministic: put_ does not have a deterministic implementation\n')


@pytest.mark.parametrize('broken', ['__init__', 'flush', 'close'])
def test_scalars_are_nothing_to_end_a_run_for(base, images, tmp_path, monkeypatch, broken):
    def fail(self, *args, **kwargs):
        raise OSError('No space left on device')
    monkeypatch.setattr(f'torch.utils.tensorboard.SummaryWriter.{broken}', fail)
    run = base(images, '--epochs', 2, '--output', tmp_path, '--tensorboard')
    assert run.code == 0 and len(run.log()) == 2
    assert run.err.count('note: no scalars for TensorBoard are written: No space left on device') == (broken != 'close')


def test_no_memory_is_one_line(base, images, tmp_path, monkeypatch):
    def forward(self, batch):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a capacity of 8 GiB')
    monkeypatch.setattr(Supervised, 'forward', forward)
    run = base(images, '--output', tmp_path)
    assert run.code == 1 and len(run.err.splitlines()) == 1
    assert run.err.startswith('error: rank 0: CUDA out of memory. Tried to allocate 9.00 GiB: take a smaller -b')


def test_memory_that_was_freed_is_taken_again_and_no_child_holds_it():
    """Without new pages, of which a map of 64 MiB has 16,384: after a few times, as it is aligned; in any thread."""
    program = """if True:
        import os
        import resource
        import threading
        import torch
        from utils.cost import status
        from utils import distributed
        from utils.args import base_parser

        def work():
            before, small = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, status('RssAnon')
            for _ in range(40):
                torch.ones(2**24)
            faults, large = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, status('RssAnon')
            if not os.fork():
                print(faults, (large - small) >> 20, (status('RssAnon') - small) >> 20, flush=True)
                os._exit(0)

        def in_a_thread(args, device):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        distributed.launch(in_a_thread, base_parser('').parse_args(['--dummy', '--no-accel']))
    """
    told = subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True, capture_output=True).stdout
    faults, kept, held = map(int, told.split())
    assert faults < 20 * 16384 and kept >= 60 and held < 30


@pytest.mark.parametrize('flags, says', [
    (['--num-classes', 10**13], 'rank 0: not enough memory: you tried to allocate 2560000000000000 bytes'),
    (['--world-size', 2, '--rank', 1, '--dist-url', 'tcp://127.0.0.1:9', '--dist-timeout', 1],
     'rank 1 waits no longer for the others')])
def test_more_memory_than_there_is_and_a_master_that_is_not(base, images, tmp_path, flags, says):
    run = base(images, *flags, '--output', tmp_path)
    assert run.code == 1 and 'Traceback' not in run.err and run.err.splitlines()[-1].startswith(f'error: {says}')


def test_words_for_what_others_bury():
    """In the last line of a replica, behind NCCL's own numbers, in a loader process."""
    args = argparse.Namespace(dist_timeout=60)
    buried = 'Caught Unfit in replica 0 on device 0.\nOriginal Traceback\nmodels.errors.Unfit: it returns a tuple'
    for text in 'it returns a tuple', buried:
        assert errors.in_words(Unfit(text), 0, args) == 'it returns a tuple'
    nccl = RuntimeError('NCCL error in: NCCLUtils.cpp:77, unhandled system error\nLast error:\nno space on\n/dev/shm')
    assert 'unhandled system error: no space on /dev/shm' in errors.in_words(nccl, 0, args)
    loader = RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm)')
    assert errors.in_words(loader, 0, args).startswith('/dev/shm, where loader processes put')


def test_an_error_without_words_keeps_its_traceback():
    for error in (ValueError(), RuntimeError(), ValueError('Connection of layers')):
        assert errors.in_words(error, 0, None) == ''


class InductorError(RuntimeError):
    """As torch's, which is there where a compiler is."""


def test_what_a_killed_compilation_has_left_is_removed(tmp_path):
    (tmp_path / 'c.main.so').touch()
    error = InductorError(f'ImportError: {tmp_path}/c.main.so: file too short')
    assert 'give the command again' in errors.remove_torn(error) and not list(tmp_path.iterdir())
    (tmp_path / 'c.main.so').touch()
    for other in InductorError('CppCompileError: C++ compile error'), OSError(str(error)):
        assert errors.remove_torn(other) == '' and list(tmp_path.iterdir())


@pytest.mark.parametrize('caught, code', [([], None), ([(15, 0.0)], 75)])
def test_a_signal_that_reaches_compilers_too_is_a_signal(monkeypatch, caught, code, capsys, tmp_path):
    def worker(args, device):
        raise InductorError('CppCompileError: C++ compile error')
    monkeypatch.setattr(distributed.signals, '_caught', caught)
    with pytest.raises(SystemExit if caught else InductorError) as ended:
        distributed._run(worker, arguments('--dummy', '--no-accel', '--compile', '--output', tmp_path))
    assert (tmp_path / 'interrupted').exists() == bool(caught)  # so that a scheduler starts it again
    assert not caught or (ended.value.code == code and 'the same command goes on' in capsys.readouterr().err)


def test_a_checkpoint_that_is_passed_over_is_named(base, images, tmp_path):
    flags = [images, '--epochs', 1, '--output', tmp_path, '-j', 0]
    assert base(*flags).code == 0
    run = base(*flags, '--resume', tmp_path / 'last.pth')
    assert run.code == 0 and f'note: --resume {tmp_path / "last.pth"} is passed over' in run.err


def test_a_run_of_the_other_script_is_said_to_be_one(base, distill, tmp_path):
    flags = ['--dummy', '--dataset', 'cifar10', '--dummy-images', 8, '--arch', 'resnet8', '--output', tmp_path]
    assert distill(*flags, '--teacher-arch', 'resnet8', '--distiller', 'kd').code == 0
    run = base(*flags)
    assert run.code == 1 and 'holds a run of another script than ' in run.err and 'kd' not in run.err


def test_pretrained_head_starts_fresh(base, images, tmp_path, monkeypatch):
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    torch.manual_seed(0)
    state = torchvision.models.shufflenet_v2_x0_5().state_dict()
    monkeypatch.setattr(type(weights), 'get_state_dict', lambda self, **kw: copy.deepcopy(state))
    run = base(images, '-a', 'shufflenet_v2_x0_5', '--pretrained', '--epochs', 1, '--lr', 0, '--output', tmp_path)
    assert torch.equal(run.weights()['conv1.0.weight'], state['conv1.0.weight'])
    assert run.weights()['fc.weight'].shape == (3, 1024) and 'was published for' not in run.out
    cifar = base('--dummy', '--dataset', 'cifar10', '-a', 'shufflenet_v2_x0_5', '--pretrained', '-e')
    assert 'was published for images of mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225); as a st' in cifar.out
    as_published = base('--dummy', '--dataset', 'cifar10', '-a', 'shufflenet_v2_x0_5', '--pretrained', '-e', '--mean',
                        0.485, 0.456, 0.406, '--std', 0.229, 0.224, 0.225)
    assert as_published.code == 0 and 'was published for' not in as_published.out


def test_published_weights_are_asked_for_by_a_run_that_begins(base, images, tmp_path, monkeypatch):
    """Not by one that goes on, or is told of others: it may be where there is no network."""
    def offline(*args, **kwargs):
        raise OSError('no network')
    flags = [images, '-a', 'shufflenet_v2_x0_5', '--output', tmp_path / 'run']
    assert base(*flags, '--epochs', 1).code == 0
    monkeypatch.setattr(torchvision.models.WeightsEnum, 'get_state_dict', offline)
    resumed = [*flags[:-1], tmp_path / 'other', '--epochs', 2, '--resume', tmp_path / 'run' / 'checkpoint.pth']
    for run in ([*flags, '-e'], [*flags[:3], '-e', '--student-resume', tmp_path / 'run' / 'last.pth'], resumed):
        assert base(*run, '--pretrained').code == 0
    fresh = base(*flags[:3], '--pretrained', '--epochs', 1)
    assert fresh.code == 1 and 'cannot be had: no network. Remove a' in fresh.err

    def torn(*args, **kwargs):
        raise RuntimeError('PytorchStreamReader failed\nmore of it')
    monkeypatch.setattr(torchvision.models.WeightsEnum, 'get_state_dict', torn)
    damaged = base(*flags[:3], '--pretrained', '--epochs', 1)
    assert damaged.code == 1 and 'cannot be had: PytorchStreamReader failed. Remove a' in damaged.err
    assert damaged.err.count('\n') == 1


def test_another_precision_may_take_a_run_up(base, images, tmp_path):
    assert base(images, '--epochs', 1, '--output', tmp_path / 'a').code == 0
    run = base(images, '--epochs', 2, '--amp', 'fp16', '--output', tmp_path / 'b', '--resume',
               tmp_path / 'a' / 'checkpoint.pth')
    assert run.code == 0 and run.weights('checkpoint.pth')['scaler'], run.err


def test_to_start_anew_and_to_score_is_one_too_many(base, images, tmp_path):
    run = base(images, '--overwrite', '-e', '--output', tmp_path)
    assert run.code == 2 and 'choose one' in run.err


def test_networks_of_torchvision_train_too(base, images, tmp_path):
    run = base(images, '-a', 'squeezenet1_1', '--image-size', 64, '--epochs', 1, '--output', tmp_path)
    assert run.code == 0
    torchvision.models.squeezenet1_1(num_classes=3).load_state_dict(run.weights())


@pytest.mark.parametrize('name, classes', [('cifar10', 10), ('cifar100', 100)])
def test_cifar_recipe_on_dummy_data(base, tmp_path, name, classes):
    run = base('--dummy', '--dummy-images', 16, '--dataset', name, '--epochs', 1, '--output', tmp_path)
    assert run.code == 0 and run.weights()['fc.weight'].shape[0] == classes


def test_both_names_of_the_evaluation_folder(base, tmp_path):
    write_images(tmp_path / 'data' / 'train', 4, 0)
    write_images(tmp_path / 'data' / 'val', 2, 1)
    assert base(tmp_path / 'data', '--epochs', 1, '--output', tmp_path / 'o').log()[0]['valid']['n'] == 6


def test_runs_that_begin_in_one_second_have_folders_of_their_own(base, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, 'strftime', lambda form: '20261120-120000')
    for epochs in (1, 2):  # as one folder, it would hold a run with other arguments
        run = base(images, '--epochs', epochs)
        assert run.code == 0, run.err
    names = {path.name for path in (tmp_path / 'runs').iterdir()}
    first = f'base-{images.name}-resnet8-20261120-120000'
    assert names == {first, f'{first}-2'}


def test_weights_that_predict_no_number_are_no_epoch(base, images, tmp_path):
    """Argmax would take the first class for their guess. Where the loss while training is finite to the end."""
    flags = [images, '--image-size', 32, '-b', 64, '--epochs', 2, '--output', tmp_path]
    run = base(*flags, '--lr', 1e30)
    assert run.code == 3 and 'Traceback' not in run.err
    assert 'error: the student predicts what is not a number: its weights are broken since epoch 0' in run.err
    assert not any((tmp_path / name).exists() for name in ('best.pth', 'checkpoint.pth', 'log.jsonl'))
    broken = tmp_path / 'broken.pth'
    torch.save({name: x * 1e30 if x.is_floating_point() else x
                for name, x in create_model('resnet8', 3).state_dict().items()}, broken)
    scored = base(images, '--image-size', 32, '-a', 'resnet8', '-e', '--student-resume', broken)
    assert scored.code == 3 and 'the student predicts what is not a number' in scored.err, scored.err


def test_quick_epochs_share_their_files(base, images, tmp_path, monkeypatch):
    """Those of the first and of the last are written; after a crash or a signal in between it ends as if it had not."""
    def crash(*key, seed=engine.seed_everything):
        seed(*key)
        if key[2:4] == (3, 0):
            raise RuntimeError('a crash')
    flags = [images, '--arch', 'resnet8', '--epochs', 5, '--output']
    saved, genuine = [], checkpoint.save
    monkeypatch.setattr(checkpoint, 'save', lambda path, it: (saved.append(it['progress']['epoch']), genuine(path, it)))
    whole = base(*flags, tmp_path / 'whole')
    assert saved == [1, 5]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='a crash'):
        patch.setattr(engine, 'seed_everything', crash)
        base(*flags, tmp_path / 'run')
    assert len((tmp_path / 'run' / 'log.jsonl').read_text().splitlines()) == 3
    with at_call(13):  # of the 20 that are left after the first epoch, in the third of its four
        stopped = base(*flags, tmp_path / 'run')
    assert stopped.code == signals.EXIT_INTERRUPTED and 'epoch 1, sample 0' in stopped.out and saved[-1] == 3
    log, best = stopped.log(), stopped.json()['best']['epoch']
    assert [record['epoch'] for record in log] == [0, 1, 2] and stopped.json()['last']['epoch'] == 2
    for name, epoch in ('last.pth', 2), ('best.pth', best):
        score = base(images, '-e', '--arch', 'resnet8', '--student-resume', tmp_path / 'run' / name).out
        assert f'({log[epoch]["valid"]["correct1"]}/15)' in score
    rest = base(*flags, tmp_path / 'run')
    assert rest.code == 0 and 'resumed from' in rest.out
    for name in ('last.pth', 'best.pth'):
        assert_same(rest.weights(name), whole.weights(name))
    assert [record['valid'] for record in rest.log()] == [record['valid'] for record in whole.log()]


def test_what_ends_in_an_error_leaves_the_files_of_its_epochs(base, images, tmp_path, monkeypatch):
    """But no checkpoint of a later point than the files before: it goes on where it was sure of all."""
    def forward(task, batch, genuine=Supervised.forward):
        logits, losses = genuine(task, batch)
        return logits, {'ce': losses['ce'] * math.nan} if len(ended) == 3 else losses

    def end_epoch(run, scores, genuine=Run.end_epoch):
        genuine(run, scores)
        ended.append(run.progress['epoch'])
    monkeypatch.setattr(Supervised, 'forward', forward)
    monkeypatch.setattr(Run, 'end_epoch', end_epoch)
    flags, ended = [images, '--arch', 'resnet8', '--epochs', 4, '--output', tmp_path], []
    run = base(*flags)
    assert run.code == 3 and 'loss ce is nan in epoch 3' in run.err
    assert run.json()['last']['epoch'] == 2 and not run.json()['finished'] and len(run.log()) == 3
    evaluated = base(images, '-e', '--arch', 'resnet8', '--student-resume', tmp_path / 'last.pth').out
    assert f'({run.log()[2]["valid"]["correct1"]}/15)' in evaluated
    ended.clear()
    rest = base(*flags)
    assert rest.code == 0 and 'resumed from' in rest.out and 'epoch 1, sample 0' in rest.out


def test_a_run_goes_on_with_the_seed_that_it_drew(base, images, tmp_path):
    flags = [images, '-a', 'resnet8', '--image-size', 32, '-b', 8, '-j', 0, '--no-accel', '--epochs', 1, '--output',
             tmp_path]
    with at_call(2):
        assert base(*flags, quick=False).code == signals.EXIT_INTERRUPTED
    drawn = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['seed']
    assert base(*flags, quick=False).json()['seed'] == drawn


def test_each_update_draws_anew(base, plain, tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr(engine, 'seed_everything', lambda *key: keys.append(key) or seed_everything(*key))
    base(*plain, '--epochs', 2, '--output', tmp_path)
    assert keys == [(3, 'update', epoch, sample, 0) for epoch in (0, 1) for sample in (0, 13, 26)]


def test_machines_are_counted(monkeypatch):
    """Of which each has -b images."""
    told = []
    monkeypatch.setattr(distributed, '_run', lambda worker, args, *where, **more: told.append((*where, *more.values())))
    monkeypatch.setattr(distributed.os, 'setpgid', lambda *_: None)
    for name, value in {'RANK': 3, 'WORLD_SIZE': 4, 'LOCAL_RANK': 1, 'LOCAL_WORLD_SIZE': 2}.items():
        monkeypatch.setenv(name, str(value))
    distributed.launch(None, arguments('--dummy', '--no-accel'))
    distributed._spawned(1, None, None, 1, 2, 2, 'env://')
    assert told == [(3, 4, 1, 'env://', 2)] * 2


def test_without_a_number_on_its_node_a_process_is_refused(base, monkeypatch):
    """As of srun, whose processes would count as a node each."""
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    for name, value in {'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0'}.items():
        monkeypatch.setenv(name, value)
    run = base('--dummy', '--no-accel')
    assert run.code == 1 and 'but not LOCAL_RANK and LOCAL_WORLD_SIZE' in run.err and run.err.count('\n') == 1


def test_a_restarted_run_finds_its_own_folder(tmp_path, monkeypatch):
    """Not that of another run of the same day, nor one that has left no word."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['main_base.py'])
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'job')
    runs = [tmp_path / 'runs' / f'base-dummy-resnet18-{number}' for number in range(3)]
    for run, word in zip(runs, (distributed.launched_by(), 'other 7', '')):
        run.mkdir(parents=True)
        (run / '.lock').write_text(word)

    def chosen():
        return folder.default_output(arguments('--dummy')).resolve()
    assert chosen() not in runs
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    assert chosen() == runs[0]
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'another')
    assert chosen() not in runs
    with folder.lock(runs[0]):
        assert (runs[0] / '.lock').read_text() == distributed.launched_by() != ''
        assert chosen() == runs[0]


@pytest.mark.parametrize('what', ['images', 'student'])
def test_ranks_that_evaluate_other_things_are_refused(base, plain, tmp_path, monkeypatch, what):
    genuine = Run.tie

    def tie(self, **facts):
        with monkeypatch.context() as patch:
            if what in facts:
                patch.setattr(distributed, 'gather', lambda fact: [fact, 'others'])
            genuine(self, **facts)
    monkeypatch.setattr(Run, 'tie', tie)
    run = base(*plain, '--evaluate', '--output', tmp_path)
    assert run.code == 1 and f'the ranks differ in their {what}: ' in run.err and ', others' in run.err


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.EIO])
def test_where_files_cannot_be_locked_a_run_goes_on(tmp_path, monkeypatch, number):
    """As on some network file systems; other errors are none of that kind."""
    def lockf(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(folder.fcntl, 'lockf', lockf)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'job')
    if number == errno.EIO:
        with pytest.raises(SystemExit, match='cannot write to --output'):
            folder.lock(tmp_path)
    else:
        folder.lock(tmp_path).close()
        assert (tmp_path / '.lock').read_text() == distributed.launched_by()


def test_what_cannot_be_printed_ends_no_run(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, encoding='ascii', write_through=True))
    monkeypatch.setattr(sys, 'stderr', None)  # closed before the start
    with streams.enduring():
        print('größer')
        print('lost', file=sys.stderr)
        assert not sys.stderr.isatty()
    assert written.getvalue() == b'gr\\xf6\\xdfer\n'
