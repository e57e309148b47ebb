"""The benchmarks measure what they say, refuse unequal results, and fail where a goal is missed."""
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT

from benchmarks import CASES, breakdown, curves, harness
from benchmarks.breakdown import Counter
from benchmarks.cifar_data import cifar_data
from benchmarks.cifar_kd import cifar_kd
from benchmarks.cifar_run import cifar_run
from benchmarks.harness import Case, Limit, Mismatch, Row, Settings, Variant, flop_counter, measure, timed
from benchmarks.loader import decoding, write_folder
from benchmarks.methods import methods
from benchmarks.mgd_flow import flow_assignment, flow_tracking
from benchmarks.mgd_step import arguments, mgd_step
from benchmarks.peers import MDISTILLER, TORCHDISTILL, imported
from benchmarks.run import command, main
from benchmarks.table import markdown
from benchmarks.throughput import fed
from distillers import DISTILLERS, Distiller
from models import create_model
from utils import distributed

CPU = Settings()


def spend(milliseconds, result=1.0):
    """A variant that takes so long by the clock of the test below."""
    def run():
        spend.now += milliseconds / 1e3
        return {'result': result}
    return Variant(run)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A process clock that only `spend` moves."""
    spend.now = 0.0
    monkeypatch.setattr('benchmarks.harness.spent', lambda: spend.now)


def case(*rows, **variants):
    return Case(variants, list(rows))


@pytest.mark.parametrize('metric, ratio', [('speed-up', 4.0), ('share', 0.25), ('overhead', -0.75),
                                            ('cost', 0.25)])
def test_ratios(metric, ratio):
    outcome, = measure(case(Row('a', 'b', ratio, metric), a=spend(2), b=spend(8)), CPU, rounds=3)
    assert outcome.ours == pytest.approx([2] * 3) and outcome.baseline == pytest.approx([8] * 3)
    assert outcome.ratios.tolist() == pytest.approx([ratio] * 3)


def test_the_first_round_does_not_count():
    durations = itertools.chain([1000.0], itertools.repeat(2.0))

    def slow_at_first():
        return spend(next(durations)).run()
    outcome, = measure(case(Row('a', 'b', 1), a=Variant(slow_at_first), b=spend(2)), CPU, rounds=4)
    assert outcome.ours == pytest.approx([2] * 4)


def test_the_limit_of_a_case_is_told_and_how_far_each_variant_is_from_it(tmp_path, capsys):
    made = case(Row('a', 'b', 1.5), Row('c', 'b', None), a=spend(2), b=spend(8), c=spend(4))
    made = made._replace(limit=lambda: Limit('a millisecond of products', {'a': 1.0}))
    main({'some': lambda settings: made}, ['--rounds', '2', '--output', str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith('ok, times its limit: 2.0') for line in lines) and not any('limit: 4' in x for x in lines)
    assert any(line.strip() == 'limit: a millisecond of products' for line in lines)
    a, c = json.loads((tmp_path / 'bench.json').read_text())['rows']
    assert a['times its limit'] == 2 and 'times its limit' not in c and a['limit'] == 'a millisecond of products'


def test_products_are_counted_and_their_rate_is_measured(monkeypatch):
    monkeypatch.setattr(harness, 'matmul_rate', lambda kind, device: {'fp32': 1e3, 'bf16': 4e3}[kind])
    monkeypatch.setattr(harness, 'has_bf16', lambda device: True)
    a, b = torch.ones(10, 20), torch.ones(20, 30)
    limit = harness.products(lambda: a @ b, {'x': spend(1), 'y': spend(1)._replace(precision='bf16')}, CPU.device)
    assert limit.least == {'x': 12.0, 'y': 3.0}  # 2 x 10 x 20 x 30 FLOP
    assert limit.what.startswith('1.2e-05 GFLOP of products')


@pytest.mark.parametrize('metric, goal, reached', [('speed-up', 3.9, True), ('speed-up', 4.1, False),
                                                   ('share', 0.26, True), ('share', 0.24, False)])
def test_goals(metric, goal, reached):
    outcome, = measure(case(Row('a', 'b', goal, metric), a=spend(2), b=spend(8)), CPU, rounds=1)
    assert outcome.reached == reached


@pytest.mark.parametrize('result', [1.001, math.nan, torch.tensor([1.0, 2.0])])
def test_other_results_are_no_faster_way_to_the_same(result):
    with pytest.raises(Mismatch, match='a: result differs'):
        measure(case(Row('a', 'b', 1, tolerance=1e-4), a=spend(1, result), b=spend(2)), CPU, rounds=1)


@pytest.mark.parametrize('ours, goal, code', [(spend(1), 1.5, 0), (spend(1), 2.5, 1), (spend(1), None, 0),
                                              (spend(1, 3.0), 1.5, 1)],
                         ids=['reached', 'missed', 'not judged', 'mismatch'])
def test_exit_code_and_record(tmp_path, capsys, ours, goal, code):
    cases = {'some': lambda settings: case(Row('a', 'b', goal), a=ours, b=spend(2))}
    assert main(cases, ['--rounds', '2', '--output', str(tmp_path)]) == code
    record = json.loads((tmp_path / 'bench.json').read_text())
    assert [row['ratio'] for row in record['rows']] == pytest.approx([2.0] if ours.run()['result'] == 1 else [])
    assert ('MISMATCH' in capsys.readouterr().out) == (ours.run()['result'] != 1)


def test_the_batch_is_the_asked_or_the_case_s_own(tmp_path):
    seen = []

    def some(settings):
        seen.append(settings.batch(8, 128))
        return case(a=spend(1))
    for words in [], ['--batch', '3']:
        assert main({'some': some}, [*words, '--rounds', '1', '--output', str(tmp_path)]) == 0
    assert seen == [8, 3] and CPU._replace(device=torch.device('cuda')).batch(8, 128) == 128


def test_unknown_cases_are_refused():
    with pytest.raises(SystemExit):
        main(CASES, ['nonsense'])


def test_a_missing_peer_is_said(tmp_path):
    settings = CPU._replace(peers=tmp_path)
    skipped = flow_assignment(settings, sc=2).skipped
    assert 'KaiyuYue/mgd' in skipped[0]
    case = cifar_kd(settings, teacher='resnet8', student='resnet8', batch=2, images=2)
    assert len(case.variants) == 5
    for name, line in zip((MDISTILLER, TORCHDISTILL), case.skipped, strict=True):
        assert line.startswith(f'{name} in {tmp_path}/') and 'no such folder' in line


def test_a_peer_is_imported_though_modules_it_wants_are_missing(tmp_path):
    package = tmp_path / 'somepeer' / 'somepeer'
    package.mkdir(parents=True)
    (package / '__init__.py').write_text('')
    (package / 'method.py').write_text('from nowhere_to_be.found import this\nimport torch\nvalue = 3\n')
    method, = imported(tmp_path / 'somepeer', 'somepeer.method')
    assert method.value == 3 and not any('nowhere_to_be' in name for name in sys.modules)
    with pytest.raises(ModuleNotFoundError, match=r'somepeer\.gone'):
        imported(tmp_path / 'somepeer', 'somepeer.gone')


@pytest.mark.parametrize('small', [
    lambda: flow_tracking(CPU, stages=((4, 8, 20), (6, 12, 3)), batch=2),
    lambda: flow_assignment(CPU, sc=8),
    lambda: mgd_step(CPU, teacher='resnet18', student='shufflenet_v2_x0_5', size=64, batch=4),
    lambda: cifar_kd(CPU, teacher='resnet14', student='resnet8', batch=16, images=20),
    lambda: cifar_data(CPU, images=20, batch=8, samples=300, negatives=7),
], ids=['tracking', 'assignment', 'step', 'cifar step', 'cifar data'])
def test_cases_find_equal_results(small):
    made = small()
    assert len(measure(made, CPU, rounds=1)) >= 1
    assert {name for name, v in made.variants.items() if v.theirs} == {x for x in made.variants if x[:5] == 'plain'}


def test_the_peak_of_memory_sees_what_was_freed():
    """In a process that has not freed any before."""
    program = """if True:
        import torch
        from benchmarks.memory import held, peak
        before = held(torch.device('cpu'))
        torch.ones(256 << 20, dtype=torch.uint8)
        print(peak(torch.device('cpu')) - before)
    """
    told = subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True, capture_output=True).stdout
    assert int(told) > 200e6


def test_each_variant_has_its_process_and_ours_keep_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(harness, 'keep_memory', lambda: asked.append('ours'))

    def variant(theirs):
        def run():
            asked.append('run')
            return {'result': len(asked) + theirs, 'apart': os.getpid() != here}
        return Variant(run, theirs=theirs)
    here = os.getpid()
    measure(case(Row('a', 'b', None), a=variant(False), b=variant(True)), CPU, rounds=1)
    with pytest.raises(Mismatch):
        measure(case(Row('a', 'b', None), a=variant(False), b=variant(False)._replace(theirs=True)), CPU, rounds=1)
    assert not asked and not multiprocessing.active_children()


class Reader(Distiller):
    """Looks at some features; of others it only asks the size."""

    def __init__(self, student, teacher):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, s, t, batch):
        with torch.no_grad():
            taught = sum(f.mean() for f in t.maps) * self.scale.sum()
        return {'reader_first': s.maps[0].mean() * len(t.logits),
                'reader_last': (s.maps[-1].mean() + s.pooled.mean() - taught).square()}


def test_methods_are_measured_and_described(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('benchmarks.harness.spent', itertools.count().__next__)  # a second per step

    def small(settings):
        table = {name: DISTILLERS[name] for name in ('kd', 'srd', 'mgd', 'fsp')} | {'reader': Reader}
        return methods(settings, table, student='resnet8', teacher='resnet8x4', batch=4)

    assert main({'methods': small}, ['--rounds', '1', '--output', str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert 'skipped: fsp: paired stages have' in printed and 'MISSED' not in printed
    rows = {row['variant']: row for row in json.loads((tmp_path / 'bench.json').read_text())['rows']}
    assert {name: (row['features'], row['parameters']) for name, row in rows.items()} == {
        'kd': ('logits', 0),
        'srd': ('student: head; teacher: pooled', 64 * 256 + 2 * 256),
        'mgd': ('stages before activation', 2 * (16 + 32 + 64)),
        'reader': ('student: pooled, stage 1, last stage; teacher: stages', 3),
    }
    kd = markdown([rows['kd']]).splitlines()[-1].split(' | ')
    assert kd[0] == '| `kd`' and kd[1].startswith('Distilling the Knowledge') and kd[2:5] == ['logits', '0', '1.00']


def test_slow_steps_of_a_gpu_are_fewer(monkeypatch):
    asked = defaultdict(list)

    def as_on_a_gpu(run, device, steps, clock):
        name = run()['name']
        asked[name].append(steps)
        return {'quick': 0.0, 'usual': 50.0, 'slow': 3000.0}[name], {}
    monkeypatch.setattr(harness, 'timed', as_on_a_gpu)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    variants = {name: Variant(lambda name=name: {'name': name}) for name in ('quick', 'usual', 'slow')}
    rows = [Row(name, 'usual', None) for name in ('quick', 'slow')]
    measure(Case(variants, rows), CPU._replace(device=torch.device('cuda')), rounds=2)
    # the first results, the choice of kernels, a look at the time, a warm-up, two rounds
    assert asked == {'quick': [1, 1, 1, 40, 40, 40], 'usual': [1, 1, 1, 10, 10, 10], 'slow': [1, 1, 1, 1, 1, 1]}


def test_a_host_s_clock_times_one_step_whatever_the_device():
    runs, ticks = [], itertools.count(step=0.5)
    spent, result = timed(lambda: runs.append(1) or 'done', torch.device('cuda'), 200, lambda: next(ticks))
    assert (spent, result, len(runs)) == (500, 'done', 1)


def test_a_step_on_a_gpu_is_on_one():
    assert distributed.replicated('network', torch.device('cuda'), arguments()) == 'network'


def test_results_are_compared_in_full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    rounded, clock = [], itertools.count().__next__
    variants = {'a': Variant(lambda: {'result': 1.0}, clock=clock), 'b': Variant(lambda: rounded.append(
        torch.backends.cudnn.allow_tf32) or {'result': 1.0}, clock=clock)}
    measure(Case(variants, [Row('a', 'b', None)]), CPU._replace(device=torch.device('cuda')), rounds=2)
    assert rounded == [False] + 2 * [True]  # where a host's clock counts, kernels are not chosen first


@pytest.mark.parametrize('groups, first', [(1, False), (4, False), (1, True)])
def test_flops_of_a_convolution_and_its_gradients(groups, first):
    convolution, x = torch.nn.Conv2d(4, 8, 3, stride=2, groups=groups), torch.randn(2, 4, 9, 9, requires_grad=not first)
    with flop_counter() as counter:
        convolution(x).sum().backward()
    assert counter.get_total_flops() == (2 if first else 3) * 2 * (2 * 8 * 4 * 4) * (4 // groups * 9)


@pytest.mark.parametrize('run, moved', [
    (lambda x: x.relu(), 2), (lambda x: x.view(-1).detach(), 0), (lambda x: torch.empty_like(x), 0),
    (lambda x: x.add_(x[:1].expand_as(x)), 2.1), (lambda x: x.index_select(0, torch.tensor([1])), 0.2)],
    ids=['in and out', 'view', 'unwritten', 'expanded, in place', 'picked'])
def test_bytes_of_an_op(run, moved):
    x = torch.ones(10, 1000)
    with Counter() as counter:
        run(x)
    assert counter.bytes == pytest.approx(moved * x.nbytes, abs=16)


def test_a_step_is_taken_apart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('benchmarks.harness.spent', itertools.count().__next__)
    networks = ['--teacher', 'resnet18', '--student', 'shufflenet_v2_x0_5']
    breakdown.main([*networks, '--size', '32', '--batch', '2', '--output', str(tmp_path)])
    record = json.loads((tmp_path / 'breakdown.json').read_text())
    parts = {row['part']: row for row in record['parts']}
    assert list(parts) == ['teacher, forward', 'losses, forward', 'student, forward', 'losses, backward',
                           'student, backward', 'optimizer']
    assert sum(row['share'] for row in parts.values()) == pytest.approx(1) and all(r['ms'] > 0 for r in parts.values())
    student = create_model('shufflenet_v2_x0_5')
    with flop_counter() as counter:
        student(torch.randn(2, 3, 32, 32))
    forward = counter.get_total_flops() / 1e9
    stem = 2 * (2 * 24 * 16 * 16) * 27 / 1e9  # whose input has no gradient
    assert parts['student, forward']['GFLOP'] == pytest.approx(forward)
    assert parts['student, backward']['GFLOP'] == pytest.approx(2 * forward - stem)
    assert [parts[part]['GFLOP'] for part in ('losses, forward', 'losses, backward', 'optimizer')] == [0, 0, 0]
    trained = sum(p.numel() for p in student.parameters()) + 2 * sum(student.feature_channels)
    assert parts['optimizer']['MB'] == pytest.approx(5 * 4 * trained / 1e6, rel=0.01)  # three are read, two written
    assert record['a step, ms'] == record['without MGD, ms'] == 1000 and record['MGD adds'] == 0  # by this clock
    assert len(record['kernels']) == 10 and 'student, backward' in capsys.readouterr().out


@pytest.fixture
def in_this_process(monkeypatch):
    """Scripts that a case starts."""
    def run(command, **_):
        monkeypatch.setattr(sys, 'argv', [*map(str, command[1:])])
        runpy.run_path(str(command[1]), run_name='__main__')
    monkeypatch.setattr('subprocess.run', run)


@pytest.mark.parametrize('kinds', [('jpeg', 'raw'), ('device',)])
def test_the_real_script_is_fed_and_its_log_read(monkeypatch, in_this_process, kinds):
    monkeypatch.setattr('os.cpu_count', lambda: 1)
    name = 'shufflenet_v2_x0_5'
    small = fed(CPU, kinds=kinds, teacher='resnet18', students=(name,), size=32, batch=4, images=4, names=3)
    for outcome in measure(small, CPU, rounds=1):
        assert outcome.reached and 0 <= outcome.ratios[0] < 1
        seconds = (outcome.baseline[0] - outcome.ours[0]) / 1e3
        assert small.facts[outcome.row.variant]['images/s'] == pytest.approx(4 / seconds, abs=0.5)
    assert {name: fact['from'] for name, fact in small.facts.items()} == {
        f'{name} raw, wait' if kind == 'raw' else f'{name}, wait': kind for kind in kinds}


def test_a_record_has_the_command_without_where_the_project_lies(monkeypatch):
    monkeypatch.setattr(sys, 'argv', [str(ROOT / 'benchmarks' / 'curves.py'), '--jobs', '1'])
    assert command() == ['benchmarks/curves.py', '--jobs', '1']


def test_curves_agree_as_those_of_other_seeds_do(monkeypatch, tmp_path, capsys):
    """Of losses that are made up: one option is in the middle of the seeds, one four deviations off."""
    seeds = {str(seed): [math.exp(1 + 0.1 * (seed - 2)), math.exp(0.2 * (seed - 2))] for seed in range(curves.SEEDS)}
    off = {'--fast': [math.exp(1 + 0.4 * 2.5**0.5), math.exp(0.8 * 2.5**0.5)], '--channels-last': [math.e, 1.0]}
    arguments = ['--output', str(tmp_path), '--options', *(name[2:] for name in off), '--jobs', '1']

    def run(command, **_):
        words = [*map(str, command[1:])]
        if '--output' in words:
            assert words[0] == 'main_base.py' or str(tmp_path / 'teacher' / 'last.pth') in words
            folder, flag = Path(words[words.index('--output') + 1]), next((word for word in words if word in off), None)
            losses = off[flag] if flag else seeds[words[words.index('--seed') + 1]]
            folder.mkdir()
            (folder / 'log.jsonl').write_text(''.join(json.dumps({'train': {'loss': loss}}) + '\n' for loss in losses))
        return SimpleNamespace(returncode=0, stdout='')
    monkeypatch.setattr('subprocess.run', run)
    assert curves.main(arguments) == 1
    found = json.loads((tmp_path / 'curves.json').read_text())['options']
    assert [found[name]['deviations'] for name in off] == pytest.approx([4, 0])
    assert re.findall(r'(TOO FAR|ok)$', capsys.readouterr().out, re.MULTILINE) == ['TOO FAR', 'ok']


def test_240_epochs_are_told_by_a_few(in_this_process):
    alone, each = measure(cifar_run(CPU, images=6), CPU, rounds=1)
    assert alone.baseline == each.baseline == [90] and min(alone.ours[0], each.ours[0]) > 0


def test_seeds_side_by_side_share_the_seconds(monkeypatch):
    """The first two epochs do not count, of the others the one in the middle does."""
    def run(command, **_):
        for seed in command[command.index('--seeds') + 1:command.index('--output')]:
            folder = Path(f'{command[command.index("--output") + 1]}-{seed}')
            folder.mkdir()
            (folder / 'log.jsonl').write_text(''.join(f'{{"seconds": {end}}}\n' for end in (50, 90, 92, 95, 99)))
    monkeypatch.setattr('subprocess.run', run)
    outcomes = measure(cifar_run(CPU), CPU, rounds=1)
    assert [outcome.ours for outcome in outcomes] == [[240 * 3], [240 * 3 / 3]]
    assert [outcome.ratios[0] for outcome in outcomes] == pytest.approx([8, 8 / 3])


def test_decoders_read_the_same_jpegs(tmp_path, monkeypatch):
    write_folder(tmp_path, images=5, different=5, width=40, height=30)
    variants, rows, skipped = decoding(tmp_path, CPU.device, batch=2)
    outcomes = measure(Case(variants, rows), CPU, rounds=1)
    assert len(outcomes) == 2 and all(o.ours[0] > 0 < o.baseline[0] for o in outcomes) and not skipped
    without = Mock(side_effect=RuntimeError('not compiled with nvJPEG\nat'))
    monkeypatch.setitem(decoding.__globals__, 'decode_jpeg', without)
    assert decoding(tmp_path, CPU.device, batch=2) == ({}, [], ('nvJPEG: not compiled with nvJPEG',))


def test_facts_are_told_beside_the_verdict(tmp_path, capsys):
    judged = case(Row('a', 'b', 1.5), a=spend(1), b=spend(2))._replace(facts={'a': {'images/s': 7}})
    assert main({'some': lambda settings: judged}, ['--rounds', '1', '--output', str(tmp_path)]) == 0
    assert 'ok, images/s: 7' in capsys.readouterr().out


def test_what_fails_on_a_gpu_does_not_keep_the_rest_from_being_run(tmp_path):
    python = tmp_path / 'python3'
    python.write_text("""#!/bin/bash
        echo "$@"
        case "$*" in *mgd-step*|*test_cuda*) exit 1 ;; *cifar-data*) exit 3 ;; esac
        while [[ ${1-} && $1 != --output ]]; do shift; done
        [[ ${2-} ]] && mkdir -p "$2" && echo '{}' > "$2/bench.json"
    """)
    python.chmod(0o755)

    def gpu(*words):
        return subprocess.run([ROOT / 'benchmarks' / 'gpu.sh', *words], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {'BIN': tmp_path})
    script = gpu('out')
    assert not script.returncode and not script.stderr, script.stderr
    codes = dict(re.findall(r'^(\S+): exit code (\d+)', script.stdout, re.MULTILINE))
    failed = {'test_cuda': '1', 'mgd-step': '1', 'cifar-data': '3'}
    assert list(codes)[-1] == 'cifar-data' and codes == dict.fromkeys(codes, '0') | failed
    out = tmp_path / 'out'
    assert {path.stem for path in out.glob('*.log')} == {*codes, 'nvidia-smi'}
    assert {path.stem for path in out.glob('*.json')} == codes.keys() - failed
    cases = {name for name in codes if f'run.py {name} --device cuda' in (out / f'{name}.log').read_text()}
    assert cases <= CASES.keys() and {'throughput', 'loader', 'memory'} < cases
    some = gpu('some', 'methods', 'memori', 'memory').stdout
    assert re.findall(r'^(\S+): exit', some, re.MULTILINE) == ['memory', 'methods'] and 'no part memori' in some
    assert 'no part' not in script.stdout
