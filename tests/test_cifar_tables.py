"""CIFAR-100's tables: what their scripts ask for, for every method and pair, and what is made of the results."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_recipes import dropping, rates, recipe

import main_base
import main_distill
from models import NETWORKS
from utils import distributed

# As published, or -. LSKD: temperature/weight on KD, temperature/weight/beta on DKD; Exp-KD: rate/weight
PAIRS = """
    pair                               rate  DKD  LSKD             ReviewKD  MRKD  Exp-KD
    resnet56-resnet20                  0.05  2    2/9    3/18/2    0.6       0.01  0.05/0.5
    resnet110-resnet32                 0.05  2    2/9    2/15/2    1         0.01  0.01/1
    resnet32x4-resnet8x4               0.05  8    2/9    2/9/8     5         0.05  0.01/200
    wrn_40_2-wrn_16_2                  0.05  6    2/9    2/12/2    5         0.05  0.01/50
    wrn_40_2-wrn_40_1                  0.05  6    2/9    2/12/2    5         0.05  0.1/10
    cifar_vgg13-cifar_vgg8             0.05  6    3/9    2/15/2    5         0.01  0.05/200
    resnet32x4-shufflenet_v1           0.01  8    -      -         5         0.01  0.01/1000
    wrn_40_2-shufflenet_v1             0.01  8    -      -         5         0.01  0.01/100
    cifar_vgg13-cifar_mobilenet_v2     0.01  6    3/9    3/9/2     -         0.01  0.01/3000
    cifar_resnet50-cifar_mobilenet_v2  0.01  8    3/1    2/15/2    30        0.01  0.01/50000
    resnet32x4-cifar_shufflenet_v2     0.01  8    2/9    2/9/8     8         0.01  0.01/100
    resnet110-resnet20                 0.05  -    4/12   2/15/2    -         -     0.01/0.5
    resnet32x4-wrn_16_2                0.05  -    3/9    2/9/2     -         -     -
    resnet32x4-wrn_40_2                0.05  -    3/9    2/9/8     -         -     -
    wrn_40_2-resnet8x4                 0.05  -    2/9    2/18/2    -         -     -
    wrn_40_2-cifar_mobilenet_v2        0.01  -    3/9    2/15/2    -         -     -
    cifar_resnet50-wrn_16_2            0.05  6    -      -         -         -     -
    resnet32x4-cifar_mobilenet_v2      0.01  -    -      -         -         -     0.01/5
    resnet32x4-resnet20                0.05  -    -      -         -         -     0.1/10
    cifar_resnet34-cifar_resnet18      0.05  -    -      -         -         -     0.05/2000
    shufflenet_v1-resnet20             0.05  -    -      -         -         -     0.05/1
    resnet32x4-cifar_shufflenet_v2_x1_5 0.01 -    -      -         -         -     0.01/100
    resnet56-cifar_shufflenet_v2       0.01  -    -      -         -         -     0.01/1
    wrn_40_2-cifar_shufflenet_v2       0.01  -    -      -         -         0.01  -
"""
ROWS = {pair: row for pair, *row in map(str.split, PAIRS.strip().splitlines()[1:])}
SRD = {'wrn_40_4-wrn_16_4': 10, 'wrn_40_2-wrn_40_1': 10, 'wrn_40_4-wrn_16_2': 4,  # B
       'wrn_40_4-cifar_mobilenet_v2_x1_0': 10, 'cifar_resnet18-cifar_mobilenet_v2_x1_0': 10}
BY_DEFAULT = ['kd', 'fitnet', 'at', 'sp', 'cc', 'vid', 'rkd', 'pkt', 'nst', 'crd', 'dist', 'edkd']
PUBLISHED = json.loads((ROOT / 'scripts' / 'published.json').read_text())


@pytest.fixture
def recorded(tmp_path):
    """The command lines of all that a script starts, each without its program; and what the script says."""
    (tmp_path / 'python').write_text('#!/bin/sh\nprintf "%s\\n" "$@" END >> "$RECORD"\n')
    (tmp_path / 'python').chmod(0o755)

    def record(*words, **extra):
        file = tmp_path / 'record'
        file.write_text('')
        run = recipe(tmp_path, *words, **{'RECORD': file, 'DATA': '/the data', 'RUNS': '/runs', **extra})
        assert run.returncode == 0, run.stderr
        return [call.split('\n') for call in file.read_text().removesuffix('\nEND\n').split('\nEND\n')], run.stderr
    return record


def start(call, monkeypatch):
    """In this process, the script that a command line names."""
    module = {'main_base.py': main_base, 'main_distill.py': main_distill}[Path(call[0]).name]
    monkeypatch.setattr(sys, 'argv', call)
    module.main()
    return module.__name__


@pytest.fixture
def asked(recorded, monkeypatch):
    """All that a script starts: the name of the program and the arguments as it understands them; and what it says."""
    def ask(*words, **extra):
        calls, said = recorded(*words, **extra)
        caught = []
        monkeypatch.setattr(distributed, 'launch', lambda worker, args: caught.append(args))
        return list(zip([start(call, monkeypatch) for call in calls], caught)), said
    return ask


def assert_recipe(args, network, rate, batch=64, drops=(150, 30, 30, 30)):
    assert (args.data, args.dataset, args.image_size, args.arch) == ('/the data', 'cifar100', 32, network)
    assert (args.batch_size, args.momentum, args.weight_decay, args.nesterov) == (batch, 0.9, 5e-4, False)
    assert not (args.pretrained or args.no_bias_decay or args.mixup or args.cutmix or args.label_smoothing or args.ema
                or args.random_erasing or args.warmup) and args.auto_augment == 'off' and args.accum_steps == 1
    assert rates(args) == pytest.approx(dropping(rate, *drops))


def assert_method(args, *distillers, ce_weight=None, standardize=False, optimizer='sgd', **values):
    assert (args.distiller, args.ce_weight) == ([*distillers], ce_weight)
    assert (args.logit_standardize, args.optimizer) == (standardize, optimizer)
    assert {name: getattr(args, name) for name in values} == values


def assert_taught(args, method, pair, table='cifar100'):
    teacher = pair.split('-')[0]
    assert args.teacher_arch == teacher and args.output == f'/runs/{table}/{method}-{pair}-3' and args.seed == 3
    assert args.teacher_resume == f'/runs/{table}/base-{teacher}-0/last.pth'


def numbers(text, default):
    return tuple(map(float, (default if text == '-' else text).split('/')))


@pytest.mark.parametrize('method', ['dkd', 'kd_lskd', 'dkd_lskd', 'reviewkd', 'mrkd', 'expkd'])
def test_each_pair_has_its_own_values(asked, method):
    calls, said = asked('cifar100_same.sh', method, ' '.join(ROWS), 3)
    notes = []
    for (pair, row), (script, args) in zip(ROWS.items(), calls, strict=True):
        assert script == 'main_distill'
        assert_taught(args, method, pair)
        rate, dkd, on_kd, on_dkd, review, mrkd, exp = row
        rate, batch = float(rate), 64
        if method == 'dkd':
            notes += [pair] * (dkd == '-')
            assert_method(args, 'dkd', dkd_alpha=1, dkd_beta=numbers(dkd, '8')[0], dkd_temperature=4, dkd_warmup=20)
        elif method == 'kd_lskd':
            notes += [pair] * (on_kd == '-')
            T, weight = numbers(on_kd, '2/9')
            assert_method(args, 'kd', ce_weight=1, standardize=True, kd_temperature=T, kd_weight=weight)
        elif method == 'dkd_lskd':
            notes += [pair] * (on_dkd == '-')
            T, weight, beta = numbers(on_dkd, '2/9/8')
            assert_method(args, 'dkd', standardize=True, dkd_temperature=T, dkd_alpha=weight, dkd_beta=weight * beta)
        elif method == 'reviewkd':
            notes += [pair] * (review == '-')
            assert_method(args, 'reviewkd', reviewkd_weight=numbers(review, '5')[0], reviewkd_warmup=20)
        elif method == 'mrkd':
            notes += [pair] * (mrkd == '-')
            rate, = numbers(mrkd, f'{rate}')
            assert_method(args, 'mrkd', mrkd_pearson=16, mrkd_kendall=32)
        else:
            notes += [pair] * (exp == '-')
            rate, weight = numbers(exp, f'{rate}/1')
            batch = 256 if pair == 'wrn_40_2-wrn_40_1' else 64
            assert_method(args, 'expkd', expkd_weight=weight)
        assert_recipe(args, pair.split('-')[1], rate, batch)
    assert [line.split()[2].strip(',:') for line in said.splitlines()] == notes


@pytest.mark.parametrize('method', [*BY_DEFAULT, 'kd_dot', 'ft', 'ofd', 'simkd'])
def test_methods_of_one_recipe_for_all_pairs(asked, method):
    calls, said = asked('cifar100_cross.sh', method, ' '.join(ROWS), 3)
    assert not said
    for (pair, row), (_, args) in zip(ROWS.items(), calls, strict=True):
        assert_taught(args, method, pair)
        assert_recipe(args, pair.split('-')[1], float(row[0]))
        assert_method(args, 'kd' if method == 'kd_dot' else method, optimizer='dot' if method == 'kd_dot' else 'sgd')
        if method == 'ft':
            assert args.pair_images == 50000
            assert args.ft_paraphraser_lr == (0.05 if pair.endswith('cifar_vgg8') else 0.01)
        if method == 'ofd':
            assert args.ofd_weight == (1e-4 if pair == 'resnet56-resnet20' else 1e-3)
        if method == 'simkd':
            assert args.simkd_student_map == 'stage'


@pytest.mark.parametrize('script, pairs', [
    ('cifar100_same.sh', list(ROWS)[:6]), ('cifar100_cross.sh', list(ROWS)[6:11]), ('srd_dist.sh', list(SRD))])
def test_all_pairs_and_five_seeds_where_none_are_named(asked, script, pairs):
    calls, _ = asked(script, 'kd', '--kd-temperature', 3)
    assert [Path(args.output).name for _, args in calls] == [f'kd-{pair}-{seed}' for pair in pairs for seed in range(5)]
    assert all(args.kd_temperature == 3 for _, args in calls)


@pytest.mark.parametrize('method', ['ab', 'fsp'])
def test_methods_of_two_stages(asked, method):
    calls, _ = asked('cifar100_same.sh', method, 'resnet56-resnet20', '0 3')
    shorter, _ = asked('cifar100_same.sh', method, 'resnet56-resnet20', '0', '--epochs', 120)
    assert [args.epochs for _, args in shorter] == [30, 120]
    (one, first), (two, second) = calls[2:]
    folder = f'/runs/cifar100/{method}-resnet56-resnet20-3'
    assert (one, first.output, first.epochs, first.lr) == ('main_distill', f'{folder}/first', 30, 0.05)
    assert_method(first, method, ce_weight=0)
    assert (two, second.output, second.student_resume) == ('main_base', folder, f'{folder}/first/last.pth')
    assert_recipe(second, 'resnet20', 0.05)
    assert first.seed == second.seed == 3


@pytest.mark.parametrize('method, distillers, values', [
    ('kd', ['kd'], {'kd_temperature': 4, 'kd_weight': 0.9}),
    ('fitnet_kd', ['kd', 'fitnet'], {'ce_weight': 0.1, 'kd_temperature': 4, 'kd_weight': 0.9, 'fitnet_weight': 2,
                                     'fitnet_stage': 3, 'fitnet_stage_t': 3}),
    ('at_kd', ['kd', 'at'], {'ce_weight': 0.1, 'kd_temperature': 4, 'kd_weight': 0.9, 'at_weight': 1000}),
    ('dml', ['dml'], {'dml_weight_s': 1, 'dml_weight_t': 1, 'teacher_resume': None}),
    ('dist', ['dist'], {'dist_beta': 2, 'dist_gamma': 2, 'dist_temperature': 4}),
    ('srd_full', ['srd'], {'srd_feat': 'full', 'srd_logit': 'mse', 'srd_feature_weight': 1, 'srd_logit_weight': 2}),
    ('srdwithdist', ['srdwithdist'], {'srdwithdist_alpha': 1}),
], ids=lambda x: x if isinstance(x, str) else '')
def test_pairs_of_srdwithdist(asked, method, distillers, values):
    calls, said = asked('srd_dist.sh', method, ' '.join(SRD), 3)
    for (pair, b), (_, args) in zip(SRD.items(), calls, strict=True):
        assert_method(args, *distillers, **values)
        assert_recipe(args, pair.split('-')[1], 0.01 if 'mobilenet' in pair else 0.05)
        assert args.crop_padding == 'reflect'
        if method != 'dml':
            assert_taught(args, method, pair, 'srd_dist')
        if method == 'srdwithdist':
            assert (args.srdwithdist_inter, args.srdwithdist_intra) == (b, b)
    assert len(said.splitlines()) == 2 * (method == 'srdwithdist')


def test_networks_alone(asked):
    calls, _ = asked('cifar100_teachers.sh')
    for network, (script, args) in zip(['resnet56', 'resnet110', 'resnet32x4', 'wrn_40_2', 'cifar_vgg13',
                                        'cifar_resnet50'], calls, strict=True):
        assert (script, args.output, args.seed) == ('main_base', f'/runs/cifar100/base-{network}-0', 0)
        assert_recipe(args, network, 0.05)
    calls, _ = asked('srd_dist.sh', 'teachers', 'wrn_40_4-wrn_16_4 cifar_resnet18', 0)
    assert [args.output for _, args in calls] == [f'/runs/srd_dist/base-{x}-0' for x in ('wrn_40_4', 'cifar_resnet18')]
    assert_recipe(calls[0][1], 'wrn_40_4', 0.05)
    assert_recipe(calls[1][1], 'cifar_resnet18', 0.1, batch=128, drops=(150, 100, 70, 30))
    calls, said = asked('srd_dist.sh', 'srdwithdist', 'resnet110-resnet14', 0)  # the study of capacities
    assert_recipe(calls[0][1], 'resnet14', 0.1, batch=128, drops=(150, 100, 70, 30))
    assert calls[0][1].srdwithdist_inter == 10 and not said
    calls, _ = asked('cifar100_cross.sh', 'base', 'resnet32x4-shufflenet_v1 resnet8', '1 2')
    assert [args.output for _, args in calls] == [f'/runs/cifar100/base-{x}' for x in (
        'shufflenet_v1-1', 'shufflenet_v1-2', 'resnet8-1', 'resnet8-2')]
    assert_recipe(calls[0][1], 'shufflenet_v1', 0.01)


def test_every_published_row_can_be_run(asked):
    methods = set()
    for table in PUBLISHED['tables']:
        for pair in table['pairs']:
            assert {*pair.split('-')} <= NETWORKS.keys()
        for method, _, source, values in table['rows']:
            assert len(values) == len(table['pairs']) and (source in PUBLISHED['sources'] or not any(values))
            if table['runs'] != 'imagenet':
                methods.add(method)
    for method in methods:
        calls, _ = asked('cifar100_same.sh', method, 'wrn_40_2-wrn_40_1', 0)
        assert len(calls) == 1 + (method in ('ab', 'fsp'))


def test_flags_win_and_a_check_needs_no_teacher(asked):
    (_, args), = asked('cifar100_same.sh', 'kd', 'resnet56-resnet20', 0, '--epochs', 1, '--kd-weight', 2, '-b', 8,
                       DATA='--dummy')[0]
    assert args.dummy and args.teacher_resume is None
    assert (args.epochs, args.kd_weight, args.batch_size) == (1, 2, 8)
    (_, args), = asked('srd_dist.sh', 'base', 'resnet8', 0, '--crop-padding', 'zeros')[0]
    assert args.crop_padding == 'zeros'


def test_seeds_with_a_comma_are_trained_side_by_side(asked):
    calls, _ = asked('cifar100_same.sh', 'kd', 'resnet56-resnet20', '0,1 2')
    assert [(args.seeds, args.seed, args.output) for _, args in calls] == [
        ([0, 1], None, '/runs/cifar100/kd-resnet56-resnet20'), (None, 2, '/runs/cifar100/kd-resnet56-resnet20-2')]
    calls, _ = asked('cifar100_teachers.sh', 'resnet56', '3,0', '--cuda-graph')
    assert [(args.seeds, args.output) for _, args in calls] == [([3, 0], '/runs/cifar100/base-resnet56')]


@pytest.mark.parametrize('words, extra, says', [
    (['cifar100_same.sh', 'ab', 'resnet56-resnet20', '0,1'], {}, 'ab: one seed at a time'),
    (['cifar100_same.sh', 'fsp', 'resnet56-resnet20', '0', '--lr', '1', '--fsp-weight', '2'], {},
     'fsp: FLAGS go to main_base.py, too, which has no --fsp-'),
    (['cifar100_same.sh', 'ab', 'resnet56-resnet20', '0', '--student-resume', 's.pth'], {},
     'ab: --student-resume would pass over its first stage'),
    (['cifar100_same.sh'], {}, 'usage: DATA'), (['srd_dist.sh', '--lr', '1'], {}, 'usage: DATA'),
    (['cifar100_same.sh', 'kd', 'resnet56'], {}, 'usage: DATA'),
    (['cifar100_teachers.sh'], {'DATA': ''}, 'cifar100_teachers.sh: DATA is not set')], ids=str)
def test_wrong_words(tmp_path, words, extra, says):
    run = recipe(tmp_path, *words, **({'DATA': '/data'} | extra))
    assert run.returncode == 2 and run.stderr.startswith(says)


@pytest.mark.parametrize('status, runs', [(1, 2), (3, 2), (75, 1)])
def test_a_pair_that_cannot_work_is_passed_over_and_an_interruption_stops(tmp_path, status, runs):
    (tmp_path / 'python').write_text(f'#!/bin/sh\necho run\ncase $* in *resnet56*) exit {status};; esac\n')
    (tmp_path / 'python').chmod(0o755)
    run = recipe(tmp_path, 'cifar100_same.sh', 'fsp', 'resnet56-resnet20 resnet110-resnet20', 0, DATA='/data')
    assert run.returncode == status and run.stdout.count('run') == runs + (runs > 1)  # the second has both stages


def test_nobody_learns_from_a_teacher_that_still_learns(tmp_path):
    teacher = tmp_path / 'cifar100' / 'base-resnet56-0' / 'result.json'
    teacher.parent.mkdir(parents=True)
    (tmp_path / 'python').write_text('#!/bin/sh\necho run\n')
    (tmp_path / 'python').chmod(0o755)
    for finished, content in (False, ''), (False, json.dumps({'finished': False}, indent=1)), (
            True, json.dumps({'finished': True}, indent=1)):
        teacher.with_name('args.json').touch()
        teacher.write_text(content)
        run = recipe(tmp_path, 'cifar100_same.sh', 'kd', 'resnet56-resnet20 resnet110-resnet20', 0, DATA='/data',
                     RUNS=tmp_path)
        assert run.stdout.count('run') == 1 + finished and run.returncode == 1 - finished
        assert finished or 'base-resnet56-0, is still learning' in run.stderr
        other = recipe(tmp_path, 'cifar100_same.sh', 'kd', 'resnet56-resnet20', 0, '--teacher-resume', 'mine.pth',
                       DATA='/data', RUNS=tmp_path)
        assert other.returncode == 0 and other.stdout == 'run\n'


# the tables

def summarize(*args):
    command = [sys.executable, str(ROOT / 'scripts' / 'summarize.py'), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def refused(*args):
    run = summarize(*args)
    assert run.returncode == 2 and not run.stdout and 'Traceback' not in run.stderr
    return run.stderr


@pytest.fixture
def ran(tmp_path):
    """Leaves what a run leaves behind, as far as it is read: of 1000 images, so many told right at last and at best."""
    def write(name, last, best, table='cifar100', finished=True, teacher='abc', rank=1, facts=None, **arguments):
        method, *networks, seed = name.split('-')
        folder = tmp_path / 'runs' / table / name
        folder.mkdir(parents=True)
        arguments = {
            'arch': networks[-1] if networks else None, 'teacher_arch': networks[0] if networks else None,
            'teacher_resume': None if method in ('base', 'dml') else 'teacher.pth', 'output': f'runs/{table}/{name}',
            'seed': int(seed), 'workers': int(seed), 'dummy': False, 'lr': 0.05, 'epochs': 240, 'nesterov': False,
            'dataset': 'imagefolder' if table == 'imagenet' else 'cifar100', 'schedule': 'step', 'weight_decay': 5e-4,
            'auto_augment': 'off',
            **dict.fromkeys(['label_smoothing', 'mixup', 'cutmix', 'random_erasing', 'ema'], 0.0),
            **dict.fromkeys(['image_size', 'lr_drop_epochs', 'lr_drop_ratio', 'warmup', 'momentum',
                             'no_bias_decay'])} | arguments
        (folder / 'result.json').write_text(json.dumps({
            'finished': finished, 'seed': int(seed), 'world_size': rank, 'arguments': arguments,
            'teacher': None if method == 'base' else teacher,
            'last': {'correct1': last, 'n': 1000} | ({'teacher': {}} if method == 'dml' else {}),
            'best': {'correct1': best, 'n': 1000}} | (facts or {})))
        return folder
    return write


def row(text, title, label):
    """The cells of a row by pair."""
    lines = text.partition(f'### {title}\n')[2].partition('###')[0].splitlines()
    table = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in lines if line.startswith('|')]
    values, = [cells for cells in table if cells[0] == label]
    return dict(zip(table[0], values, strict=True))


def test_cells(ran):
    runs = [ran('kd-resnet56-resnet20-0', 701, 703), ran('kd-resnet56-resnet20-1', 703, 705),
            ran('kd-resnet56-resnet20-2', 705, 710), ran('dkd-resnet56-resnet20-0', 710, 721),
            ran('expkd-resnet56-resnet20-0', 711, 712),
            ran('base-resnet20-0', 690, 690), ran('base-resnet56-0', 720, 724),
            ran('mgd-resnet56-resnet20-0', 700, 700), ran('kd-resnet20-resnet8-0', 600, 610, teacher='def'),
            ran('base-wrn_16_1-0', 600, 610),
            ran('dist-wrn_40_4-wrn_16_4-0', 790, 792, table='srd_dist', crop_padding='reflect')]
    run = summarize(*runs)
    assert run.returncode == 0, run.stderr
    one, pair = 'CIFAR-100, one family', 'resnet56 → resnet20'
    assert row(run.stdout, one, 'KD')[pair] == '*70.66* / **70.30 ± 0.20** (3), best 70.60 ± 0.36, -0.36'
    assert row(run.stdout, one, 'KD')['resnet110 → resnet32'] == '*73.08* / -'
    assert row(run.stdout, one, 'DKD')[pair] == '*71.97* / **71.00** (1), best 72.10, +0.13'  # published is the best
    assert row(run.stdout, one, 'DKD as EDKD ran it')[pair] == '- / **71.00** (1), best 72.10'
    assert row(run.stdout, one, 'EDKD')[pair] == '-'
    assert row(run.stdout, one, 'Exp-KD ¹')[pair] == '*71.77* / **71.10** (1), best 71.20'  # which epoch's is not known
    assert row(run.stdout, one, 'teacher')[pair] == '*72.34* / **72.00** (1), best 72.40, -0.34'
    assert row(run.stdout, one, 'student alone')[pair] == '*69.06* / **69.00** (1), best 69.00, -0.06'
    assert row(run.stdout, one, 'mgd')[pair] == '- / **70.00** (1), best 70.00'
    other = row(run.stdout, 'cifar100: pairs without published numbers', 'kd')
    assert other == {'method': 'kd', '`METHOD`': '`kd`', 'source': '-',
                     'resnet20 → resnet8': '- / **60.00** (1), best 61.00, epochs: 240'}
    srd = row(run.stdout, 'CIFAR-100, pairs of SRDwithDIST', 'DIST')['wrn_40_4 → wrn_16_4']
    assert srd == '*79.43* / **79.00** (1), best 79.20, -0.43'
    assert 'different families' not in run.stdout  # nothing of it was run
    assert f'* Logs: `{runs[0].parent}/METHOD-TEACHER-STUDENT-SEED`' in run.stdout
    assert run.stderr == f'note: {runs[9]} belongs to no table\n'


def test_a_short_run_is_no_reproduction(ran):
    run = summarize(ran('kd-resnet56-resnet20-0', 701, 703, epochs=60))
    told = row(run.stdout, 'CIFAR-100, one family', 'KD')['resnet56 → resnet20']
    assert told == '*70.66* / **70.10** (1), best 70.30, epochs: 60'


def test_each_is_trained_as_long_as_its_paper_says(ran):
    srd, alone = {'table': 'srd_dist', 'crop_padding': 'reflect'}, 'CIFAR-100, networks alone, by SRDwithDIST\'s recipe'
    run = summarize(ran('base-resnet8-0', 615, 616, **srd, epochs=350), ran('base-resnet14-0', 680, 681, **srd),
                    ran('base-wrn_16_1-0', 678, 679, **srd))
    cells = row(run.stdout, alone, 'alone')
    assert cells['resnet8'].endswith(', -0.03') and cells['resnet14'].endswith(', epochs: 240')
    assert cells['wrn_16_1'].endswith(', -0.05')
    pair = 'resnet50-mobilenet_v1'
    run = summarize(*(ran(f'{method}-{pair}-0', 705, 706, 'imagenet', epochs=epochs)
                      for method, epochs in (('kd', 150), ('mgd', 120), ('expkd', 150))))
    told = [row(run.stdout, 'ImageNet', label)[pair.replace('-', ' → ')] for label in ('KD', 'MGD', 'Exp-KD ¹')]
    assert ['epochs' in cell for cell in told] == [True, False, False]


def test_another_recipe_is_no_reproduction(ran):
    run = summarize(ran('kd-resnet56-resnet20-0', 701, 703, weight_decay=1e-4, mixup=0.2, flip=0.0))
    told = row(run.stdout, 'CIFAR-100, one family', 'KD')['resnet56 → resnet20']
    assert told == '*70.66* / **70.10** (1), best 70.30, flip: 0.0, weight_decay: 0.0001, mixup: 0.2'
    seen = ran('kd-resnet34-resnet18-0', 701, 703, 'imagenet', epochs=100, val_resize_size=232, mixup=0.2)
    told = row(summarize(seen).stdout, 'ImageNet', 'KD')['resnet34 → resnet18']
    assert told == '*71.03* / **70.10** (1), best 70.30, val_resize_size: 232'
    run = summarize(ran('dkd-resnet56-resnet20-0', 701, 703, crop_padding='reflect'))
    told = row(run.stdout, 'CIFAR-100, one family', 'DKD')['resnet56 → resnet20']
    assert told.endswith('best 70.30, crop_padding: reflect')
    other = ran('kd-resnet56-resnet20-1', 901, 903, dataset='cifar10')
    assert 'is a run on cifar10, and cifar100 a table of cifar100' in refused(other)


def test_what_differs_by_the_seed_only_is_one_cell(ran):
    runs = [ran(f'dml-resnet56-resnet20-{seed}', 700, 700, teacher=f'random {seed}') for seed in range(2)]
    runs += [ran(f'ab-resnet56-resnet20-{seed}', 700, 700, teacher_resume=None,
                 student_resume=f'runs/cifar100/ab-resnet56-resnet20-{seed}/first/last.pth',
                 facts={'start': f'hash {seed}', 'images': '50000 + 10000'}) for seed in range(2)]
    run = summarize(*runs)
    assert run.returncode == 0, run.stderr
    assert '(2)' in row(run.stdout, 'CIFAR-100, one family', 'AB')['resnet56 → resnet20']


def test_protocols_are_not_mixed(ran):
    kd = ran('kd-resnet56-resnet20-0', 700, 700, global_batch=64, facts={'images': '50000 + 10000'})
    for other, difference in [
            (ran('kd-resnet56-resnet20-1', 700, 700, lr=0.1), 'lr'),
            (ran('kd-resnet56-resnet20-2', 700, 700, rank=2), 'world_size'),
            (ran('dkd-resnet56-resnet20-0', 700, 700, epochs=200), 'epochs'),
            (ran('base-resnet20-0', 700, 700, nesterov=True), 'nesterov'),
            (ran('base-resnet20-1', 700, 700, crop_padding='reflect'), 'crop_padding'),
            (ran('base-resnet20-2', 700, 700, amp='bf16'), 'amp'), (ran('base-resnet20-3', 700, 700, flip=0.0), 'flip'),
            (ran('kd-resnet56-resnet20-3', 700, 700, global_batch=128), 'global_batch'),
            (ran('kd-resnet56-resnet20-4', 700, 700, global_batch=64, start_epoch=239), 'start_epoch'),
            (ran('kd-resnet56-resnet20-5', 700, 700, global_batch=64, facts={'start': 'abc'}), 'student_resume'),
            (ran('kd-resnet56-resnet20-6', 700, 700, global_batch=64, facts={'changed': ['epoch 9: ...']}), 'changed'),
            (ran('dkd-resnet110-resnet20-0', 700, 700, teacher='def', facts={'images': '500 + 100'}), 'images'),
            (ran('dkd-resnet56-resnet20-1', 700, 700, teacher='def'), 'teacher'),
            (ran('dkd-resnet56-resnet32-1', 700, 700, teacher='def'), 'teacher')]:
        assert refused(kd, other).startswith(f'{kd} and {other} differ in {difference}: they belong')
    assert summarize(kd, ran('mrkd-resnet56-resnet20-0', 700, 700, lr=0.01)).returncode == 0  # its own recipe
    again = ran('kd-resnet56-resnet20-0', 701, 701, table='elsewhere/cifar100', output=str(kd))
    assert f'{kd} and {again} have the same seed: they belong' in refused(kd, again)


def test_recipes_of_imagenet_differ_in_schedule_and_in_no_more(ran):
    imagenet = {'table': 'imagenet', 'epochs': 100, 'teacher_resume': None}
    kd = ran('kd-resnet34-resnet18-0', 700, 710, **imagenet)
    dist = ran('dist-resnet34-resnet18-0', 720, 721, **imagenet, nesterov=True, no_bias_decay=True)
    expkd = ran('expkd-resnet34-resnet18-0', 720, 721, **imagenet | {'epochs': 90}, lr_drop_epochs=[15, 30, 45])
    text, pair = summarize(kd, dist, expkd).stdout, 'resnet34 → resnet18'
    assert row(text, 'ImageNet', 'KD')[pair] == '*71.03* / **70.00** (1), best 71.00, -0.03'
    assert row(text, 'ImageNet', 'DIST')[pair] == '*72.07* / **72.00** (1), best 72.10, +0.03'
    assert row(text, 'ImageNet', 'Exp-KD ¹')[pair] == '*71.74* / **72.00** (1), best 72.10, epochs: 90'
    for seed, (name, value) in enumerate([('mixup', 0.2), ('teacher', 'def')]):
        other = ran(f'at-resnet34-resnet18-{seed}', 700, 700, **imagenet, **{name: value})
        assert refused(kd, other).startswith(f'{kd} and {other} differ in {name}: they belong')


def test_what_is_no_result(ran, tmp_path):
    assert 'made-up images' in refused(ran('kd-resnet56-resnet20-0', 700, 700, dummy=True))
    assert 'trained resnet8' in refused(ran('kd-resnet56-resnet20-1', 700, 700, arch='resnet8'))
    taught = ran('kd-resnet56-resnet20-3', 700, 700, distiller=['kd'], teacher_arch='resnet110')
    assert 'its name is METHOD-resnet110-resnet20-3' in refused(taught)
    assert 'not the result' in refused(ran('kd-1', 700, 700, output='runs/kd'))
    assert 'No such file' in refused(tmp_path / 'nothing')
    (tmp_path / 'begun').mkdir()
    run = summarize(tmp_path / 'begun', ran('kd-resnet56-resnet20-2', 700, 700, finished=False))
    assert run.returncode == 0 and run.stderr.count('is not finished') == 2 and '###' not in run.stdout


def test_results_are_collected_once(ran, tmp_path):
    results, runs = tmp_path / 'results', [ran(f'kd-resnet56-resnet20-{seed}', 700, 700) for seed in range(2)]
    for _ in range(2):
        run = summarize('--collect', runs[0], runs[1], '--results', results)
        assert run.returncode == 0, run.stderr
        assert [p.read_text() for p in sorted(results.glob('cifar100/kd-*.json'))] == [
            (run / 'result.json').read_text() for run in runs]
    assert f'`{results}/cifar100/METHOD' in run.stdout and 'different families' in run.stdout
    assert summarize('--results', results).stdout == run.stdout
    one = results / 'cifar100' / 'kd-resnet56-resnet20-1.json'
    one.write_text(one.read_text().replace('700', '999'))
    assert 'have the same seed' in refused('--collect', *runs, '--results', results)


def test_numbers_of_the_papers():
    cells = {(table['title'], label): dict(zip(table['pairs'], values))
             for table in PUBLISHED['tables'] for _, label, _, values in table['rows']}
    one, cross = cells['CIFAR-100, one family', 'MRKD'], 'CIFAR-100, different families'
    assert (one['resnet32x4-resnet8x4'], one['cifar_vgg13-cifar_vgg8']) == (77.46, 74.51)
    assert cells['CIFAR-100, one family', 'FSP']['wrn_40_2-wrn_40_1'] is None
    last = 'resnet32x4-cifar_shufflenet_v2'  # which some of the sources call MobileNetV2
    assert [cells[cross, label][last] for label in ('student alone', 'KD', 'DKD')] == [71.82, 74.45, 77.07]
    assert cells[cross, 'Exp-KD ¹'][last] is None  # of a wider student
    assert cells['CIFAR-100, pairs of SRDwithDIST', 'FitNet + KD ¹']['wrn_40_4-wrn_16_4'] == 79.15


def test_the_page_of_tables_is_that_of_the_results():
    """Whoever adds a result writes the page anew: it says by what."""
    page = (ROOT / 'docs' / 'published.md').read_text()
    assert page.partition('(tables.md).\n\n')[2] == summarize().stdout


# both together

def test_a_check_runs(recorded, tmp_path, monkeypatch):
    calls, _ = recorded('cifar100_same.sh', 'ab', 'resnet14-resnet8', 0, '--epochs', 1, '-b', 4, '-j', 0,
                        '--dummy-images', 8, '--no-accel', DATA='--dummy', RUNS=tmp_path / 'runs')
    assert [start(call, monkeypatch) for call in calls] == ['main_distill', 'main_base']
    folder = tmp_path / 'runs' / 'check' / 'cifar100' / 'ab-resnet14-resnet8-0'  # not where the table's are
    first, second = (json.loads((f / 'log.jsonl').read_text())['train'] for f in (folder / 'first', folder))
    assert first['losses']['ce'] == 0 < first['losses']['ab'] and 'ab' not in second.get('losses', {})
    assert 'made-up images' in refused(folder)
