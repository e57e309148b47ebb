"""main_distill.py from beginning to end."""
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import QUICK, ROOT, assert_same, at_call, forked_command, script, start

from distillers import Distillation
from distillers.networks import doubt_teacher
from models import create_model
from utils import distributed, signals
from utils.data import TrainData

PAIR = ['--teacher-arch', 'resnet14']  # teaches resnet8


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.manual_seed(5)
    torch.save(create_model('resnet14', 3).state_dict(), path)
    return path


def flags(images, teacher, output, *more):
    return [images, *PAIR, '--teacher-resume', teacher, '--epochs', 2, '--output', output, *more]


def test_mgd_with_kd(distill, images, teacher, tmp_path):
    run = distill(*flags(images, teacher, tmp_path, '--mgd-with-kd', 1, '--loss-factor', 1e5))
    assert run.code == 0, run.err
    assert 'teacher: top1' in run.out and 'agreement' in run.out and run.out.count('mgd: stage') == 6
    log, result = run.log(), run.json()
    assert set(log[0]['train']['losses']) == {'ce', 'mgd', 'kd'}
    assert log[0]['train']['loss'] == pytest.approx(sum(log[0]['train']['losses'].values()), rel=1e-4)
    assert len(log[0]['news']['mgd']) == 3 and {'cost', 'shape', 'seconds'} <= log[0]['news']['mgd'][0].keys()
    assert result['teacher'].startswith('resnet14 ') and result['teacher_score']['n'] == 15
    assert result['ce_weight'] == 1 and result['stages'] == {'mgd': [[0, 0], [1, 1], [2, 2]]}
    assert 'labels count 1 times; mgd compares stages 0-0 1-1 2-2 (student-teacher)' in run.out
    assert result['parameters'] == sum(p.numel() for p in create_model('resnet8', 3).parameters())
    assert (result['arguments']['kd_temperature'], result['arguments']['mgd_loss_factor']) == (1.5, 1e5)
    saved = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)
    assert saved['model'].keys() == create_model('resnet8', 3).state_dict().keys()  # nothing of the teacher
    names = list(saved['distillers'])
    assert any('flow' in name for name in names) and any('margins' in name for name in names)
    assert all(name.startswith('mgd.') for name in names)


@pytest.mark.parametrize('more', [['--distiller', 'mgd'], ['--distiller', 'kd', '--ema', 0.9, '--accum-steps', 2],
                                  ['--distiller', 'dml', 'crd', '--optimizer', 'dot', '--lr', 1e-3]],
                         ids=['mgd', 'kd', 'dml'])
def test_resume_is_exact_and_does_not_solve_again(distill, images, teacher, tmp_path, more):
    whole = distill(*flags(images, teacher, tmp_path / 'whole', *more))
    with at_call(2):
        part = distill(*flags(images, teacher, tmp_path / 'parts', *more))
    assert part.code == signals.EXIT_INTERRUPTED
    rest = distill(*flags(images, teacher, tmp_path / 'parts', *more))
    assert rest.code == 0 and 'resumed from' in rest.out and 'teacher: top1' not in rest.out
    assert rest.out.count('mgd: stage') == (3 if 'mgd' in more else 0)  # of the second epoch alone
    for name in ['last.pth'] + ['teacher.pth'] * ('dml' in more):
        assert_same(rest.weights(name), whole.weights(name))
    for a, b in zip(rest.log(), whole.log(), strict=True):
        assert a['valid'] == b['valid'] and a['news'].keys() == b['news'].keys()
        assert a.get('teacher') == b.get('teacher') and ('teacher' in a) == ('dml' in more)
    if 'dml' in more:  # which is evaluated as it was, too, and not as it is made
        alike = [word for word in flags(images, '', tmp_path / 'whole', *more) if word not in ('--teacher-resume', '')]
        scores = distill(*alike, '--evaluate').json('evaluate.json')['scores']
        assert {name: scores[name]['correct1'] for name in ('student', 'teacher')} == {
            'student': whole.log()[-1]['valid']['correct1'], 'teacher': whole.log()[-1]['teacher']['correct1']}
        fresh = distill(*[tmp_path / 'fresh' if word == tmp_path / 'whole' else word for word in alike], '--evaluate')
        assert fresh.json('evaluate.json')['scores'].keys() == {'student'}


def test_the_teacher_is_part_of_the_run(distill, images, teacher, tmp_path):
    run = flags(images, teacher, tmp_path / 'run', '--distiller', 'kd', '--skip-first-evaluation')
    assert distill(*run).code == 0
    torch.manual_seed(6)
    torch.save(create_model('resnet14', 3).state_dict(), teacher.with_name('other.pth'))
    replaced = teacher.read_bytes()
    teacher.write_bytes(teacher.with_name('other.pth').read_bytes())
    again = distill(*run)
    teacher.write_bytes(replaced)
    assert again.code == 1 and 'its teacher: resnet14' in again.err


def test_images_and_teacher_may_move_but_not_change(distill, images, teacher, tmp_path):
    """To the local disk of another machine, say."""
    def run(folder, file):
        return distill(*flags(folder, file, tmp_path / 'run', '--distiller', 'kd', '--skip-first-evaluation'))
    with at_call(2):
        assert run(images, teacher).code == signals.EXIT_INTERRUPTED
    shutil.copytree(images, tmp_path / 'images')
    shutil.copy(teacher, tmp_path / 'teacher.pth')
    (tmp_path / 'images' / 'train' / 'bee' / '3.jpg').rename(tmp_path / '3.jpg')
    other = run(tmp_path / 'images', tmp_path / 'teacher.pth')
    assert other.code == 1 and 'its images: 39 + 15 images' in other.err and 'here: 38 + 15 images' in other.err
    (tmp_path / '3.jpg').rename(tmp_path / 'images' / 'train' / 'bee' / '3.jpg')
    moved = run(tmp_path / 'images', tmp_path / 'teacher.pth')
    assert moved.code == 0 and 'resumed from' in moved.out


@pytest.mark.parametrize('name', ['dkd', 'simkd', 'srd', 'srdwithdist', 'expkd'])
def test_a_classifier_that_does_not_know_the_classes_is_refused(distill, images, tmp_path, name):
    run = distill(images, *PAIR, '--distiller', 'mgd', name, '--output', tmp_path / 'o')
    assert run.code == 1 and f'--distiller {name} goes by its classifier' in run.err and not (tmp_path / 'o').exists()


@pytest.mark.parametrize('student, teacher_arch, method', [
    ('torchvision:squeezenet1_1', 'resnet8', 'srd'), ('resnet8', 'resnet18', 'dml'),
    ('resnet8', 'resnet18', 'ofd --ofd-teacher-bn batch'), ('resnet8', 'resnet18', 'fitnet --fitnet-stage 3')])
def test_one_image_in_the_last_batch_of_whatever_trains(distill, tmp_path, student, teacher_arch, method):
    """Maps of one pixel before a norm of the method's, or of a teacher that goes by the batch."""
    run = distill('--dataset', 'cifar10', '--dummy', '--dummy-images', 17, '-b', 8, '--epochs', 1, '--arch', student,
                  '--teacher-arch', teacher_arch, '--distiller', *method.split(), '--output', tmp_path / 'o')
    assert run.code == 1 and 'error: of the 17 images an epoch has a batch of 1, which' in run.err, run.err
    assert 'Epoch 0' not in run.out and not (tmp_path / 'o').exists()


def test_one_image_for_the_last_of_several_replicas(distill, tmp_path, monkeypatch):
    """Of 9 images DataParallel gives 2 to each of four GPUs, and 1 to the fifth."""
    monkeypatch.setattr(distributed, 'replicas', lambda device, args: 8)
    flags = ['--dataset', 'cifar10', '--dummy', '-b', 16, '--epochs', 1, '--arch', 'torchvision:squeezenet1_1',
             '--image-size', 32, '--teacher-arch', 'resnet8', '--distiller', 'srd', '--dummy-images']
    refused = distill(*flags, 25, '--output', tmp_path / 'a')
    assert refused.code == 1 and 'of the 25 images an epoch has a batch of 9, which' in refused.err, refused.err
    assert distill(*flags, 26, '--output', tmp_path / 'b').code == 0
    whole = distill(*flags, 42, '-b', 25, '--output', tmp_path / 'c')  # six times 4 of a whole one, and 1
    assert whole.code == 1 and 'of the 42 images an epoch has a batch of 25, which' in whole.err, whole.err


def test_a_later_start_is_a_start(distill, images, teacher, tmp_path):
    run = distill(*flags(images, teacher, tmp_path, '--distiller', 'kd', '--start-epoch', 1, '--epochs', 2))
    assert run.code == 0 and run.json('start.json')['scores']['teacher']['n'] == 15 and run.json()['teacher_score']


def test_what_trains_on_a_gpu_is_scored_without_one(distill, images, teacher, tmp_path):
    run = distill(*flags(images, teacher, tmp_path, '--distiller', 'kd', '--teacher-stream', '-e'))
    assert run.code == 0, run.err


def test_a_try_with_one_image_leaves_no_trace(distill, tmp_path, monkeypatch):
    """Neither in the student's norms nor in a memory; without it the run ends with the same bits."""
    flags = ['--dataset', 'cifar10', '--dummy', '--dummy-images', 9, '-b', 8, '--epochs', 1, '--seed', 1, '--arch',
             'resnet8', '--teacher-arch', 'resnet8', '--distiller', 'crd', 'mgd', '--crd-negatives', 4]
    tried = distill(*flags, '--output', tmp_path / 'a')
    monkeypatch.setattr(TrainData, 'refuse_single_values', lambda *_: None)
    plain = distill(*flags, '--output', tmp_path / 'b')
    assert tried.code == plain.code == 0, tried.err + plain.err
    assert_same(tried.weights(), plain.weights())


def test_distillation_moves_the_student_towards_the_teacher(distill, images, teacher, tmp_path):
    """Only the teacher's signal, no labels: the two agree more and more."""
    run = distill(*flags(images, teacher, tmp_path, '--distiller', 'kd', '--ce-weight', 0, '--epochs', 4))
    losses = [record['train']['losses']['kd'] for record in run.log()]
    assert losses[-1] < losses[0] and all(record['train']['losses']['ce'] == 0 for record in run.log())


def test_a_teacher_that_scores_otherwise_than_in_its_own_run_is_doubted(distill, images, teacher, tmp_path):
    told, weights = tmp_path / 'result.json', tmp_path / 'best.pth'
    weights.write_bytes(Path(teacher).read_bytes())
    for right, doubted in ((14, True), (None, False)):
        if right is None:
            right = run.json('start.json')['scores']['teacher']['correct1']  # noqa: F821, of the first run
        told.write_text(json.dumps({'best': {'correct1': right, 'n': 15}}))
        run = distill(*flags(images, weights, tmp_path / f'o{right}', '--distiller', 'kd', '--epochs', 1))
        assert run.code == 0 and (f'and 93.33 in {tmp_path}: other images' in run.out) == doubted


@pytest.mark.parametrize('right, classes, more, doubted', [
    (12, 10, {}, True), (50, 10, {}, False), (100, 1, {}, False), (12, 10, {'dummy': True}, False),
    (0, 1000, {'teacher_resume': None}, True), (12, 10, {'teacher_resume': None}, False)])  # which starts fresh
def test_a_teacher_that_guesses_is_doubted(capsys, right, classes, more, doubted):
    args = Namespace(**{'dummy': False, 'teacher_arch': 'resnet50', 'teacher_resume': '/gone/t.pth', 'amp': 'off',
                        'num_classes': None} | more)
    doubt_teacher({'correct1': right, 'n': 100, 'top1': float(right)}, classes, args)
    assert ('guesses: wrong weights' in capsys.readouterr().out) == doubted


def test_evaluation_scores_both(distill, images, teacher, tmp_path):
    distill(*flags(images, teacher, tmp_path / 'run', '--distiller', 'kd'))
    run = distill(*flags(images, teacher, tmp_path / 'e', '-e', '--student-resume', tmp_path / 'run' / 'last.pth'))
    assert run.code == 0, run.err
    scores = run.json('evaluate.json')['scores']
    assert 'ce_weight' not in run.json('evaluate.json')  # of no matter here
    assert (tmp_path / 'run' / 'start.json').exists() and not (tmp_path / 'run' / 'evaluate.json').exists()
    assert scores['student']['n'] == scores['teacher']['n'] == 15 and 'agreement' in scores


@pytest.mark.parametrize('more, complaint', [
    (['--teacher-arch', 'torchvision:resnt18'], "unknown model 'resnt18', close to it: resnet18"),
    (['--teacher-resume', '/nowhere.pth'], '/nowhere.pth does not exist'),
    (['-a', 'resnet8x4'], 'resnet8x4 under resnet14: mgd: the student has'),
    (['--teacher-arch', 'resnet50'], 'does not fit --teacher-arch resnet50'),
    (['--teacher-arch', 'vit_b_32'], 'vit_b_32 does not take images of 32 pixels (--teacher-size 32)'),
    (['--mgd-loss-factor', -1], '--mgd-loss-factor is -1.0'),
])
def test_what_cannot_work_is_said_in_one_line(distill, images, teacher, tmp_path, more, complaint):
    run = distill(*flags(images, teacher, tmp_path / 'o', *more))
    assert run.code == 1 and complaint in run.err and 'Traceback' not in run.err and not (tmp_path / 'o').exists()


def test_flags_of_another_method_are_no_accident(distill, images, teacher, tmp_path):
    assert 'names a method twice' in distill(*flags(images, teacher, tmp_path, '--distiller', 'kd', 'kd')).err
    run = distill(*flags(images, teacher, tmp_path / 'o', '--distiller', 'mgd', '--kd-weight', 2))
    assert run.code == 2 and '--kd-weight: of a method that --distiller (mgd) does not name' in run.err
    for given, complaint in ((['--kd-temperature', 3], '--kd-temperature: of a method'),
                             (['--distiller', 'dkd'], 'leave --distiller out')):
        run = distill(*flags(images, teacher, tmp_path / 'o', '--mgd-with-kd', 1, *given))
        assert run.code == 2 and complaint in run.err and not (tmp_path / 'o').exists()


def test_what_standardizes_logits_that_nobody_sees_is_refused(distill, images, teacher, tmp_path):
    run = distill(*flags(images, teacher, tmp_path / 'o', '--distiller', 'mgd', 'at', '--logit-standardize'))
    assert run.code == 2 and '--logit-standardize: --distiller mgd at sees no logits' in run.err
    for name in ('ft', 'reviewkd', 'expkd', 'srd', 'srdwithdist', 'simkd'):
        assert distill(*flags(images, teacher, tmp_path / 'o', '--distiller', name, '--logit-standardize')).code == 2


@pytest.mark.parametrize('method, epoch, look', [
    ('ft --ft-paraphraser-epochs 3', 1, 1), ('mgd', 2, 1), ('mgd kd --epochs 4', 3, 2)])  # at last with files to write
def test_a_signal_while_a_method_prepares(distill, images, teacher, tmp_path, monkeypatch, method, epoch, look):
    """The run ends at once, keeps nothing of it, and the same command comes to the same weights."""
    def run(output):
        return distill(*flags(images, teacher, tmp_path / output, '--distiller', *method.split()))

    def looks_once(self, number, batches, genuine=Distillation.start_epoch):
        def noted():
            for batch in batches():
                looked.append(number)
                if looked.count(epoch) == look:
                    signals._note(15)
                yield batch
        return genuine(self, number, noted)
    whole, looked = run('whole'), []
    with monkeypatch.context() as patched:
        patched.setattr(Distillation, 'start_epoch', looks_once)
        part = run('parts')
    assert part.code == signals.EXIT_INTERRUPTED and looked.count(epoch) <= 2  # of five batches
    assert part.json('interrupted')['epoch'] == epoch - 1
    rest = run('parts')
    assert epoch == 1 or f'checkpoint.pth: epoch {epoch - 1}, sample 0' in rest.out
    assert_same(rest.weights(), whole.weights())
    costs = [[[row['cost'] for row in record['news'].get('mgd', ())] for record in of.log()] for of in (rest, whole)]
    assert costs[0] == costs[1]


def test_methods_are_listed(distill):
    run = distill('--list-distillers', quick=False)
    assert run.code == 0 and '--kd-temperature 4.0   T, of both softmaxes' in run.out and 'ECCV 2020' in run.out


def test_two_ranks_are_one_process(images, tmp_path):
    """Flow, losses and weights, of methods on features, logits and relations, and of DOT, with unequal shares."""
    program = ROOT / 'tests' / 'programs' / 'ranks.py'
    args = [images, '--teacher-arch', 'resnet18', '--distiller', 'mgd', 'kd', 'sp', 'dist', 'reviewkd', '--optimizer',
            'dot', '--epochs', 2, '--pair-images', 11, '--lr', 1e-4,
            '--num-classes', 5]
    one = script(*args, '--output', tmp_path / 'one', program=program)
    process = start(*forked_command(2), program, *QUICK, *map(str, [*args, '--output', tmp_path / 'two']))
    out, _ = process.communicate(timeout=150)
    assert one.code == process.returncode == 0, one.out + out

    saved = [torch.load(tmp_path / name / 'checkpoint.pth', weights_only=True) for name in ('one', 'two')]
    for part in ('model', 'distillers'):
        for key, value in saved[0][part].items():
            torch.testing.assert_close(saved[1][part][key], value, rtol=1e-3, atol=1e-4, msg=key)
    logs = [[json.loads(line) for line in (tmp_path / name / 'log.jsonl').read_text().splitlines()]
            for name in ('one', 'two')]
    for a, b in zip(*logs, strict=True):
        assert b['train']['losses'] == pytest.approx(a['train']['losses'], rel=1e-4)
        assert b['valid']['correct1'] == a['valid']['correct1']
        cost = [row['cost'] for row in a['news']['mgd']]  # of weights that have learned: their rounding differs
        assert [row['cost'] for row in b['news']['mgd']] == pytest.approx(cost, rel=1e-5)


def test_every_switch_changes_the_result(distill, images, teacher, tmp_path):
    torch.save(create_model('resnet8', 3).state_dict(), tmp_path / 's.pth')
    found = {}
    for number, switch in enumerate([
            '', '--logit-standardize', '--label-smoothing 0.2', '--ema 0.5', '--mixup 0.5', '--cutmix 1',
            '--ce-weight 0.5', '--optimizer dot', '--teacher-mean 0.5 0.5 0.5',
            f'--student-resume {tmp_path / "s.pth"}']):
        run = distill(*flags(images, teacher, tmp_path / str(number), '--distiller', 'kd', '--epochs', 1,
                             '--skip-first-evaluation'), *switch.split())
        assert run.code == 0, run.err
        found[switch] = sum(v.double().abs().sum().item() for v in run.weights().values())
    assert len({*found.values()}) == len(found), found


def test_a_teacher_of_classes_in_another_order_is_refused(distill, images, teacher, tmp_path):
    torch.save({'format': 1, 'model': torch.load(teacher, weights_only=True), 'classes': ['bee', 'ant', 'cat']},
               tmp_path / 't.pth')
    run = distill(*flags(images, tmp_path / 't.pth', tmp_path / 'run', '--distiller', 'kd'))
    assert run.code == 1 and 'output 0 is bee there and ant here' in run.err
