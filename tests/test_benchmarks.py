"""The benchmarks measure what they say, refuse unequal results, and fail where a goal is missed."""
import itertools
import json
import math
import sys

import pytest
import torch

from benchmarks import CASES
from benchmarks.cifar_data import cifar_data
from benchmarks.cifar_kd import cifar_kd
from benchmarks.harness import Case, Mismatch, Row, Settings, Variant, measure
from benchmarks.memory import held, peak
from benchmarks.methods import methods
from benchmarks.mgd_flow import flow_assignment, flow_tracking
from benchmarks.mgd_step import mgd_step
from benchmarks.peers import MDISTILLER, TORCHDISTILL, imported
from benchmarks.run import main
from benchmarks.table import markdown
from distillers import DISTILLERS, Distiller

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
    monkeypatch.setattr('benchmarks.harness.time.process_time', lambda: spend.now)


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
    assert len(measure(small(), CPU, rounds=1)) >= 1


def test_the_peak_of_memory_sees_what_was_freed():
    before = held(CPU.device)
    torch.ones(256 << 20, dtype=torch.uint8)
    assert peak(CPU.device) - before > 200e6


class Reader(Distiller):
    """Looks at some features; of others it only asks the size."""

    def __init__(self, student, teacher):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, s, t, batch):
        with torch.no_grad():
            taught = sum(f.mean() for f in t.maps) * self.scale.sum()
        return {'a': s.maps[0].mean() * len(t.logits), 'b': (s.maps[-1].mean() + s.pooled.mean() - taught).square()}


def test_methods_are_measured_and_described(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('benchmarks.harness.time.process_time', itertools.count().__next__)  # a second per step

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
