"""Prepared folders: what is in them, that they are finished, and what training and evaluation see of them."""
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same, start, write_images
from PIL import Image
from torch.utils.data import DataLoader

from scripts import prepare
from utils import data
from utils.crops import ResidentImages
from utils.data import CropLoader, Images, ResidentLoader, make_loader
from utils.order import TrainOrder
from utils.sources import Folder, Shards, load_source, read
from utils.views import CropView, plain_view

CPU = torch.device('cpu')


def arguments(root, *flags):
    return conftest.arguments(root, '-j', 0, '--image-size', 28, *flags)


@pytest.fixture
def folder(tmp_path):
    """Three classes of 48 x 40, with a tall image, a small one, another format, and two that cannot be read."""
    write_images(tmp_path / 'src' / 'train', 4, seed=0)
    write_images(tmp_path / 'src' / 'val', 2, seed=1)
    odd = tmp_path / 'src' / 'train' / 'bee'
    noise = np.random.default_rng(0).integers(0, 256, (90, 50, 3), np.uint8)
    Image.fromarray(noise).save(odd / 'tall.png')
    Image.fromarray(noise[:20, :30]).save(odd / 'small.jpg')
    (odd / 'text.jpg').write_text('this is not an image')
    (odd / 'truncated.jpg').write_bytes((odd / '0.jpg').read_bytes()[:400])
    return tmp_path / 'src'


@pytest.fixture
def prepared(folder, monkeypatch, capfd):
    def run(form='jpeg', target='dst', size=32):
        target = folder.parent / target
        monkeypatch.setattr(sys, 'argv', ['prepare.py', str(run.source), str(target), '--format', form, '--size',
                                          str(size), '--workers', '2', '--max-bad-images', str(run.bad)])
        prepare.main()
        run.err = capfd.readouterr().err
        return target
    run.source, run.bad = folder, 2
    return run


@pytest.mark.parametrize('form', ['jpeg', 'raw'])
def test_every_image_is_there_once_and_small(prepared, folder, form):
    target = prepared(form)
    manifest = json.loads((target / 'manifest.json').read_text())
    assert manifest['images'] == {'train': {'ant': 4, 'bee': 6, 'cat': 4}, 'val': {'ant': 2, 'bee': 2, 'cat': 2}}
    assert manifest['complete'] and manifest['size'] == 32 and manifest['source'] == str(folder)
    assert sorted(path.rsplit('/', 1)[1] for path in manifest['unreadable']) == ['text.jpg', 'truncated.jpg']
    assert prepared.err.count('cannot be read') == 2
    source = load_source(arguments(target), train=True)
    assert type(source) is (Shards if form == 'raw' else Folder) and source.classes == ['ant', 'bee', 'cat']
    assert source.targets == [0] * 4 + [1] * 6 + [2] * 4
    sizes = [tuple(source.load(i)[0].shape) for i in range(len(source))]
    tall, small = [next(i for i in range(14) if name in source.name(i)) for name in ('tall', 'small')]
    assert sizes[tall] == (3, 57, 32) and sizes[small] == (3, 20, 30)  # int(32 * 90 / 50); not enlarged
    assert {size for i, size in enumerate(sizes) if i not in (tall, small)} == {(3, 32, 38)}
    for i in range(14):
        assert source.load(i)[0].float().std() > 5
    assert not list(target.rglob('*.tmp'))


def test_raw_pixels_score_as_the_originals(prepared, folder):
    """A folder made for 256 and seen at 224, here an eighth of both: PIL's pixels of the classic evaluation."""
    args, raw = arguments(prepared('raw')), load_source(arguments(prepared('raw')), train=False)
    classic = load_source(arguments(folder), train=False)
    view = plain_view(args)
    assert len(raw) == len(classic) == 6
    for i in range(6):
        assert torch.equal(view(raw.load(i)[0], 0, i), view(classic.load(i)[0], 0, i))


@pytest.mark.parametrize('form', ['jpeg', 'raw'])
def test_another_call_goes_on(prepared, folder, form):
    target = prepared(form)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (target / 'train').rglob('*.*')}
    gone = sorted(before)[0]  # of a shard the index: it is written last
    gone.unlink()
    manifest = json.loads((target / 'manifest.json').read_text())
    (target / 'manifest.json').write_text(json.dumps(manifest | {'complete': False}))
    with pytest.raises(SystemExit, match='not complete'):
        load_source(arguments(target), train=True)
    prepared(form)
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}
    assert after[gone][1] == before[gone][1]
    assert {path for path in before if after[path][0] != before[path][0]} <= {gone, gone.with_suffix('.raw')}
    with pytest.raises(SystemExit, match='made otherwise'):
        prepared(form, size=30)


@pytest.mark.parametrize('form', ['jpeg', 'raw'])
def test_what_was_replaced_is_taken_anew(prepared, folder, form):
    """Also where the source lies elsewhere by now."""
    target, image = prepared(form), folder / 'train' / 'ant' / '0.jpg'
    Image.new('RGB', (48, 40), (250, 0, 0)).save(image)
    os.utime(image, (1e9, 1e9))  # older than the copy, as an archive leaves it
    prepared.source = folder.rename(folder.with_name('elsewhere'))
    source = load_source(arguments(prepared(form)), train=True)
    red, green, blue = source.load(0)[0].float().mean((1, 2)).tolist()
    assert red > 240 and green < 10 and blue < 10
    assert json.loads((target / 'manifest.json').read_text())['source'] == str(prepared.source)
    (prepared.source / 'train' / 'ant' / '0.jpg').write_text('broken by now')
    prepared.bad = 3
    assert len(load_source(arguments(prepared(form)), train=True)) == 13


def test_images_come_and_go_where_all_have_one_time(prepared, folder, monkeypatch):
    """As of an archive that was made so: what a shard of as many images holds, its times do not tell."""
    monkeypatch.setattr(prepare, 'SHARD', 4)
    (folder / 'train' / 'bee' / 'text.jpg').unlink()  # of 16, to have room for another one in the last shard
    for path in folder.rglob('*.*'):
        os.utime(path, (1e9, 1e9))
    prepared('raw')
    image, new = folder / 'train' / 'ant' / '0.jpg', folder / 'train' / 'ant' / '00.jpg'
    for change in (lambda: shutil.copy2(image, new), new.unlink):
        change()
        assert len(load_source(arguments(prepared('raw')), train=True)) == 14 + new.exists()


def test_a_class_that_is_there_no_more_is_not_kept(prepared, folder):
    target = prepared()
    for split in ('train', 'val'):
        (folder / split / 'bee').rename(folder / split / 'bumblebee')
    with pytest.raises(SystemExit, match='holds a class bee, which is not there any more'):
        prepared()
    assert not json.loads((target / 'manifest.json').read_text())['complete']


@pytest.mark.parametrize('form', ['jpeg', 'raw'])
def test_training_images_that_are_lost_are_few(prepared, folder, form):
    prepared.bad = 1
    with pytest.raises(SystemExit, match='2 training images cannot be read, more than --max-bad-images 1 allows'):
        prepared(form)
    with pytest.raises(SystemExit, match='not complete'):
        load_source(arguments(folder.parent / 'dst'), train=True)


def test_a_disk_that_fails_is_no_broken_image():
    assert prepare.of_the_image(OSError('image file is truncated')) == 'image file is truncated'
    for error in OSError(5, 'Input/output error'), PermissionError(13, 'Permission denied'):
        with pytest.raises(OSError, match=error.strerror):
            prepare.of_the_image(error)


def test_a_copy_that_is_too_small_for_an_evaluation_is_told_of(prepared, capfd):
    target = prepared(size=32)
    load_source(arguments(target), train=False)
    assert 'prepared with' not in capfd.readouterr().out
    load_source(conftest.arguments(target, '--image-size', 32), train=False)
    assert '--size 32, and an evaluation resizes to 37: images are enlarged' in capfd.readouterr().out
    load_source(conftest.arguments(target, '--image-size', 16), train=False)
    assert '--size 32, and an evaluation resizes to 18: images are resized twice' in capfd.readouterr().out


def test_killed_and_started_again(folder):
    for number in range(300):
        os.link(folder / 'train' / 'ant' / '0.jpg', folder / 'train' / 'ant' / f'more{number}.jpg')
    target = folder.parent / 'dst'
    command = [sys.executable, ROOT / 'scripts' / 'prepare.py', folder, target, '--size', 36, '--workers', 1,
               '--max-bad-images', 2]
    process = start(*command)
    while process.poll() is None and len(list(target.rglob('*.jpg'))) < 5:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not json.loads((target / 'manifest.json').read_text())['complete']
    for path in target.rglob('*.jpg'):
        assert min(read(path).size) == 36
    again = start(*command)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and '320 images' in out
    assert json.loads((target / 'manifest.json').read_text())['images']['train']['ant'] == 304


@pytest.mark.parametrize('form', ['jpeg', 'raw'])
def test_images_to_evaluate_are_all_there_or_it_is_not_complete(prepared, folder, form):
    image = folder / 'val' / 'cat' / '1.jpg'
    whole = image.read_bytes()
    image.write_bytes(whole[:300])
    with pytest.raises(SystemExit, match='of the images to evaluate 1 cannot be read'):
        prepared(form)
    with pytest.raises(SystemExit, match='not complete'):
        load_source(arguments(folder.parent / 'dst'), train=True)
    image.write_bytes(whole)
    assert len(load_source(arguments(prepared(form)), train=False)) == 6


@pytest.mark.parametrize('form', ['jpeg', 'raw'])
def test_a_class_without_images_is_named(prepared, folder, form):
    for path in (folder / 'train' / 'bee').iterdir():
        path.write_bytes(b'')
    with pytest.raises(SystemExit, match=r'not one image of .*train/bee'):
        prepared(form)


def test_a_damaged_shard_is_found_and_made_anew(prepared):
    target = prepared('raw')
    shard = target / 'val' / '00000.raw'
    whole = shard.read_bytes()
    shard.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(SystemExit, match=r'00000\.raw is damaged'):
        load_source(arguments(target), train=False)
    prepared('raw')
    assert shard.read_bytes() == whole and len(load_source(arguments(target), train=False)) == 6


def test_what_is_torn_is_made_anew(prepared, folder):
    target = prepared('raw')
    for file in (target / 'manifest.json', target / 'train' / '00000.json'):
        content = file.read_text()
        file.write_text(content[:40])
        with pytest.raises(SystemExit, match=rf'{file.name} is damaged: start scripts/prepare.py again'):
            load_source(arguments(target), train=True)
        prepared('raw')
        assert file.read_text() == content


def test_a_torn_jpeg_is_made_anew(prepared, folder):
    """As after a power cut, which may leave a name without a content."""
    target = prepared()
    whole = {path: path.read_bytes() for path in (target / 'train').rglob('*.jpg')}
    for number, path in enumerate(sorted(whole)[:3]):
        path.write_bytes([b'', whole[path][:300], whole[path][:1]][number])
    prepared()
    assert {path: path.read_bytes() for path in (target / 'train').rglob('*.jpg')} == whole


def test_what_cannot_be_a_jpeg_is_named(prepared, folder):
    bee = folder / 'train' / 'bee'
    (bee / '0.jpg').rename(bee / f'{"x" * (os.pathconf(bee, "PC_NAME_MAX") - 4)}.jpg')  # the longest that can be
    assert len([*(prepared() / 'train' / 'bee').iterdir()]) == 6
    Image.new('RGB', (66000, 20)).save(bee / 'wide.png')
    with pytest.raises(SystemExit, match=r'wide.png cannot be stored as a JPEG \(.*--format raw'):
        prepared(target='again')
    assert json.loads((prepared('raw', 'raw') / 'manifest.json').read_text())['images']['train']['bee'] == 7


def test_a_copy_that_got_no_further_than_its_manifest_goes_on(prepared, folder):
    (folder.parent / 'dst').mkdir()
    (folder.parent / 'dst' / 'manifest.tmp').write_text('{"by"')
    assert len(load_source(arguments(prepared('raw')), train=False)) == 6


def test_names_that_would_be_one_are_told_at_once(prepared, folder):
    Image.new('RGB', (40, 40)).save(folder / 'train' / 'bee' / 'tall.png.jpg')
    with pytest.raises(SystemExit, match=r'would be bee/tall.png.jpg in the copy'):
        prepared('jpeg')


def test_other_files_in_a_copy_do_no_harm(prepared):
    (prepared('jpeg') / 'train' / 'ant' / '.DS_Store').touch()
    prepared('jpeg')


def test_a_killed_process_ends_it(folder):
    for number in range(400):
        os.link(folder / 'train' / 'ant' / '0.jpg', folder / 'train' / 'ant' / f'more{number}.jpg')
    process = start(sys.executable, ROOT / 'scripts' / 'prepare.py', folder, folder.parent / 'dst', '--size', 36,
                    '--workers', 1)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    while not list((folder.parent / 'dst').rglob('*.jpg')):
        time.sleep(0.01)
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and 'a process was killed' in out and 'Traceback' not in out


def test_nothing_usable_is_an_error(prepared, folder):
    for path in folder.rglob('*.*g'):
        path.write_bytes(b'')
    with pytest.raises(SystemExit, match='not one image'):
        prepared('jpeg')
    (folder.parent / 'other').mkdir()
    (folder.parent / 'other' / 'file').touch()
    with pytest.raises(SystemExit, match='holds something else'):
        prepared('jpeg', 'other')


def test_a_copy_inside_its_source_would_be_a_class(prepared, folder, capfd):
    with pytest.raises(SystemExit):
        prepared('jpeg', folder / 'train' / 'copy')
    assert 'where it would be one of the classes' in capfd.readouterr().err
    assert not (folder / 'train' / 'copy').exists()


def test_nothing_is_made_of_a_folder_that_cannot_be_read(prepared, folder):
    (folder / 'train' / 'empty').mkdir()
    with pytest.raises(SystemExit, match='empty has no images'):
        prepared('jpeg')
    assert not (folder.parent / 'dst').exists()


# On the device

def loaders(source, seed=5, flags=()):
    args, view = arguments('x'), CropView(arguments('x', *flags), seed)
    order = TrainOrder(len(source), 4, 1, seed, 0, 1)
    return (make_loader(Images(source, view), order, args),
            CropLoader(Images(source, view), order, ResidentImages(source, CPU, 2)))


def test_images_that_are_no_jpegs_have_the_same_pixels_on_either_way(tmp_path):
    for i in range(6):
        path = tmp_path / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    for source in Folder(tmp_path), load_source(conftest.arguments('--dummy', '--dummy-images', 6), train=True):
        a, b = (list(data.TrainData(loader).updates(0, 0)) for loader in loaders(source))
        for (_, (one, *_)), (_, (other, *_)) in zip(a, b, strict=True):
            assert torch.equal(one.images, other.images)


@pytest.mark.parametrize('flags', [[], ['--crop', 'random', '--flip', 0.9], ['--crop', 'centre', '--flip', 0]])
def test_batches_are_those_of_loader_processes(folder, flags):
    """Also where images cannot be read: the same stand-ins, marked alike."""
    for source in [Folder(folder / 'train')] + [Folder(folder / 'train', by_pil=True)] * (not flags):
        a, b = ([batch for _, micro in data.TrainData(loader).updates(2, 4) for batch in micro]
                for loader in loaders(source, flags=flags))
        assert len(a) == len(b) == 3 and any((batch.bad >= 0).any() for batch in a)
        for x, y in zip(a, b):
            for name in ('target', 'index', 'bad', 'view'):
                assert torch.equal(getattr(x, name), getattr(y, name)), name
            assert (x.images.int() - y.images.int()).abs().max() <= source.by_pil  # those on the device are torch's


def test_products_of_matrices_resize_as_torch_and_pil_do(folder):
    source = Folder(folder / 'train')
    held, view = ResidentImages(source, CPU, 1), CropView(arguments('x', '--image-size', 31), 3)
    numbers = torch.arange(len(source)).repeat(6)
    boxes = torch.cat([view.boxes(epoch, range(len(source)), held.sizes.tolist()) for epoch in range(6)])
    boxes[:3] = torch.tensor([[0, 0, 40, 48, 0], [3, 5, 33, 1, 1], [39, 0, 1, 48, 1]])  # whole, and the thinnest
    ours, theirs = held.resample(numbers, boxes, 31).int(), held.crops(numbers, boxes, 31).int()
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1
    assert (ours != theirs).float().mean() < 0.05
    by_pil = Image.fromarray(held.pixels[:40 * 48].view(40, 48, 3).numpy()).resize((31, 31), Image.Resampling.BILINEAR)
    assert (ours[0].permute(1, 2, 0) - torch.tensor(np.asarray(by_pil)).int()).abs().max() <= 1


def test_the_choice_is_said(prepared, folder, capfd, monkeypatch):
    def chosen(root, *flags, device=CPU):
        train, valid, _ = data.load_data(arguments(root, '-b', 4, *flags), 1, device)
        assert not isinstance(valid, ResidentLoader)
        return type(train.loader), capfd.readouterr().out

    raw = prepared('raw')
    assert chosen(folder) == (DataLoader, 'data: images from 0 loader processes per rank (images are '
                                       'not prepared with --format raw)\n')
    assert chosen(raw)[0] is DataLoader
    for root in (folder, raw):
        kind, said = chosen(root, '--data-backend', 'device')
        assert kind is CropLoader and 'images on the device' in said
    source, gpu = load_source(arguments(raw), train=True), torch.device('cuda')
    for free, expected in ((10**9, ''), (10**4, '0.0 GB of images, 0.0 GB free on the device')):
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device, free=free: (free, 10**9))
        assert data.why_not(source, gpu) == expected


def test_training_on_a_prepared_folder(base, prepared, tmp_path):
    raw = prepared('raw')
    runs = {name: base(raw, '--epochs', 1, '--output', tmp_path / name, '-b', 4, *flags)
            for name, flags in {'loader': [], 'device': ['--data-backend', 'device']}.items()}
    for name, run in runs.items():
        assert run.code == 0, name + run.err
    assert_same(runs['loader'].weights(), runs['device'].weights())
    assert base(raw, '--data-backend', 'device', '--auto-augment', 'randaugment').code == 2
