"""Order, randomness, views, unreadable images."""
import pickle
import re
import shutil
import time
from collections import Counter
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import assert_same, at_call, write_images
from PIL import Image
from torchvision import datasets, transforms
from torchvision.transforms import v2

from utils import data, signals
from utils.crops import as_tensor
from utils.data import Batch, Images, Prepare
from utils.order import EvalOrder, TrainOrder
from utils.randomness import generator, seeded
from utils.resident import Resident
from utils.slots import Slots
from utils.sources import Cifar, Dummy, Folder, load_source, read, read_jpeg
from utils.views import STATISTICS, CenterView, CropView, ShiftView, plain_view, random_extras, shifts


def arguments(*flags):
    return conftest.arguments('--dummy', *flags)


def epoch_of(order, epoch=0, start=0):
    order.at(epoch, start)
    return [[index for _, index in batch] for batch in order]


@pytest.mark.parametrize('world', [1, 2, 3, 5])
@pytest.mark.parametrize('batch, accum', [(8, 1), (7, 3), (39, 1), (5, 2), (6, 1)])
def test_every_world_sees_the_same_samples_in_every_update(world, batch, accum):
    length = 39
    alone = TrainOrder(length, batch, accum, seed=1, rank=0, world=1)
    whole = epoch_of(alone)
    seen = Counter()
    ranks = [TrainOrder(length, batch, accum, seed=1, rank=r, world=world) for r in range(world)]
    for number, shares in enumerate(zip(*[epoch_of(rank) for rank in ranks], strict=True)):
        (_, micro), position = list(alone.plan())[number // accum], number % accum
        weights = [rank.weights(micro)[position] for rank in ranks]
        real = [share for share, weight in zip(shares, weights) if weight]
        assert sorted(i for share in real for i in share) == sorted(whole[number])
        seen.update(i for share in real for i in share)
        copies = Counter(i for share in shares for i in share)  # of which --sync-bn takes statistics
        assert max(copies.values()) - min(copies.values()) <= 1 and copies.keys() == {*whole[number]}
        # weight * mean over the share, averaged over ranks, is this micro-batch's part of the update's mean
        size = micro[-1][1] - micro[0][0]
        for share, weight in zip(shares, weights):
            assert weight == pytest.approx((len(share) if weight else 0) * world / size)
    assert seen == Counter(range(length))


def test_order_depends_on_seed_and_epoch_and_goes_on_from_any_sample():
    order = TrainOrder(39, 8, 1, seed=1, rank=0, world=1)
    flat = [i for batch in epoch_of(order, 2) for i in batch]
    assert flat == [i for batch in epoch_of(order, 2) for i in batch]
    assert flat != [i for batch in epoch_of(order, 3) for i in batch]
    assert flat != [i for batch in epoch_of(TrainOrder(39, 8, 1, 2, 0, 1), 2) for i in batch]
    assert flat[16:] == [i for batch in epoch_of(order, 2, start=16) for i in batch]
    assert len(order) == 3 and len(list(order.plan())) == 3


@pytest.mark.parametrize('world', [1, 2, 3, 20])
def test_evaluation_covers_every_sample_once(world):
    orders = [EvalOrder(range(15), 4, rank, world) for rank in range(world)]
    assert Counter(i for order in orders for batch in order for _, i in batch) == Counter(range(15))


def test_augmentation_is_a_function_of_seed_epoch_and_index(images):
    source = Folder(images / 'train')
    args = arguments('--image-size', '32', '--auto-augment', 'trivialaugment', '--random-erasing', '0.5')
    dataset = Images(source, CropView(args, seed=5))
    before = torch.get_rng_state()
    first = [dataset[(1, i)].images for i in range(6)]
    assert torch.equal(before, torch.get_rng_state())  # the process's own generators are left alone
    torch.rand(100)
    assert all(torch.equal(dataset[(1, i)].images, first[i]) for i in reversed(range(6)))
    assert not all(torch.equal(dataset[(2, i)].images, first[i]) for i in range(6))
    other = Images(source, CropView(args, seed=6))
    assert not all(torch.equal(other[(1, i)].images, first[i]) for i in range(6))


@pytest.mark.parametrize('workers', [0, 3])
def test_workers_change_nothing(images, workers):
    args = arguments('--image-size', '32', '-j', str(workers))
    loader = data.make_loader(Images(Folder(images / 'train'), CropView(args, 5)), TrainOrder(39, 8, 1, 5, 0, 1), args)
    train = data.TrainData(loader)
    got = [batch for _, batches in train.updates(1, 8) for batch in batches]
    order = TrainOrder(39, 8, 1, 5, 0, 1)
    for batch, indices in zip(got, epoch_of(order, 1, 8), strict=True):
        assert batch.index.tolist() == indices
        assert torch.equal(batch.images, torch.stack([train.images[(1, i)].images for i in indices]))


@pytest.mark.parametrize('workers, accum', [(1, 1), (1, 3), (2, 3), (3, 2)])
def test_images_stay_while_an_update_holds_them(images, workers, accum):
    """However far ahead the loader processes are."""
    def updates(count):
        args = arguments('--image-size', '32', '-j', str(count))
        order = TrainOrder(39, 2, accum, 5, 0, 1)
        return data.TrainData(data.make_loader(Images(Folder(images / 'train'), CropView(args, 5)), order, args))
    ours, plain = updates(workers), updates(0)
    for epoch in 0, 1:
        for (_, held), (_, wanted) in zip(ours.updates(epoch, 0), plain.updates(epoch, 0), strict=True):
            time.sleep(0.05)
            assert all(torch.equal(a.images, b.images) for a, b in zip(held, wanted, strict=True))


def test_batches_take_turns_in_shared_memory():
    slots, images = Slots(2), [torch.full((5, 4, 3), i, dtype=torch.uint8) for i in range(9)]
    first, second, third = (slots(images[i:i + 3]) for i in (0, 3, 6))
    assert first.data_ptr() == third.data_ptr() != second.data_ptr() and first.is_shared()
    assert second.unique().tolist() == [3, 4, 5] and first.unique().tolist() == third.unique().tolist() == [6, 7, 8]
    assert slots(images[:1]).data_ptr() == second.data_ptr()  # a smaller one, at the end of an epoch
    larger, floats = slots(images[:4]), slots([image.float() for image in images[:3]])
    assert larger.shape == (4, 5, 4, 3) and floats.dtype == torch.float32


def test_a_sample_of_the_training_images_is_split_over_the_ranks_and_changes_with_the_epoch(images):
    args, source = arguments('-j', '0'), Folder(images / 'train')

    def sample(rank, epoch):
        plain = data.make_loader(Images(source, CenterView(32, 37)), EvalOrder([], 4, rank, 2), args)
        loader = data.make_loader(Images(source, CenterView(32, 37)), TrainOrder(39, 8, 1, 5, rank, 2), args)
        train = data.TrainData(loader, plain)
        return [i for batch in train.sample(epoch, 21) for i in batch.index.tolist()]
    both = sample(0, 1) + sample(1, 1)
    assert len(both) == len(set(both)) == 21 and set(both) != set(sample(0, 2) + sample(1, 2))


def test_pixels_are_those_of_the_classic_stack(images):
    """Our views and Prepare against ImageFolder, ToTensor and Normalize as pytorch/examples has them."""
    normalize = transforms.Normalize(*STATISTICS['imagefolder'])
    classic = datasets.ImageFolder(images / 'valid', transforms.Compose([
        transforms.Resize(37), transforms.CenterCrop(32), transforms.ToTensor(), normalize]))
    ours = Images(Folder(images / 'valid', by_pil=True), CenterView(32, 37))
    prepare = Prepare(arguments(), torch.device('cpu'))
    assert [classic.samples[i] == ours.source.samples[i] for i in range(15)] and len(classic) == len(ours) == 15
    for i in range(15):
        sample = ours[(0, i)]
        batch = prepare(Batch(sample.images[None], torch.tensor([0]), torch.tensor([0]), torch.tensor([-1])))
        assert torch.equal(batch.images[0], classic[i][0]) and sample.target == classic[i][1]
    crop = transforms.Compose([transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip()])
    view, image = CropView(arguments('--image-size', '32'), seed=9), ours.source.load(3)[0]
    with seeded(9, 'view', 4, 7):
        expected = transforms.functional.pil_to_tensor(crop(image))
    assert torch.equal(view(image, 4, 7), expected)


@pytest.mark.parametrize('padding', ['zeros', 'reflect'])
def test_cifar_crop_is_the_table_row(padding):
    image = torch.arange(3 * 32 * 32).reshape(3, 32, 32).to(torch.uint8)
    pil = transforms.functional.to_pil_image(image)
    view = ShiftView(arguments('--dataset', 'cifar10', '--crop-padding', padding), seed=1, length=50)
    padded = np.pad(image.numpy(), [(0, 0), (4, 4), (4, 4)], {'zeros': 'constant'}.get(padding, padding))
    source = Dummy(1, 10, 32)
    source.pixels = np.array(pil)[None]
    resident = Resident(source, torch.device('cpu'), padding)
    rows = set()
    for index in range(50):
        row, column, flip = shifts(1, 2, 50)[index].tolist()
        expected = padded[:, row:row + 32, column:column + 32]
        expected = expected[:, :, ::-1] if flip else expected
        assert np.array_equal(view(pil, 2, index).numpy(), expected)
        held = resident.views(torch.tensor([0]), view.number(2, index).view(1))
        assert np.array_equal(held[0].numpy(), expected)
        rows.add((row, column, flip))
    assert len(rows) > 30 and all(0 <= r <= 8 and 0 <= c <= 8 for r, c, _ in rows)


def test_official_cifar_files(tmp_path, monkeypatch):
    folder, calls = tmp_path / 'cifar-100-python', []

    def download(self):
        calls.append('download')
        folder.mkdir()
        for name, n in (('train', 20), ('test', 10)):
            pixels = np.random.default_rng(n).integers(0, 256, (n, 3072), np.uint8)
            content = {'data': pixels, 'fine_labels': [i % 100 for i in range(n)]}
            (folder / name).write_bytes(pickle.dumps(content))
        (folder / 'meta').write_bytes(pickle.dumps({'fine_label_names': [f'class {i:02}' for i in range(100)]}))

    monkeypatch.setattr(datasets.CIFAR100, 'download', download)
    monkeypatch.setattr(datasets.CIFAR100, '_check_integrity', lambda self: calls.append('check') or folder.exists())
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda *a: True)
    Cifar('cifar100', str(tmp_path), train=True)
    assert calls == ['check', 'download', 'check']
    source = Cifar('cifar100', str(tmp_path), train=True)
    assert calls[3:] == ['check']
    image, target = source.load(7)
    expected = np.random.default_rng(20).integers(0, 256, (20, 3072), np.uint8)[7].reshape(3, 32, 32)
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1), expected) and target == 7
    assert len(source.classes) == 100 and source.name(7) == 'cifar100 train image 7'
    valid = load_source(conftest.arguments(tmp_path, '--dataset', 'cifar100'), train=False)
    expected = np.random.default_rng(10).integers(0, 256, (10, 3072), np.uint8)[7].reshape(3, 32, 32)
    assert len(valid) == 10 and valid.name(7) == 'cifar100 test image 7'
    assert np.array_equal(np.asarray(valid.load(7)[0]).transpose(2, 0, 1), expected)


def test_what_is_seen_of_an_image_is_what_was_asked_for():
    def boxes(*flags, height=60, width=90):
        view = CropView(arguments('--image-size', 32, *flags), seed=1)
        return torch.tensor([view.box(2, index, height, width) for index in range(300)])
    share = boxes('--crop-area', 0.5)[:, 2:4].prod(1) / (60 * 90)
    assert 0.49 < share.min() < 0.55 and share.max() > 0.85
    top, left, height, width, _ = boxes('--crop', 'random').unbind(1)
    assert {*height.tolist(), *width.tolist()} == {52} == {round(60 * 32 / 37)}  # as much as an evaluation sees
    assert {*top.tolist()} == {*range(9)} and {*left.tolist()} == {*range(39)}
    middle = boxes('--crop', 'centre', '--val-resize-size', 40)
    all_of_it = boxes('--crop', 'random', '--val-resize-size', 32, width=60)
    assert {*map(tuple, middle[:, :4].tolist())} == {(6, 21, 48, 48)}
    assert {*map(tuple, all_of_it[:, :4].tolist())} == {(0, 0, 60, 60)}
    for flip, low, high in ((0, 0, 0), (0.5, 0.4, 0.6), (0.9, 0.84, 0.96), (1, 1, 1)):
        for crop in ('resized', 'random', 'centre'):
            assert low <= boxes('--crop', crop, '--flip', flip)[:, 4].double().mean() <= high
        of_cifar = shifts(1, 2, 300, flip)
        assert low <= of_cifar[:, 2].double().mean() <= high and torch.equal(of_cifar[:, :2], shifts(1, 2, 300)[:, :2])
    view = ShiftView(arguments('--dataset', 'cifar10', '--flip', 0), 1, 300)
    assert {view.number(2, index).item() % 2 for index in range(300)} == {0}


def test_an_evaluation_resizes_and_normalises_as_asked(images):
    args = arguments('--image-size', 32, '--val-resize-size', 34, '--mean', 0.5, 0.4, 0.3, '--std', 0.2, 0.3, 1)
    classic = datasets.ImageFolder(images / 'valid', transforms.Compose([
        transforms.Resize(34), transforms.CenterCrop(32), transforms.ToTensor(),
        transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 1))]))
    image = plain_view(args)(classic.loader(classic.samples[3][0]), 0, 3)
    batch = Prepare(args, torch.device('cpu'))(Batch(image[None], *torch.zeros(3, 1)))
    assert torch.equal(batch.images[0], classic[3][0])
    with pytest.raises(SystemExit):
        arguments('--image-size', 32, '--val-resize-size', 31)


def test_cifar_images_are_resized_and_augmented():
    image = Dummy(1, 10, 32).load(0)[0]
    small, large, erased = (ShiftView(arguments('--dataset', 'cifar10', *more), 1, 50)(image, 2, 3)
                            for more in ([], ['--image-size', 64], ['--random-erasing', 1]))
    assert torch.equal(large, v2.functional.resize(small, [64, 64]))
    assert erased.shape == small.shape and not torch.equal(erased, small)


@pytest.mark.parametrize('dataset, policy', [('imagefolder', 'IMAGENET'), ('cifar10', 'CIFAR10')])
def test_what_follows_crop_and_flip_is_what_was_asked_for(dataset, policy):
    auto, erasing = random_extras(arguments('--dataset', dataset, '--auto-augment', 'autoaugment', '--random-erasing',
                                            0.3)).transforms
    assert auto.policy.name == policy and erasing.p == 0.3
    assert erasing.value == [round(255 * m) for m in STATISTICS[dataset][0]]


def test_seeded_streams_differ_and_repeat():
    keys = (1, 'a', 0), (1, 'a', 1), (1, 'b', 0), (2, 'a', 0)
    draws = [torch.rand(1, generator=generator(*key)).item() for key in (*keys, *keys)]
    assert draws[:4] == draws[4:] and len(set(draws)) == 4


@pytest.fixture
def spoiled(tmp_path):
    """A folder with the six kinds of odd files among good ones: three that can be read and three that cannot."""
    write_images(tmp_path / 'train', 5, seed=0)
    write_images(tmp_path / 'valid', 2, seed=1)
    odd = tmp_path / 'train' / 'bee'
    photo = (odd / '0.jpg').read_bytes()
    (odd / 'truncated.jpg').write_bytes(photo[:len(photo) // 2])
    (odd / 'text.jpg').write_text('this is not an image')
    (odd / 'empty.jpg').write_bytes(b'')
    Image.new('L', (40, 40), 77).save(odd / 'grey.jpg')
    Image.new('CMYK', (40, 40), (10, 200, 30, 40)).save(odd / 'cmyk.jpg')
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(odd / 'deep.png')
    return tmp_path


@pytest.mark.parametrize('by_pil', [False, True])
def test_odd_images_are_read_as_rgb(spoiled, by_pil):
    source = Folder(spoiled / 'train', by_pil)
    loaded = {source.name(i).rsplit('/', 1)[1]: as_tensor(source.load(i)[0]).float().mean((1, 2)).tolist()
              for i in range(len(source)) if source.name(i).endswith(('grey.jpg', 'deep.png', 'cmyk.jpg'))}
    assert loaded['grey.jpg'] == [77, 77, 77] and loaded['deep.png'] == [156] * 3  # 40000 / 256
    red, green, blue = loaded['cmyk.jpg']
    assert red > blue > green


def test_pixels_of_other_ranges(tmp_path):
    """Of floats, and of 32-bit integers, nobody knows what is white."""
    for form in ('tif', 'png'):
        Image.fromarray(np.array([[0, 30000, 65535]], np.uint16)).save(tmp_path / f'wide.{form}')
        assert np.asarray(read(tmp_path / f'wide.{form}'))[0, :, 0].tolist() == [0, 117, 255]
    for kind in (np.float32, np.int32):
        Image.fromarray(np.full((1, 1), 0.6, kind)).save(tmp_path / 'odd.tif')
        with pytest.raises(ValueError, match='of an unknown range'):
            read(tmp_path / 'odd.tif')


@pytest.mark.parametrize('names, told', [(['0', '1', '10', '2'], True), (['0', '1', '2'], False), (['a', 'b'], False),
                                         (['0', '1', '10', '2a'], False)])
def test_numbers_as_classes_are_in_the_order_of_texts(names, told, tmp_path, base):
    for split in ('train', 'valid'):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new('RGB', (40, 40)).save(tmp_path / split / name / '0.png')
    run = base(tmp_path, '-e')
    assert run.code == 0 and ('in the order of texts: 0, 1, 10, 2' in run.out) == told


def test_torch_reads_a_jpeg_only_as_pil_does(tmp_path):
    """Of whole, damaged and cut files: the same pixels, or None, for PIL to judge. Turned by its tags is none."""
    noise = np.random.default_rng(0).normal(120, 40, (70, 90, 3)).clip(0, 255).astype(np.uint8)
    tags = Image.Exif()
    tags[0x0112] = 6  # to be shown turned by 90 degrees, which ImageFolder never did
    whole, read_by_torch = [], Counter()
    for mode, flags in (('RGB', {}), ('L', {}), ('CMYK', {}), ('RGB', {'progressive': True}), ('RGB', {'exif': tags})):
        Image.fromarray(noise).convert(mode).save(tmp_path / 'x.jpg', quality=90, **flags)
        whole.append((tmp_path / 'x.jpg').read_bytes())
    end = len(whole[0])
    cut = [whole[0][:length] for length in (1, 2, 3, 200, end // 2, end - 100, end - 3, end - 2, end - 1)]
    hole = whole[0][:end // 2] + bytes(500) + whole[0][end // 2 + 500:]
    for kind, content in [*(('whole', x) for x in whole), *(('cut', x) for x in cut), ('hole', hole),
                          ('tail', whole[0] + b'more')]:
        (tmp_path / 'x.jpg').write_bytes(content)
        pixels = read_jpeg(tmp_path / 'x.jpg')
        if pixels is not None:
            assert torch.equal(pixels, as_tensor(read(tmp_path / 'x.jpg')))
            read_by_torch[kind] += 1
    assert read_by_torch['whole'] == 4 and not read_by_torch['cut']


def test_torch_and_pil_see_the_same_crops(images):
    """Equal boxes and flips; a pixel may be rounded the other way, so the statistics of training are the same."""
    args = arguments('--image-size', '32')
    by_torch, by_pil = (Images(Folder(images / 'train', by_pil), CropView(args, 5)) for by_pil in (False, True))
    assert isinstance(by_torch.source.load(0)[0], torch.Tensor) and isinstance(by_pil.source.load(0)[0], Image.Image)
    a, b = (torch.stack([dataset[(epoch, i)].images for epoch in range(3) for i in range(39)]).double()
            for dataset in (by_torch, by_pil))
    assert (a - b).abs().max() <= 1 and (a != b).double().mean() < 0.05
    assert (a.mean((0, 2, 3)) - b.mean((0, 2, 3))).abs().max() < 0.02
    assert (a.std((0, 2, 3)) - b.std((0, 2, 3))).abs().max() < 0.02
    view, image = CropView(args, 7), by_torch.source.load(3)[0]
    classic = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip()])
    for index in range(8):
        with seeded(7, 'view', 0, index):
            expected = classic(image)
        off = (view(image, 0, index).int() - expected.int()).abs().max()
        assert off <= (torch.__version__ < (2, 11))  # torch 2.8 rounds by the layout


def test_which_pixels_are_read(images):
    def by_pil(*flags, train=True):
        return load_source(conftest.arguments(images, *flags), train).by_pil
    assert not by_pil() and by_pil('--exact-pixels') and by_pil(train=False)


def test_unreadable_training_images_are_replaced_and_named(spoiled, base, tmp_path):
    run = base(spoiled, '--epochs', 2, '--output', tmp_path / 'run', '--max-bad-images', 3)
    assert run.code == 0 and [record['unreadable'] for record in run.log()] == [3, 3]
    for name in ('truncated.jpg', 'text.jpg', 'empty.jpg'):
        assert run.err.count(f'{name} cannot be read') == 1  # once, not once an epoch
    for name in ('grey.jpg', 'cmyk.jpg', 'deep.png'):
        assert name not in run.err
    again = base(spoiled, '--epochs', 2, '--output', tmp_path / 'again', '-j', 2, '--max-bad-images', 3)
    assert_same(run.weights(), again.weights())


def test_too_many_unreadable_images_end_the_run(spoiled, base, tmp_path):
    run = base(spoiled, '--epochs', 2, '--output', tmp_path / 'run', '--max-bad-images', 2)
    assert run.code == 1 and '3 unreadable images in epoch 0, more than --max-bad-images 2 allows' in run.err
    assert 'more than --max-bad-images 1 allows' in base(spoiled, '--output', tmp_path / 'b').err
    assert [data.bad_allowed(arguments(), n) for n in (5, 1999, 2000, 1281167)] == [1, 1, 2, 1281]


def test_those_before_an_interruption_count(spoiled, base, tmp_path):
    flags = [spoiled, '--epochs', 1, '-b', 4, '--output', tmp_path / 'run', '--max-bad-images', 3]
    with at_call(4):
        assert base(*flags).code == signals.EXIT_INTERRUPTED
    counted = torch.load(tmp_path / 'run' / 'checkpoint.pth', weights_only=True)['progress']['unreadable']
    assert base(*flags).log()[0]['unreadable'] == 3 and counted > 0


def test_replacement_is_the_next_readable_image(spoiled):
    dataset = Images(Folder(spoiled / 'train'), CenterView(32, 37))
    numbers = {dataset.source.name(i).rsplit('/', 1)[1]: i for i in range(len(dataset))}
    sample = dataset[(0, numbers['empty.jpg'])]
    assert sample.bad == numbers['empty.jpg'] and sample.index == numbers['grey.jpg']
    assert torch.equal(sample.images, dataset[(0, numbers['grey.jpg'])].images)


@pytest.mark.parametrize('workers', [0, 2])
def test_no_readable_image_is_one_line(images, base, tmp_path, workers):
    shutil.copytree(images, tmp_path / 'images')
    for file in (tmp_path / 'images' / 'train').rglob('*.jpg'):
        file.write_text('no image')
    run = base(tmp_path / 'images', '--output', tmp_path / 'run', '-j', workers)
    assert run.code == 1 and re.fullmatch('error: not one image can be read: .*\n', run.err), run.err


def test_what_is_hidden_is_no_class_and_no_image(images, tmp_path):
    shutil.copytree(images / 'train', tmp_path / 'train')
    photo = (tmp_path / 'train' / 'ant' / '0.jpg').read_bytes()
    for name in ('.ipynb_checkpoints/0.jpg', 'ant/._0.jpg', 'bee/.thumbnails/small/0.jpg'):
        (tmp_path / 'train' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'train' / name).write_bytes(photo)
    shown, all_of_it = Folder(images / 'train'), Folder(tmp_path / 'train')
    assert all_of_it.classes == shown.classes and all_of_it.targets == shown.targets


def test_a_folder_that_sockets_cannot_be_named_in(images, base, monkeypatch):
    monkeypatch.setattr(data, 'tempfile', SimpleNamespace(gettempdir=lambda: '/tmp/' + 80 * 'x'))
    run = base(images, '-j', 1, '--data-backend', 'loader')
    assert run.code == 1 and 'is too long a path for the sockets' in run.err


def test_a_link_to_nothing_may_have_been_a_class(images, tmp_path, base):
    shutil.copytree(images, tmp_path / 'images')
    (tmp_path / 'images' / 'train' / 'dog').symlink_to('/nowhere')
    run = base(tmp_path / 'images')
    assert run.code == 1 and f'{tmp_path}/images/train/dog is a link to what is not there' in run.err


def test_links_lead_to_images_but_not_back_up(images, tmp_path):
    shutil.copytree(images / 'valid', tmp_path / 'valid')
    for link, target in (('ant/self', '.'), ('bee/up', '../..'), ('cat/more', images / 'train' / 'cat')):
        (tmp_path / 'valid' / link).symlink_to(target)
    assert Counter(Folder(tmp_path / 'valid').targets) == {0: 5, 1: 5, 2: 5 + 13}


def test_an_evaluation_never_replaces(spoiled, base, tmp_path):
    (spoiled / 'valid' / 'cat' / '1.jpg').write_bytes(b'')
    run = base(spoiled, '-e')
    assert run.code == 1 and 'cannot evaluate' in run.err and 'cat/1.jpg cannot be read' in run.err
    assert 'top1' not in run.out


def test_an_epoch_before_an_unreadable_evaluation_is_kept(spoiled, base, tmp_path):
    image = spoiled / 'valid' / 'cat' / '1.jpg'
    whole = image.read_bytes()
    image.write_bytes(b'')
    flags = [spoiled, '--epochs', 1, '--output', tmp_path / 'run', '--max-bad-images', 3]
    run = base(*flags)
    assert run.code == 1 and 'cannot evaluate' in run.err and (run.folder / 'checkpoint.pth').exists()
    image.write_bytes(whole)
    again = base(*flags)
    assert again.code == 0 and 'resumed from' in again.out and 'Epoch 0 [' not in again.out


def test_batches_of_an_evaluation_count_alike(images):
    """Their weight is the number that Batch declares: none that would be brought to the device with each of them."""
    args = conftest.arguments(images, '--image-size', '32', '-j', '0')
    valid = Images(Folder(images / 'valid'), CenterView(32, 37))
    batch = next(iter(data.make_loader(valid, EvalOrder(range(4), 2, 0, 1), args)))
    assert batch.weight == 1.0 and isinstance(batch.weight, float) and len(batch.images) == 2
