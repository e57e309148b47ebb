"""The command line: what it takes, what it refuses and how."""
from types import SimpleNamespace

import pytest
import torch
from conftest import QUICK, arguments, write_images

from models import create_model
from utils.args import NEUTRAL, base_parser


def test_flags_of_pytorch_examples_and_mgd_keep_their_meaning():
    args = arguments('/data', '-a', 'resnet50', '-j', '8', '--epochs', '100', '--start-epoch', '3', '-b', '512',
                 '--learning-rate', '0.2', '--momentum', '0.8', '--wd', '5e-4', '-p', '50', '--resume', 'x.pth', '-e',
                 '--pretrained', '--world-size', '2', '--rank', '1', '--dist-url', 'tcp://h:1',
                 '--dist-backend', 'gloo', '--seed', '7', '--gpu', '0', '--multiprocessing-distributed',
                 '--lr-drop-ratio', '0.2', '--lr-drop-epochs', '31', '61', '--warmup', '1', '--warmup-epochs', '5',
                 '--sync-bn', '0', '--teacher-resume', 't.pth', '--student-resume', 's.pth')
    assert (args.lr, args.weight_decay, args.batch_size, args.workers) == (0.2, 5e-4, 512, 8)
    assert args.gpu is None and arguments('/data', '--gpu', '0').gpu == 0  # each of several processes has its own
    assert args.warmup is True and args.sync_bn is False and args.lr_drop_epochs == [31, 61]
    assert args.teacher_arch == 'resnet152' and arguments('/data').teacher_arch == 'resnet50'
    assert arguments('/data', '--weight-decay', '1').weight_decay == 1 and arguments('/data', '--lr', '1').lr == 1
    assert arguments('--dummy').data is None and arguments('--dummy', '--nesterov').nesterov is True
    defaults = arguments('/data')
    assert (defaults.epochs, defaults.batch_size, defaults.lr, defaults.momentum, defaults.weight_decay,
            defaults.arch, defaults.print_freq) == (90, 256, 0.1, 0.9, 1e-4, 'resnet18', 10)


def test_argument_files(tmp_path):
    (tmp_path / 'recipe').write_text('# MGD on CUB\n--lr 0.01 --nesterov   # as published\n--lr-drop-epochs 31 61 81\n')
    args = arguments('/data', f'@{tmp_path / "recipe"}', '--lr', '0.02')
    assert args.nesterov and args.lr == 0.02 and args.lr_drop_epochs == [31, 61, 81]


def test_the_rate_drops_every_30_epochs_as_in_pytorch_examples():
    assert [arguments('--dummy', '--epochs', n).lr_drop_epochs for n in (1, 90, 120, 121)] == [
        [30, 60, 90], [30, 60, 90], [30, 60, 90], [30, 60, 90, 120]]


def test_each_rank_takes_a_gpu_of_its_own(base, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    run = base('/data', '--gpu', 1, quick=False)
    assert run.code == 2 and '--gpu 1 would be that of every process' in run.err.splitlines()[-1]


@pytest.mark.parametrize('momentum, delta', [(0.95, 0.075), (0.05, 0.075)])
def test_dot_has_two_momenta_that_are_some(distill, momentum, delta):
    run = distill('/data', '--optimizer', 'dot', '--momentum', momentum, '--dot-delta', delta, quick=False)
    assert run.code == 2 and f'--momentum {momentum} less and more --dot-delta {delta}' in run.err.splitlines()[-1]


@pytest.mark.parametrize('url', ['localhost:1234', 'tcp://localhost', 'tcp://localhost:abc', 'env://'])
def test_a_place_to_meet_that_is_none_is_said(base, url, monkeypatch):
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    run = base('--dummy', '--world-size', 2, '--rank', 0, '--dist-url', url, '--no-accel', quick=False)
    assert run.code == 1 and run.err.count('\n') == 1
    assert run.err.startswith(f'error: --dist-url {url} is no place to meet')


def test_a_quote_that_does_not_end_is_a_wrong_flag(tmp_path, base):
    (tmp_path / 'recipe').write_text("--output it's")
    run = base(f'@{tmp_path / "recipe"}')
    assert run.code == 2 and 'No closing quotation' in run.err


def test_help_is_grouped_tells_defaults_and_every_flag_has_a_line(capsys):
    with pytest.raises(SystemExit) as stop:
        arguments('--help')
    text = capsys.readouterr().out
    assert stop.value.code == 0
    groups = ('data', 'augmentation', 'network', 'optimization', 'speed', 'run', 'launch')
    assert all(f'\n{group}:' in text for group in groups)
    text = ' '.join(text.split())
    assert '(default: 256)' in text and '(default: resnet18)' in text and 'None' not in text
    assert all(action.help for action in base_parser('')._actions)
    assert set(vars(arguments('--dummy'))) >= NEUTRAL - {'cache_dir', 'skip_first_evaluation'}  # main_distill.py's


@pytest.mark.parametrize('flags, complaint', [
    ([], 'DIR is missing'),
    ([''], 'DIR is empty'),
    (['/data', '--student-resume', ''], '--student-resume is empty'),
    (['/data', '--dummy'], '--dummy takes no DIR'),
    (['/data', '--batch-size', '0'], 'argument -b/--batch-size: 0 is not in [1, inf)'),
    (['/data', '--lr', 'fast'], "invalid float value: 'fast'"),
    (['/data', '--lr', '-1'], '-1 is not in [0, inf)'),
    (['/data', '--lr', '1e400'], '1e400 is not in [0, inf)'),
    (['/data', '--teacher-mean', '123', '116', '103'], '123 is not in [0, 1]'),
    (['/data', '--output', '/data/'], '--output is DIR'),
    (['/data', '--rank', '1'], '--rank 1 needs a --world-size'),
    (['/data', '--world-size', '2'], '--world-size 2 needs --rank NODE and --dist-url tcp://HOST:PORT'),
    (['/data', '--gpu', '0', '--no-accel'], '--gpu 0 is asked for, but so is --no-accel'),
    (['/data', '--procs-per-node', '2'], '--procs-per-node needs --multiprocessing-distributed'),
    (['/data', '--label-smoothing', 'nan'], 'nan is not in [0, 1]'),
    (['/data', '--amp', 'fp8'], "invalid choice: 'fp8'"),
    (['/data', '--sync-bn', 'yes'], "'yes' is not 0 or 1"),
    (['/data', '--nesterov', '--optimizer', 'adamw'], '--nesterov needs --optimizer sgd'),
    (['/data', '--momentum', '0.8', '--optimizer', 'adamw'], 'nothing reads --momentum (needs --optimizer sgd or dot)'),
    (['/data', '--warmup-epochs', '3', '--warmup-by', 'iteration'],
     'nothing reads --warmup-epochs (needs --warmup), --warmup-by (needs --warmup)'),
    (['/data', '--dot-delta', '0.1'], 'nothing reads --dot-delta (needs --optimizer dot)'),
    (['/data', '--crop-area', '0.5', '--crop', 'random'], 'nothing reads --crop-area (needs --crop resized of'),
    (['/data', '--crop', 'random', '--dataset', 'cifar10'], '--crop and --val-resize-size are for image folders'),
    (['/data', '--mean', '0.5', '0.5', '0.5'], '--mean and --std belong together'),
    (['/data', '--data-backend', 'device', '--random-erasing', '1'], 'device crops and flips images, no more'),
    (['/data', '--val-resize-size', '223'], '--val-resize-size 223 is less than --image-size 224'),
    (['/data', '--compile', 'max'], "'max' is not 0, 1, default, reduce-overhead or max-autotune"),
    (['/data', '--ema', '1'], '--ema 1 is an average that never'),
    (['/data', '--overwrite', '--resume', 'x'], 'choose one'),
    (['/data', '--teacher-resume', 'x'], 'main_distill.py trains with a teacher'),
    (['/data', '--learning-rat0', '1'], 'unrecognized arguments'),
    (['/data', '--start-epoch', '90'], 'behind the last epoch'),
    (['/data', '--multiprocessing-distributed', '--dist-url', 'env://'], "--dist-url env:// is torchrun's"),
    (['/data', '--dist-timeout', '1e7'], '1e7 is not in (0, 2000000.0'),
    (['/data', '--lr-drop-ratio', '10'], '10 is not in (0, 1'),
    (['@/nowhere'], 'No such file'),
])
def test_wrong_flags(flags, complaint, base):
    run = base(*flags, quick=False)
    assert run.code == 2 and complaint in run.err.splitlines()[-1]


def one_line(run):
    """Refused with one line, without a traceback."""
    lines = [line for line in run.err.strip().splitlines() if not line.startswith('note:')]
    assert run.code == 1 and len(lines) == 1 and lines[0].startswith('error: '), run.err
    return lines[0]


def test_wrong_data(base, tmp_path, images):
    assert f'{tmp_path / "none"} does not exist' in one_line(base(tmp_path / 'none', '--output', tmp_path / 'o'))
    assert '0.jpg is a file' in one_line(base(images / 'train' / 'ant' / '0.jpg', '--output', tmp_path / 'o'))
    assert 'has no valid/ or val/' in one_line(base(tmp_path, '--output', tmp_path / 'o'))
    (tmp_path / 'cifar-100-python').mkdir()
    assert 'it holds CIFAR: --dataset cifar100' in one_line(base(tmp_path, '--output', tmp_path / 'o'))
    (tmp_path / 'val').mkdir()
    assert 'val has no class folders' in one_line(base(tmp_path, '--output', tmp_path / 'o'))
    (tmp_path / 'val' / 'ant').mkdir()
    assert 'val/ant has no images' in one_line(base(tmp_path, '--output', tmp_path / 'o'))
    other = tmp_path / 'other'
    write_images(other / 'val', 1, 0, classes=('ant', 'bee'))
    assert 'other has no train/' in one_line(base(other, '--output', tmp_path / 'o'))
    write_images(other / 'train', 1, 0, classes=('ant', 'dog'))
    line = one_line(base(other, '--output', tmp_path / 'o'))
    assert 'dog is only in train' in line and 'bee is only in valid' in line
    line = one_line(base(images, '--num-classes', 2, '--output', tmp_path / 'o'))
    assert '--num-classes 2, but the data has 3' in line
    assert 'cannot be downloaded' in one_line(base(tmp_path, '--dataset', 'cifar100', '-e'))
    assert not (tmp_path / 'o').exists()


def doubled(num_classes):
    return create_model('resnet8', 2 * num_classes)


def test_wrong_networks_and_weights(base, tmp_path, images):
    out = ['--output', tmp_path / 'o']
    line = one_line(base(images, '-a', 'resnet5O', *out))
    assert "unknown model 'resnet5O'" in line and 'resnet50' in line
    assert 'no weights for' in one_line(base(images, '-a', 'mobilenet_v1', '--pretrained', *out))
    assert 'does not exist' in one_line(base(images, '--student-resume', tmp_path / 'none.pth', *out))
    torch.save(create_model('resnet8', 5).state_dict(), tmp_path / 'five.pth')
    line = one_line(base(images, '--student-resume', tmp_path / 'five.pth', *out))
    assert 'fc.weight is [5, 64] instead of [3, 64]' in line and '(it has 5 outputs: --num-classes 5)' in line
    torch.save(create_model('resnet8', 2).state_dict(), tmp_path / 'two.pth')
    assert one_line(base(images, '--student-resume', tmp_path / 'two.pth', *out)).endswith('(it has 2 outputs)')
    (tmp_path / 'junk.pth').write_text('junk')
    assert 'is damaged' in one_line(base(images, '--student-resume', tmp_path / 'junk.pth', *out))
    assert 'is damaged' in one_line(base(images, '--resume', tmp_path / 'junk.pth', *out))
    assert 'weights only' in one_line(base(images, '--resume', tmp_path / 'five.pth', *out))
    assert 'is a folder' in one_line(base(images, '--student-resume', tmp_path, *out))
    line = one_line(base(images, '-a', 'vit_b_32', *out))
    assert 'vit_b_32 does not take images of 32 pixels (--image-size 32)' in line
    line = one_line(base(images, '-a', 'test_cli:doubled', *out))
    assert '[1, 6] of an image, instead of logits of 3 classes' in line


def test_ranks_are_started_once(base, images, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    run = base(images, '--multiprocessing-distributed')
    assert run.code == 2 and 'torchrun has started a process for each rank' in run.err.splitlines()[-1]


def test_a_device_that_is_not_there(base, images, tmp_path):
    out = ['--output', tmp_path / 'o']
    assert '--sync-bn needs GPUs' in one_line(base(images, '--sync-bn', 1, *out))


def test_fewer_images_than_ranks(base, images, tmp_path, monkeypatch):
    monkeypatch.setattr('utils.data.distributed', SimpleNamespace(world=lambda: 9, rank=lambda: 0, nodes=lambda: 1))
    assert 'a batch of 8 is smaller than the number of ranks, 9' in one_line(base(images, '--output', tmp_path / 'o'))


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_gpu_that_is_not_there(base, images):
    flags = [flag for flag in QUICK if flag != '--no-accel']
    assert '--gpu 0 is asked for, but 0 GPUs are visible' in one_line(base(*flags, images, '--gpu', 0, quick=False))


def test_output_that_cannot_be_made(base, images, tmp_path):
    (tmp_path / 'file').write_text('')
    assert 'cannot write to --output' in one_line(base(images, '--output', tmp_path / 'file' / 'run'))
    run = base(images, '--output', tmp_path / 'file', '-e')
    assert 'top1' in run.out and run.code == 1 and run.err.startswith('error: cannot write to --output')
