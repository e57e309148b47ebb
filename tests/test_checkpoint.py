"""Files that survive, weights that fit."""
import argparse
import os
import pickle
import signal
from itertools import chain, repeat

import pytest
import torch
from conftest import PROGRAMS, assert_same, script
from torch import nn

from models import Renormalised
from utils import checkpoint, engine
from utils import run as runs


def content(value: float) -> dict:
    return {'format': checkpoint.FORMAT, 'model': {'w': torch.full((1000,), value)}}


def test_the_newest_valid_file_is_found(tmp_path, capsys):
    path = tmp_path / 'checkpoint.pth'
    assert checkpoint.newest(path) == (None, None)
    for value in (1.0, 2.0, 3.0):
        checkpoint.save(path, content(value))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint.previous.pth', 'checkpoint.pth']
    assert checkpoint.newest(path)[0]['model']['w'][0] == 3 and not capsys.readouterr().err


@pytest.mark.parametrize('damage', ['truncate', 'flip', 'empty', 'text', 'pickle'])
def test_a_damaged_file_is_passed_over_and_named(tmp_path, damage, capsys):
    path = tmp_path / 'checkpoint.pth'
    checkpoint.save(path, content(1.0))
    checkpoint.save(path, content(2.0))
    raw = bytearray(path.read_bytes())
    if damage == 'flip':  # one bit inside the numbers: torch.load alone would not notice
        raw[raw.find(torch.full((8,), 2.0).numpy().tobytes()) + 1600] ^= 1
    path.write_bytes({'truncate': raw[:len(raw) // 2], 'flip': raw, 'empty': b'', 'text': b'hello',
                      'pickle': pickle.dumps(content(2.0))}[damage])
    found, origin = checkpoint.newest(path)
    assert found['model']['w'][0] == 1 and origin.name == 'checkpoint.previous.pth'
    line, = capsys.readouterr().err.splitlines()
    assert str(path) in line and 'looking for an older one' in line
    checkpoint.places(path)[2].write_bytes(b'')
    with pytest.raises(SystemExit, match='no valid checkpoint'):
        checkpoint.newest(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ['EVIL_FOLDER'],)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv('EVIL_FOLDER', str(tmp_path / 'evil'))
    torch.save({'format': 1, 'model': Evil()}, tmp_path / 'a.pth')
    (tmp_path / 'b.pth').write_bytes(pickle.dumps(Evil()))
    for name in ('a.pth', 'b.pth'):
        with pytest.raises(ValueError, match='is refused') as error:
            checkpoint.read(tmp_path / name)
        assert '\n' not in str(error.value)
    assert not (tmp_path / 'evil').exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'checkpoint.pth'
    checkpoint.save(path, content(1.0))
    before = path.read_bytes()
    monkeypatch.setattr(os, 'fsync', lambda f: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(SystemExit, match='No space left on device') as stop:
        checkpoint.save(path, content(2.0))
    assert '\n' not in str(stop.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['checkpoint.pth']


def test_a_disk_that_takes_nothing_is_one_line(tmp_path, monkeypatch):
    """Not even the torn file away."""
    def refused(self, **_):
        raise OSError(30, 'Read-only file system')
    monkeypatch.setattr(os, 'replace', lambda *_: refused(None))
    monkeypatch.setattr(type(tmp_path), 'unlink', refused)
    with pytest.raises(SystemExit, match=r'cannot write .*: .*Read-only file system'):
        checkpoint.write(tmp_path / 'args.json', b'{}')
    with pytest.raises(SystemExit, match=r'cannot write .*: .*Is a directory'):
        checkpoint.append(tmp_path, 'a line')


class Net(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(nn.Linear(3, width), nn.Linear(width, 2))


def layouts(weights):
    yield weights
    yield {f'module.{k}': v for k, v in weights.items()}
    yield {f'_orig_mod.{k}': v for k, v in weights.items()}
    yield {f'module._orig_mod.{k}': v for k, v in weights.items()}
    yield {'state_dict': {f'module.{k}': v for k, v in weights.items()}, 'epoch': 3, 'arch': 'net'}
    yield {'model': weights, 'epoch': 3}
    yield {'student': weights}
    yield {'model_state': weights, 'epoch': 3}
    yield {'model_state_dict': weights, 'optimizer_state_dict': {}, 'epoch': 3}
    yield {'net': weights, 'acc': 71.2}
    yield {'model': {f'module.{who}.{k}': v + (who == 'teacher') for who in ('student', 'teacher')
                     for k, v in weights.items()}, 'best_acc': 71.2}
    average = {'n_averaged': torch.tensor(1), **{f'module.{k}': v for k, v in weights.items()}}
    others = {k: v + 1 for k, v in weights.items()}
    yield {'format': 1, 'model': others, 'ema': average}
    yield {'model': others, 'model_ema': average, 'epoch': 3, 'args': argparse.Namespace(lr=0.1)}
    yield {'state_dict': others, 'state_dict_ema': {f'module.{k}': v for k, v in weights.items()}}
    yield {'model': weights, 'ema': {'decay': 0.9}}
    yield {'state_dict': {f'model.{k}': v for k, v in weights.items()}, 'hyper_parameters': {}}
    yield {f'module.model.{k}': v for k, v in weights.items()}


def test_weights_in_any_usual_layout(tmp_path):
    weights = Net().state_dict()
    for layout in layouts(weights):
        torch.save(layout, tmp_path / 'w.pth')
        net = Net()
        checkpoint.load_weights(net, tmp_path / 'w.pth')
        assert_same(net.state_dict(), weights)


def test_whose_average_is_taken_is_told(tmp_path, capsys):
    torch.save({'state_dict': Net().state_dict(), 'state_dict_ema': Net().state_dict()}, tmp_path / 'w.pth')
    checkpoint.load_weights(Net(), tmp_path / 'w.pth')
    assert 'w.pth the averaged weights are taken, state_dict_ema' in capsys.readouterr().out


def test_names_that_begin_as_a_wrappers_do(tmp_path):
    net = nn.DataParallel(Net())
    for prefix in ('', 'module.', '_orig_mod.'):
        weights = {prefix + name: value + 1 for name, value in net.state_dict().items()}
        for layout in (weights, {'format': 1, 'model': weights, 'ema': None}, {'model': {}, 'ema': {
                'n_averaged': torch.tensor(1), **{f'module.{name}': value for name, value in weights.items()}}}):
            torch.save(layout, tmp_path / 'w.pth')
            other = nn.DataParallel(Net())
            checkpoint.load_weights(other, tmp_path / 'w.pth')
            assert all(torch.equal(value, net.state_dict()[name] + 1) for name, value in other.state_dict().items())


def test_what_stands_in_the_way_is_named(tmp_path):
    torch.save({'model': Net().state_dict(), 'best': Odd()}, tmp_path / 'w.pth')
    with pytest.raises(SystemExit, match=r'w\.pth is refused: it holds \S+\.Odd, and loading that could run code'):
        checkpoint.load_weights(Net(), tmp_path / 'w.pth')


class Odd:
    pass


@pytest.mark.parametrize('weights, complaint', [
    (Net(5).state_dict(), '0.weight is [5, 3] instead of [4, 3]'),
    ({**Net().state_dict(), 'extra': torch.zeros(1)}, 'extra is unknown'),
    ({k: v for k, v in Net().state_dict().items() if k != '1.bias'}, '1.bias is missing'),
    ({'epoch': 3}, 'holds no state_dict'),
    ({f'{i}.x.{k}': v for i in 'ab' for k, v in Net().state_dict().items()},
     '0.weight is missing, 0.bias is missing, a.x.0.weight is unknown, a.x.0.bias is unknown and 8 more'),
])
def test_weights_that_do_not_fit_are_named(tmp_path, weights, complaint):
    torch.save(weights, tmp_path / 'w.pth')
    with pytest.raises(SystemExit) as stop:
        checkpoint.load_weights(Net(), tmp_path / 'w.pth')
    assert complaint in str(stop.value) and '\n' not in str(stop.value)


class Renamed(Net):
    """Published files call its first layer otherwise."""

    def published_name(self, name):
        return name.replace('0.', 'first.')


@pytest.mark.parametrize('network', [Renamed, lambda: Renormalised(Renamed(), *2 * [((0.5,) * 3, (1,) * 3)], 4)])
def test_names_of_published_files(tmp_path, network):
    weights = Net().state_dict()
    for names in ('0.weight', '0.bias'), ('first.weight', 'first.bias'):
        torch.save({'model': dict(zip((*names, '1.weight', '1.bias'), weights.values()))}, tmp_path / 'w.pth')
        net = network()
        checkpoint.load_weights(net, tmp_path / 'w.pth')
        assert_same(net.state_dict(), weights)


@pytest.mark.parametrize('change, complaint', [
    ({'0.weight': torch.zeros(4, 3)}, 'first.weight is unknown'),  # which of the two it should be cannot be known
    ({'first.weight': torch.zeros(5, 3)}, '0.weight is [5, 3] instead of [4, 3]'),
    ({'second.weight': torch.zeros(4, 4)}, 'does not fit the network: second.weight is unknown'),
])
def test_names_of_published_files_are_as_strict(tmp_path, change, complaint):
    weights = dict(zip(('first.weight', 'first.bias', '1.weight', '1.bias'), Net().state_dict().values()))
    torch.save(weights | change, tmp_path / 'w.pth')
    with pytest.raises(SystemExit) as stop:
        checkpoint.load_weights(Renamed(), tmp_path / 'w.pth')
    assert complaint in str(stop.value) and '\n' not in str(stop.value)


def test_files_from_before_batches_were_counted(tmp_path):
    fresh, net = (nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)) for _ in range(2))
    net(torch.randn(4, 2, 3, 3))
    weights = {key: value for key, value in fresh.state_dict().items() if key != '0.num_batches_tracked'}
    torch.save(weights, tmp_path / 'w.pth')
    with pytest.raises(SystemExit, match=r'0\.num_batches_tracked is missing'):
        checkpoint.load_weights(net, tmp_path / 'w.pth')
    del weights['1.num_batches_tracked']
    torch.save(weights, tmp_path / 'w.pth', _use_new_zipfile_serialization=False)
    checkpoint.load_weights(net, tmp_path / 'w.pth')
    assert_same(net.state_dict(), fresh.state_dict())


@pytest.mark.parametrize('crash', ['torch.save 4', 'os.fsync 9', 'os.replace 9', 'os.replace 10', 'os.replace 11'])
def test_a_kill_inside_a_save_loses_nothing(images, tmp_path, crash, base):
    """Killed before, during and after the writes and renames of a save; the same command then ends as if it had not."""
    args = [images, '--epochs', 2, '--save-every', 1, '--output']
    whole = base(*args, tmp_path / 'whole')
    killed = script(*args, tmp_path / 'run', program=PROGRAMS / 'crash.py', CRASH=crash)
    assert killed.code == -signal.SIGKILL
    again = base(*args, tmp_path / 'run')
    assert again.code == 0, again.out
    assert 'resumed from' in again.out and 'damaged' not in again.err
    assert_same(again.weights(), whole.weights())
    assert [record['valid'] for record in again.log()] == [record['valid'] for record in whole.log()]


def test_best_weights_are_never_taken_for_those_of_another_epoch(images, tmp_path, base, monkeypatch):
    """Killed when best.pth is new, and result.json would still tell of the old one."""
    args, genuine = [images, '--epochs', 2, '--output', tmp_path / 'run'], checkpoint.write
    right, left = chain([0], repeat(1)), iter([1, 0])  # the second epoch is the best

    def write(path, content):
        if path.name == 'predictions.npz' and not next(left):
            raise KeyboardInterrupt
        genuine(path, content)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'write', write)
        patch.setattr(runs, 'APART', 0)
        patch.setattr(engine, 'hits', lambda *_: torch.tensor([next(right), 1]))
        with pytest.raises(KeyboardInterrupt):
            base(*args)
    again = base(*args)
    assert again.code == 0 and 'does not hold the weights of epoch 0' in again.err


def test_a_mask_of_infinities_is_no_broken_weight(tmp_path):
    class Masked(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer('mask', torch.tensor([0.0, -float('inf')]))

    torch.save(Masked().state_dict(), tmp_path / 'w.pth')
    checkpoint.load_weights(Masked(), tmp_path / 'w.pth')
    torch.save({**Masked().state_dict(), '1.bias': torch.full((2,), float('inf'))}, tmp_path / 'w.pth')
    with pytest.raises(SystemExit, match=r'1\.bias has values that are not finite'):
        checkpoint.load_weights(Masked(), tmp_path / 'w.pth')


def test_a_finished_run_whose_best_weights_are_gone(images, tmp_path, base):
    args = [images, '--epochs', 1, '--output', tmp_path / 'run']
    assert base(*args).code == 0
    (tmp_path / 'run' / 'best.pth').unlink()
    again = base(*args)
    assert again.code == 0 and 'of the best the weights are gone' in again.out


def test_a_folder_that_went_away_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r'cannot write .*x.json: .* MB are free there'):
        checkpoint.write(tmp_path / 'gone' / 'x.json', b'')


def test_a_student_that_predicts_through_its_method_says_which():
    layer = torch.nn.Linear(2, 2)
    weights = {'student.weight': layer.weight, 'distillers.simkd.projector.0.weight': layer.weight}
    with pytest.raises(ValueError, match=r'through its method: main_distill\.py --distiller simkd'):
        checkpoint.fit(layer, weights, 'some.pth')


def test_room_is_told_of_where_it_may_be_short(tmp_path):
    assert checkpoint.why(PermissionError(13, 'Permission denied'), tmp_path) == '[Errno 13] Permission denied'
    assert 'MB are free' in checkpoint.why(OSError(28, 'No space left'), tmp_path)


def test_weights_that_are_not_finite_are_refused():
    layer = torch.nn.Linear(2, 2)
    weights = {k: v.clone() for k, v in layer.state_dict().items()}
    weights['bias'][1] = float('nan')
    with pytest.raises(ValueError, match='bias has values that are not finite'):
        checkpoint.fit(layer, weights, 'some.pth')
