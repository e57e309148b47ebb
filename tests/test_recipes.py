"""The recipes of scripts/: what they ask the scripts for, and that they run."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, environment

import main_base
import main_distill
from utils import distributed
from utils.optim import learning_rate, total_epochs

STUDENTS = ['mobilenet_v2_mgd', 'shufflenet_v2']

# As published, of one pair or of all: epochs/batch/rate, the first epochs at lower rates, distiller and its arguments
IMAGENET = """
    base      *                      100/256/0.1  30/60/90  -
    kd        *                      100/512/0.2  30/60/90  kd        weight=0.5 temperature=1
    kd_dot    *                      100/512/0.2  30/60/90  kd        weight=0.5 temperature=1 dot_delta=0.09
    kd_dist   *                      100/256/0.1  30/60/90  kd        weight=1 temperature=4
    kd_lskd   resnet34-resnet18      100/512/0.2  30/60/90  kd        weight=9 temperature=2
    at        *                      100/512/0.2  30/60/90  at        weight=1000 p=2
    crd       *                      100/256/0.1  30/60/90  crd       weight=0.8 negatives=16384 tau=0.07 momentum=0.5
    ofd       *                      100/256/0.1  29/59/89  ofd       weight=0.0001
    srd       *                      100/512/0.2  30/60/90  srd       feature_weight=1 logit_weight=1
    simkd     *                      120/256/0.1  30/60/90  simkd     weight=1 factor=2 student_map=stage
    dist      *                      100/256/0.1  30/60/90  dist      temperature=1 beta=2 gamma=2 local=1
    dkd       resnet34-resnet18      100/512/0.2  30/60/90  dkd       alpha=0.5 beta=0.5 temperature=1 warmup=1
    dkd       resnet50-mobilenet_v1  100/512/0.2  30/60/90  dkd       alpha=0.5 beta=2 temperature=1 warmup=1
    reviewkd  resnet34-resnet18      100/256/0.1  30/60/90  reviewkd  weight=1 warmup=1 max_mid=512 student_preact=1
    reviewkd  resnet50-mobilenet_v1  100/256/0.1  30/60/90  reviewkd  weight=8 warmup=1 max_mid=256 student_preact=1
    mrkd      resnet34-resnet18      100/512/0.2  30/60/90  mrkd      pearson=2 kendall=2 top=1 local=1
    mrkd      resnet50-mobilenet_v1  100/512/0.2  30/60/90  mrkd      pearson=32 kendall=32 top=1 local=1
    mrkd      resnet50-resnet34      100/512/0.2  30/60/90  mrkd      pearson=32 kendall=32 top=1 local=1
    expkd     resnet34-resnet18      100/512/0.2  15/30/45  expkd     weight=2 topk=0
    expkd     resnet50-mobilenet_v1  150/256/0.2  30/60/90  expkd     topk=50
"""
NESTEROV, NO_BIAS_DECAY = ('kd_dist', 'dist', 'ofd'), ('kd_dist', 'dist')
IMAGENET_TABLES = [table for table in json.loads((ROOT / 'scripts' / 'published.json').read_text())['tables']
                   if table['runs'] == 'imagenet']
IMAGENET_PAIRS = [pair for table in IMAGENET_TABLES for pair in table['pairs']]


def recipe(path, name, *words, **extra):
    """The script with folder `path` searched for programs before all others."""
    extra = {'GPUS': 1, 'PATH': f'{path}{os.pathsep}{os.environ["PATH"]}', **extra}
    return subprocess.run(['bash', str(ROOT / 'scripts' / name), *map(str, words)], capture_output=True, text=True,
                          env=environment(**extra))


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The program that a recipe starts, its options, and the arguments as the named script understands them."""
    for program in ('python', 'torchrun'):
        (tmp_path / program).write_text('#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@" > "$RECORD"\n')
        (tmp_path / program).chmod(0o755)

    def ask(*words, **extra):
        run = recipe(tmp_path, *words, RECORD=tmp_path / 'record', **extra)
        assert run.returncode == 0, run.stderr
        words = (tmp_path / 'record').read_text().splitlines()
        at, module = next((i, m) for i, word in enumerate(words) for m in (main_base, main_distill)
                          if word.endswith(f'/{m.__name__}.py'))
        caught = []
        monkeypatch.setattr(sys, 'argv', words[at:])
        monkeypatch.setattr(distributed, 'launch', lambda worker, args: caught.append(args))
        module.main()
        return words[:at], module.__name__, caught[0]
    return ask


def rates(args):
    return [learning_rate(epoch, args) for epoch in range(total_epochs(args))]


def dropping(rate, *lengths):
    """A rate for so many epochs, then a tenth of it, and so on."""
    return [rate / 10**i for i, length in enumerate(lengths) for _ in range(length)]


def assert_sgd(args, batch, nesterov, optimizer='sgd', no_bias_decay=False):
    assert (args.optimizer, args.momentum, args.weight_decay, args.batch_size) == (optimizer, 0.9, 1e-4, batch)
    assert args.nesterov == nesterov and args.accum_steps == 1 and args.no_bias_decay == no_bias_decay
    assert not (args.mixup or args.cutmix or args.label_smoothing or args.random_erasing or args.ema)
    assert args.auto_augment == 'off' and args.image_size == 224


def assert_methods(args, method):
    assert args.distiller == {'mgd': ['mgd'], 'mgd_kd': ['mgd', 'kd']}[method]
    assert args.ce_weight is None and args.mgd_reducer == 'amp' and not args.mgd_stage_factors
    assert args.teacher_arch == 'resnet50' and args.mgd_loss_factor == 1e4
    if method == 'mgd_kd':
        assert (args.kd_temperature, args.kd_weight) == (1.5, 1)


def test_imagenet_student_alone(asked):
    launch, script, args = asked('imagenet.sh', 'base', '/image net')
    assert launch == ['python'] and script == 'main_base' and args.data == '/image net'
    assert args.arch == 'mobilenet_v1' and not args.pretrained
    assert_sgd(args, batch=256, nesterov=False)
    assert rates(args) == pytest.approx([0.1 * 0.1 ** (epoch // 30) for epoch in range(100)])


def test_several_nodes_share_the_batch(asked, tmp_path):
    """Each has --batch-size images, and something else starts the script there."""
    launch, _, args = asked('imagenet.sh', 'kd', '/imagenet', NODES=2, LAUNCH=f'{tmp_path}/torchrun --nnodes 2')
    assert launch == ['torchrun', '--nnodes', '2'] and args.batch_size == 256 and args.lr == 0.2


@pytest.mark.parametrize('method', ['mgd', 'mgd_kd'])
def test_imagenet_distilled(asked, method):
    _, script, args = asked('imagenet.sh', method, '/imagenet')
    assert script == 'main_distill' and args.data == '/imagenet'
    assert args.arch == 'mobilenet_v1' and not args.pretrained and not args.teacher_resume
    assert_sgd(args, batch=256, nesterov=True)
    assert_methods(args, method)
    assert args.mgd_update_freq == 1 and args.pair_images > 20000
    warming = [0.01, 0.019, 0.028, 0.037, 0.046, 0.055, 0.064, 0.073, 0.082, 0.091]
    assert rates(args) == pytest.approx(warming + dropping(0.1, 31, 30, 20, 39))


@pytest.mark.parametrize('line', IMAGENET.strip().splitlines(), ids=lambda line: '-'.join(line.split()[:2]))
def test_imagenet_tables(asked, line):
    method, pairs, recipe, drops, distiller, *values = line.split()
    epochs, batch, rate = map(float, recipe.split('/'))
    drops = [0, *map(int, drops.split('/')), int(epochs)]
    for pair in IMAGENET_PAIRS if pairs == '*' else [pairs]:
        _, script, args = asked('imagenet.sh', pair, method, '/imagenet', SEED=3, RUNS='/runs')
        teacher, student = pair.split('-')
        assert (args.data, args.arch, args.seed) == ('/imagenet', student, 3)
        name = f'base-{student}' if method == 'base' else f'{method}-{pair}'
        assert args.output == f'/runs/imagenet/{name}-3' and not args.pretrained and not args.teacher_resume
        assert_sgd(args, batch, nesterov=method in NESTEROV, optimizer='dot' if method == 'kd_dot' else 'sgd',
                   no_bias_decay=method in NO_BIAS_DECAY)
        ratio = 5 if (method, pair) == ('expkd', 'resnet34-resnet18') else 10
        assert rates(args) == pytest.approx(
            [rate / ratio**i for i in range(4) for _ in range(drops[i], drops[i + 1])])
        if method == 'base':
            assert script == 'main_base'
            continue
        assert (script, args.distiller, args.teacher_arch) == ('main_distill', [distiller], teacher)
        assert args.logit_standardize == (method == 'kd_lskd')
        assert method != 'ofd' or args.ofd_teacher_bn == 'batch'
        assert args.ce_weight == {'kd': 0.5, 'kd_dot': 0.5, 'kd_dist': 0.9, 'kd_lskd': 1}.get(method)
        for name, value in (value.split('=') for value in values):
            asked_for = getattr(args, name if name == 'dot_delta' else f'{distiller}_{name}')
            assert asked_for == (value if isinstance(asked_for, str) else float(value))


def test_every_published_row_of_imagenet_has_a_recipe():
    assert {method for table in IMAGENET_TABLES for method, *_ in table['rows']} == {
        'mgd', 'mgd_kd', *(line.split()[0] for line in IMAGENET.strip().splitlines())}


@pytest.mark.parametrize('method', ['kd_lskd', 'dkd', 'reviewkd', 'mrkd', 'expkd', 'mgd_kd'])
def test_imagenet_pairs_without_published_values(tmp_path, method):
    (tmp_path / 'python').write_text('#!/bin/sh\n')
    (tmp_path / 'python').chmod(0o755)
    run = recipe(tmp_path, 'imagenet.sh', 'resnet101-resnet18', method, '/imagenet')
    assert run.returncode == 0 and ('is published, this is the default' in run.stderr) == (method != 'mgd_kd')


@pytest.mark.parametrize('network', ['resnet50', *STUDENTS])
def test_cub_alone(asked, network):
    _, script, args = asked('cub200.sh', network, 'base', '/cub')
    assert script == 'main_base' and (args.data, args.arch, args.num_classes) == ('/cub', network, 1000)
    assert args.pretrained
    assert_sgd(args, batch=64, nesterov=True)
    assert rates(args) == pytest.approx(dropping(0.01, 31, 30, 20, 39))


@pytest.mark.parametrize('method', ['mgd', 'mgd_kd'])
@pytest.mark.parametrize('student', STUDENTS)
def test_cub_distilled(asked, student, method):
    _, script, args = asked('cub200.sh', student, method, '/cub', 'the teacher.pth')
    assert script == 'main_distill' and (args.data, args.arch, args.num_classes) == ('/cub', student, 1000)
    assert args.pretrained and args.teacher_resume == 'the teacher.pth'
    assert_sgd(args, batch=64, nesterov=True)
    assert_methods(args, method)
    assert (args.mgd_update_freq, args.mgd_remainder, args.pair_images) == (2, 'cut', 5994)
    assert rates(args) == pytest.approx(dropping(0.01, 31, 30, 20, 39))


@pytest.mark.parametrize('words', [('imagenet.sh', 'mgd_kd'), ('cub200.sh', 'shufflenet_v2', 'mgd_kd'),
                                   ('imagenet.sh', 'base'), ('cub200.sh', 'mobilenet_v2_mgd', 'base')], ids=' '.join)
def test_flags_win_and_a_check_downloads_nothing(asked, words):
    launch, script, args = asked(*words, '--dummy', '--epochs', 1, '--lr', 0.3, '-b', 4, '--nesterov', 0, GPUS=2)
    assert launch[0] == 'torchrun' and launch[launch.index('--nproc-per-node') + 1] == '2'
    assert args.dummy and not args.pretrained and not args.teacher_resume
    assert (args.epochs, args.lr, args.batch_size, args.nesterov) == (1, 0.3, 4, False)
    if script == 'main_distill':
        *_, args = asked(*words, '--dummy', '--kd-temperature', 4, '--mgd-loss-factor', 1e5)
        assert (args.kd_temperature, args.kd_weight, args.mgd_loss_factor) == (4, 1, 1e5)


@pytest.mark.parametrize('words', [
    ('imagenet.sh',), ('imagenet.sh', 'mgd'), ('imagenet.sh', 'kdd', '/data'),
    ('imagenet.sh', 'resnet34-resnet18', 'mgd'),
    ('cub200.sh', 'shufflenet_v2', 'mgd'), ('cub200.sh', 'shufflenet_v2', 'kdd', '/data', 'teacher.pth'),
    ('cub200.sh', 'mobilenet_v2', 'mgd', '/data', 'teacher.pth'), ('cub200.sh', 'resnet50', 'mgd', '/data', 't.pth'),
    ('cub200.sh', 'shufflenet_v2', 'mgd', '/data'), ('cub200.sh', 'shufflenet_v2', 'mgd', '/data', '--epochs', '1'),
], ids=' '.join)
def test_wrong_words_show_the_right_ones(tmp_path, words):
    run = recipe(tmp_path, *words)
    assert run.returncode == 2 and run.stderr.startswith(f'usage: {words[0]}') and not run.stdout


@pytest.mark.parametrize('words, losses', [
    (('imagenet.sh', 'mgd'), ['ce', 'mgd']),
    (('imagenet.sh', 'resnet34-resnet18', 'ofd'), ['ce', 'ofd']),
    (('cub200.sh', 'mobilenet_v2_mgd', 'mgd_kd'), ['ce', 'kd', 'mgd']),
    (('cub200.sh', 'shufflenet_v2', 'base'), ['ce']),
], ids=['imagenet', 'another pair', 'cub200', 'alone'])
def test_a_check_runs(tmp_path, words, losses):
    """With the real programs and hardly any work."""
    (tmp_path / 'python').write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / 'python').chmod(0o755)
    run = recipe(tmp_path, *words, '--dummy', '--epochs', 1, '--warmup', 0, '--image-size', 64, '-b', 4, '-j', 0,
                 '--dummy-images', 8, '--no-accel', '--output', tmp_path / 'run')
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / 'run' / 'result.json').read_text())['finished']
    log = json.loads((tmp_path / 'run' / 'log.jsonl').read_text())
    assert sorted(log['train'].get('losses', ['ce'])) == losses
