"""d2: distillation of Detectron2's detectors, on images of coloured rectangles."""
import copy
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from conftest import ROOT
from PIL import Image, ImageDraw
from torch import nn

pytest.importorskip('detectron2', reason='Detectron2 is not installed: see d2/README.md')

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from d2 import train_net
from d2.build import build_student, build_teacher, check_images
from d2.config import CONFIGS, LOGITS, MAPS, default_config, due, epoch_of, teacher_config
from d2.convert_weights import convert
from d2.hooks import Epochs
from d2.norms import replace_last_norms
from d2.views import View, bottom_up_of, check_maps, last_block, last_conv, watching
from distillers.base import probe
from distillers.dkd import DKD
from distillers.mgd import margins_of, match, tells_margins
from models import create_model

STAGES = ['res2', 'res3', 'res4', 'res5']
SIZE = 96
SMALL = ['MODEL.DEVICE', 'cpu', 'MODEL.FPN.OUT_CHANNELS', 32, 'MODEL.RETINANET.NUM_CONVS', 1,
         'MODEL.RETINANET.NUM_CLASSES', 3, 'MODEL.ROI_HEADS.NUM_CLASSES', 3, 'MODEL.ROI_BOX_HEAD.FC_DIM', 32,
         'MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE', 16, 'MODEL.RPN.POST_NMS_TOPK_TRAIN', 50,
         'MODEL.RETINANET.SCORE_THRESH_TEST', 0.0, 'MODEL.WEIGHTS', '']
SCHEDULE = ['INPUT.MIN_SIZE_TRAIN', (SIZE,), 'INPUT.MIN_SIZE_TEST', SIZE, 'INPUT.MAX_SIZE_TRAIN', 128,
            'DATALOADER.NUM_WORKERS', 0, 'SOLVER.IMS_PER_BATCH', 2, 'SOLVER.MAX_ITER', 6, 'SOLVER.STEPS', (5,),
            'SOLVER.WARMUP_ITERS', 2, 'DATASETS.TRAIN', ('toy_train',), 'DATASETS.TEST', ('toy_val',),
            'MODEL.DISTILL.PERIODS', (2, 5), 'MODEL.DISTILL.STEPS', (4,), 'MODEL.DISTILL.ITERS', 2]
MGD = ['MODEL.DISTILL.MGD.LOSS_FACTOR', 5e3]


def config(name, *options):
    cfg = default_config()
    cfg.merge_from_file(str(CONFIGS / f'{name}.yaml'))
    cfg.merge_from_list([*SMALL, 'MODEL.TEACHER.OPTS', SMALL])
    cfg.merge_from_list([*options])
    return cfg


def train_some_norms(detector):
    """Statistics as of a network that was trained, where a fresh one's are those of a folded norm."""
    for norm in detector.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            for values, low, high in ((norm.weight, 0.5, 1.0), (norm.bias, -0.3, 0.3), (norm.running_mean, -0.2, 0.2),
                                      (norm.running_var, 0.5, 2.0)):
                nn.init.uniform_(values, low, high)


@pytest.fixture(scope='session')
def teachers(tmp_path_factory):
    """Weights of the teachers, by their config."""
    folder, files = tmp_path_factory.mktemp('teachers'), {}
    for name in ('base_retinanet_R50', 'base_retinanet_R18', 'base_fasterrcnn_R50', 'base_fasterrcnn_R18'):
        torch.manual_seed(7)
        detector = build_model(config(name))
        train_some_norms(detector)
        files[name] = str(folder / f'{name}.pth')
        torch.save({'model': detector.state_dict()}, files[name])
    return files


def distilled(teachers, name='mgd_retinanet_R18_R50', teacher='base_retinanet_R50', options=()):
    torch.manual_seed(0)
    cfg = config(name, *MGD, 'MODEL.TEACHER.CONFIG_FILE', f'{teacher}.yaml', 'MODEL.TEACHER.WEIGHTS', teachers[teacher],
                 *options)
    return build_student(cfg).train()


@pytest.fixture(scope='session')
def coco(tmp_path_factory):
    """toy_train and toy_val: a rectangle or two on noise; the class is the colour."""
    root, draw = tmp_path_factory.mktemp('coco'), np.random.default_rng(0)
    for split, number in (('toy_train', 8), ('toy_val', 4)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(number):
            picture = Image.fromarray(draw.integers(0, 80, (SIZE, 128, 3), dtype=np.uint8))
            for _ in range(draw.integers(1, 3)):
                (x, y), (w, h), kind = draw.integers(4, 40, 2).tolist(), draw.integers(24, 48, 2).tolist(), int(
                    draw.integers(3))
                ImageDraw.Draw(picture).rectangle((x, y, x + w, y + h), fill=tuple(220 * (c == kind) for c in range(3)))
                annotations.append({'id': len(annotations) + 1, 'image_id': i + 1, 'category_id': kind + 1,
                                    'bbox': [x, y, w, h], 'area': w * h, 'iscrowd': 0})
            picture.save(root / split / f'{i}.png')
            images.append({'id': i + 1, 'file_name': f'{i}.png', 'height': SIZE, 'width': 128})
        categories = [{'id': k + 1, 'name': name} for k, name in enumerate(('red', 'green', 'blue'))]
        (root / f'{split}.json').write_text(json.dumps({'images': images, 'annotations': annotations,
                                                        'categories': categories, 'info': {}, 'licenses': []}))
        register_coco_instances(split, {}, str(root / f'{split}.json'), str(root / split))
    yield root
    for split in ('toy_train', 'toy_val'):
        DatasetCatalog.remove(split)
        MetadataCatalog.remove(split)


def inputs(n=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    batch = []
    for i in range(n):
        objects = Instances((SIZE, SIZE))
        objects.gt_boxes = Boxes(torch.tensor([[8.0, 8, 56 + i, 64], [30, 20, 90, 80]]))
        objects.gt_classes = torch.tensor([i % 3, 2])
        batch.append({'image': torch.randint(256, (3, SIZE, SIZE), generator=draw).float(), 'instances': objects,
                      'height': SIZE, 'width': SIZE})
    return batch


def losses_of(model, batch):
    with EventStorage():
        return model(batch)


def images(n=2):
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


# Taps

def out_of_place(bottom_up, x):
    """The stages' maps before and after their last ReLU."""
    preacts, maps = [], []
    x = F.max_pool2d(F.relu(bottom_up.stem.conv1(x)), 3, 2, 1)
    for name in STAGES:
        for block in getattr(bottom_up, name):
            out = F.relu(block.conv1(x))
            out = block.conv3(F.relu(block.conv2(out))) if hasattr(block, 'conv3') else block.conv2(out)
            preact = out + (x if block.shortcut is None else block.shortcut(x))
            x = F.relu(preact)
        preacts.append(preact)
        maps.append(x)
    return preacts, maps


@pytest.mark.parametrize('depth', [18, 50])
def test_taps_are_the_maps_before_the_relu(depth):
    torch.manual_seed(0)
    detector = build_model(config(f'base_retinanet_R{depth}', 'MODEL.BACKBONE.FREEZE_AT', 0))
    train_some_norms(detector)
    naive = []
    hooks = [last_conv(last_block(detector.backbone.bottom_up, name)).register_forward_hook(
        lambda _module, _inputs, out: naive.append(out)) for name in STAGES]
    with watching(detector, STAGES) as seen:
        detector.backbone(images())
    for hook in hooks:
        hook.remove()
    assert all(out.min() >= 0 for out in naive)  # what a hook on the convolution is left with
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in seen.preact.values()]

    def gradients(maps):
        detector.zero_grad()
        sum((x * w).sum() for x, w in zip(maps, weights)).backward()
        return [p.grad for p in detector.backbone.bottom_up.parameters()]

    ours = gradients([seen.preact[name] for name in STAGES])
    preacts, maps = out_of_place(detector.backbone.bottom_up, images())
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(preacts)))
    for name, preact, after in zip(STAGES, preacts, maps):
        assert torch.equal(seen.preact[name], preact) and torch.equal(seen.maps[name], after)
        assert torch.equal(seen.preact[name].relu(), seen.maps[name])
        assert 0.1 < (seen.preact[name] < 0).float().mean() < 0.9
    assert not any(module._forward_pre_hooks for module in detector.modules())


def test_tap_of_a_block_with_projection():
    """A stage of one block, whose shortcut is computed after its last convolution."""
    detector = build_model(config('base_retinanet_R18', 'MODEL.BACKBONE.FREEZE_AT', 0))
    bottom_up = detector.backbone.bottom_up
    train_some_norms(detector)
    for name in STAGES:
        del getattr(bottom_up, name)[1]
    assert last_block(bottom_up, 'res5').shortcut is not None
    with watching(detector, STAGES) as seen:
        detector.backbone(images())
    for name, preact in zip(STAGES, out_of_place(bottom_up, images())[0]):
        assert torch.equal(seen.preact[name], preact)


def test_levels_of_the_pyramid_and_of_mobilenet_have_no_activation():
    detector = build_model(config('base_fasterrcnn_MV2'))
    with watching(detector, ['res2', 'res5', 'p2', 'p6']) as seen:
        maps = detector.backbone(images())
    assert torch.equal(seen.maps['p6'], maps['p6']) and seen.preact['p2'] is seen.maps['p2']
    assert seen.preact['res5'] is seen.maps['res5'] and seen.maps['res5'].min() < 0


def test_mobilenet_is_that_of_the_models():
    network, detector = create_model('mobilenet_v2').eval(), build_model(config('base_fasterrcnn_MV2')).eval()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    torch.save(convert(network.state_dict()), path := f'/tmp/mv2-{os.getpid()}.pth')
    DetectionCheckpointer(detector).load(path)
    os.remove(path)
    outputs = detector.backbone.bottom_up(images())
    expected = {}
    x = F.relu6(network.features[0](images()))
    for i, block in enumerate(network.features[1:-1], start=1):
        x = block(x)[2]
        expected[i] = x
    assert [tuple(x.shape[1:]) for x in outputs.values()] == [(24, 24, 24), (32, 12, 12), (96, 6, 6), (320, 3, 3)]
    for out, i in zip(outputs.values(), (3, 6, 13, 17)):
        torch.testing.assert_close(out, expected[i], rtol=1e-4, atol=1e-4)


def test_a_view_is_a_network_of_the_distillers(teachers):
    detector = distilled(teachers).teacher
    view = View(detector, ('res3', 'p4'))
    shown = probe(view)
    assert [tuple(x.shape) for x in shown.maps] == [(1, 512, 32, 32), (1, 32, 16, 16)] and len(shown.logits) == 1
    assert view.feature_channels == [512, 32] and view.classifier is None
    assert view.feature_norms == [detector.backbone.bottom_up.res3[-1].conv3.norm, None]
    assert View(detector, ('res3',), measure_margins=True).feature_norms == [None]


# The model is the student

def test_the_loss_is_the_published_one(teachers):
    """Per image 1/8 of the sum over the stages of partial distances / (5e7, 5e7, 5e6, 5e6), channel by channel."""
    model = distilled(teachers, options=['MODEL.DISTILL.MGD.LOSS_FACTOR', 4e8])
    batch = inputs()
    value = losses_of(model, batch)['loss_mgd'].item()
    with torch.no_grad():
        preacts_s, _ = out_of_place(model.backbone.bottom_up, model.preprocess_image(batch).tensor)
        preacts_t, _ = out_of_place(model.teacher.backbone.bottom_up, model.teacher_images(batch))
    total = 0.0
    for stage, factor, f_s, f_t in zip(model.kd['mgd'].stages, (5e7, 5e7, 5e6, 5e6), preacts_s, preacts_t):
        f_s, f_t = F.group_norm(f_s, 32).double(), f_t.double()
        for channel, members in enumerate(stage.flow.T.tolist()):
            group, student = f_t[:, members], f_s[:, channel]
            teacher = group.gather(1, group.abs().argmax(1, keepdim=True))[:, 0]
            teacher = teacher.clamp(min=stage.margins[members].double().mean())
            total += ((student - teacher) ** 2 * ((student > teacher) | (teacher > 0))).sum().item() / factor
    assert value == pytest.approx(0.125 * total / len(batch), rel=1e-4) and value > 0


def test_gradients_of_the_mgd_loss(teachers):
    model = distilled(teachers)
    losses_of(model, inputs())['loss_mgd'].backward()
    bottom_up = {id(p) for p in model.backbone.bottom_up.parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (p.grad is not None) == (id(p) in bottom_up or name.startswith('kd.')), name
    assert len(list(model.kd.parameters())) == 8
    sum(losses_of(model, inputs()).values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_the_teacher_is_hidden_and_stays_as_it_is(teachers):
    model = distilled(teachers)
    before = copy.deepcopy(model.teacher.state_dict())
    assert len(before) > 80
    own = {id(p) for p in model.parameters()} | {id(x) for x in model.buffers()}
    assert not own & {id(x) for x in [*model.teacher.parameters(), *model.teacher.buffers()]}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.start_epoch(1, lambda: [inputs()])
    for _ in range(2):
        model.train()
        sum(losses_of(model, inputs()).values()).backward()
        optimizer.step()
    model.eval()
    model(inputs())
    assert not model.train().teacher.training
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.teacher.state_dict().items())
    assert not any('teacher' in key or key.startswith('kd.') for key in model.state_dict())
    model.double()
    assert model.teacher.backbone.bottom_up.res2[0].conv1.weight.dtype == torch.float64


def test_the_teacher_sees_its_own_kind_of_image(teachers):
    """The student takes R, G, B; the teacher B, G, R with statistics of its own."""
    model = distilled(teachers, 'dkd_fasterrcnn_R18_R101', 'base_fasterrcnn_R50')
    batch = inputs()
    teacher = model.teacher
    assert (model.input_format, teacher.input_format) == ('RGB', 'BGR')
    for i, (mean, std) in enumerate(((103.53, 1.0), (116.28, 1.0), (123.675, 1.0))):
        expected = torch.stack([(x['image'][2 - i] - mean) / std for x in batch])
        torch.testing.assert_close(model.teacher_images(batch)[:, i], expected)
    assert batch[0]['image'].shape == (3, SIZE, SIZE)


@pytest.mark.parametrize('methods, options', [
    (tuple(MAPS), ['MODEL.DISTILL.FT.PARAPHRASER_EPOCHS', 1]), (LOGITS, [])])
def test_every_method_works_through_one_class(teachers, methods, options):
    model = distilled(teachers, 'dkd_fasterrcnn_R18_R101', 'base_fasterrcnn_R18',
                      ['MODEL.DISTILL.METHODS', methods, 'MODEL.BACKBONE.FREEZE_AT', 1, *options])
    model.start_epoch(1, lambda: [inputs()])
    losses = losses_of(model, inputs())
    for name in methods:
        assert any(key.startswith(f'loss_{name}') for key in losses)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_reviewkd_compares_the_pyramids_of_retinanets(teachers):
    model = distilled(teachers, 'reviewkd_retinanet_R50_R101', 'base_retinanet_R18')
    losses = losses_of(model, inputs())
    assert losses['loss_reviewkd'].item() > 0
    losses['loss_reviewkd'].backward()
    assert all(p.grad is not None for name, p in model.backbone.named_parameters() if 'fpn_' in name or 'top_' in name)


def test_half_precision(teachers):
    model = distilled(teachers)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = losses_of(model, inputs())
    assert losses['loss_mgd'].dtype == torch.float32
    full = losses_of(model, inputs())
    assert losses['loss_mgd'].item() == pytest.approx(full['loss_mgd'].item(), rel=0.1)


# R-CNN

def test_dkd_on_the_boxes_of_the_student(teachers):
    model = distilled(teachers, 'dkd_fasterrcnn_R18_R101', 'base_fasterrcnn_R18')
    calls, heads = [], model.roi_heads
    found = {}
    heads.box_head.register_forward_hook(lambda *_: calls.append(1))
    heads.box_predictor.register_forward_hook(lambda _m, _i, out: found.update(z_s=out[0]))
    heads.register_forward_hook(lambda _m, _i, out: found.update(proposals=out[0]))
    batch = inputs()
    losses = losses_of(model, batch)
    assert len(calls) == 1

    teacher = model.teacher  # each box on its own
    maps = teacher.backbone(teacher.preprocess_image([{'image': x['image']} for x in batch]).tensor)
    rows = []
    for i, proposals in enumerate(found['proposals']):
        for box in proposals.proposal_boxes.tensor:
            pooled = teacher.roi_heads.box_pooler([maps[f'p{k}'][i:i + 1] for k in (2, 3, 4, 5)], [Boxes(box[None])])
            rows.append(teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))[0][0])
    classes = torch.cat([x.gt_classes for x in found['proposals']])
    assert len(rows) == len(found['z_s']) == len(classes) and classes.max() == 3
    method = DKD(None, None, alpha=1.0, beta=0.25, temperature=1.0, warmup=1)
    expected = method(SimpleNamespace(logits=found['z_s']), SimpleNamespace(logits=torch.stack(rows)),
                      SimpleNamespace(target=classes))
    for name in ('dkd_tckd', 'dkd_nckd'):
        assert losses[f'loss_{name}'].item() == pytest.approx(expected[name].item(), rel=1e-3, abs=1e-6)


def test_a_mask_rcnn_learns_too(teachers):
    """MASK_ON is all that has to be said; the teacher shows its pyramid with and without masks."""
    model = distilled(teachers, 'reviewkd_fasterrcnn_R18_R101', 'base_fasterrcnn_R50',
                      ['MODEL.MASK_ON', True, 'MODEL.DISTILL.REVIEWKD.WEIGHT', 1.5])
    batch = inputs()
    for x in batch:
        boxes = x['instances'].gt_boxes.tensor.tolist()
        x['instances'].gt_masks = PolygonMasks([[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes])
    losses = losses_of(model, batch)
    assert losses.keys() == {'loss_rpn_cls', 'loss_rpn_loc', 'loss_cls', 'loss_box_reg', 'loss_mask', 'loss_reviewkd'}
    sum(losses.values()).backward()
    assert sum(name.startswith('mask_fcn') for name, _ in model.roi_heads.mask_head.named_children()) == 4
    assert model.eval()(batch)[0]['instances'].has('pred_masks')


def test_a_retinanet_teaches_a_faster_rcnn(teachers):
    model = distilled(teachers, 'base_fasterrcnn_R18', 'base_retinanet_R50',
                      ['MODEL.META_ARCHITECTURE', 'DistilledRCNN', 'MODEL.DISTILL.METHODS', ('mgd',),
                       'MODEL.BACKBONE.FREEZE_AT', 1])
    assert losses_of(model, inputs())['loss_mgd'] > 0


# Margins and flow

def test_folded_norms_are_recognised():
    fresh = FrozenBatchNorm2d(8)
    msra = copy.deepcopy(fresh)
    msra.running_var.fill_(1.0)
    nn.init.uniform_(msra.weight, 0.1, 2)
    trained = copy.deepcopy(msra)
    nn.init.uniform_(trained.running_var, 0.5, 2)
    assert [tells_margins(norm) for norm in (fresh, msra, trained)] == [False, False, True]


def test_margins_are_those_of_the_norm(teachers):
    model = distilled(teachers)
    norm = model.teacher.backbone.bottom_up.res3[-1].conv3.norm
    margins = []
    for mean, std in zip(norm.bias.tolist(), norm.weight.abs().tolist()):
        below = 0.5 * math.erfc(mean / std / math.sqrt(2))
        density = math.exp(-0.5 * (mean / std) ** 2) / math.sqrt(2 * math.pi)
        margins.append(mean - std * density / below if below > 1e-3 else -3 * std)
    assert model.kd['mgd'].stages[1].margins.tolist() == pytest.approx(margins, rel=1e-4)
    torch.testing.assert_close(margins_of(norm), model.kd['mgd'].stages[1].margins)


def test_margins_are_measured_where_norms_do_not_tell(teachers):
    model = distilled(teachers, options=['MODEL.DISTILL.MEASURE_MARGINS', True])
    batches = [inputs(seed=1), inputs(seed=2)]
    model.start_epoch(1, lambda: batches)
    maps = torch.cat([t.preact[1] for _, t in model.pairs(tuple(STAGES), batches)]).double()
    for channel in (0, 7, 300):
        values = maps[:, channel]
        expected = values[values < 0].mean().item() if (values < 0).any() else 0.0
        assert model.kd['mgd'].stages[1].margins[channel].item() == pytest.approx(expected, rel=1e-5)


def test_the_flow_is_the_cheapest(teachers):
    model = distilled(teachers)
    batches = [inputs(seed=1), inputs(seed=2)]
    model.start_epoch(1, lambda: batches)
    cost = 0.0
    for s, t in model.pairs(tuple(STAGES), batches):
        a, b = (F.normalize(x.preact[0].double().flatten(2), dim=2) for x in (s, t))
        cost = cost + (a[:, :, None] - b[:, None]).square().sum(-1).sum(0) / 4
    flow = model.kd['mgd'].stages[0].flow
    assert torch.equal(flow, match(cost, 4)) and not torch.equal(flow, torch.arange(256).view(4, 64))
    assert model.training and model.kd['mgd'].updated == 1


def test_schedule_of_the_flow():
    cfg = default_config().MODEL.DISTILL
    schedule = cfg.PERIODS, cfg.STEPS
    assert [i for i in range(90000) if due(i, *schedule)] == [0, 5000, 10000, 15000, 31000, 62000]
    assert [epoch_of(i, *schedule) for i in (0, 4999, 5000, 30999, 31000, 89999)] == [1, 1, 2, 4, 5, 6]


def test_methods_have_the_values_that_are_published_for_detectors():
    """Whatever they are combined with, and without a config of their own."""
    distill = default_config().MODEL.DISTILL
    assert (distill.MGD.LOSS_FACTOR, distill.MGD.STAGE_FACTORS, distill.MGD.NORM) == (4e8, (1, 1, 10, 10), 'gn')
    assert (distill.DKD.ALPHA, distill.DKD.BETA, distill.DKD.TEMPERATURE, distill.DKD.WARMUP) == (1, 0.25, 1, 1)
    assert (distill.REVIEWKD.WEIGHT, distill.REVIEWKD.MAX_MID, distill.REVIEWKD.WARMUP) == (1, 256, 1)
    assert distill.REVIEWKD.FEATURES == ('p2', 'p3', 'p4', 'p5', 'p6')


def test_boxes_have_the_loss_of_the_published_configs():
    """ReviewKD's leave Detectron2's default."""
    for name, beta in (('mgd_retinanet_R18_R50', 0.0), ('reviewkd_retinanet_R50_R101', 0.1)):
        found = config(name).MODEL.RETINANET.SMOOTH_L1_LOSS_BETA
        assert found == beta


def test_schedule_for_other_numbers_of_gpus():
    cfg = config('mgd_retinanet_R18_R50', 'SOLVER.REFERENCE_WORLD_SIZE', 8)
    cfg.freeze()
    fewer = train_net.rescaled(cfg, 2)
    assert fewer.SOLVER.MAX_ITER == 360000 and fewer.SOLVER.IMS_PER_BATCH == 4
    assert fewer.MODEL.DISTILL.PERIODS == (20000, 124000) and fewer.MODEL.DISTILL.STEPS == (80000,)
    assert fewer.MODEL.DISTILL.ITERS == 4000
    again = train_net.rescaled(fewer, 2)
    assert again.MODEL.DISTILL.PERIODS == (20000, 124000)


# Runs

def trainer_for(teachers, folder, options=(), resume=False):
    torch.manual_seed(0)
    cfg = config('mgd_retinanet_R18_R50', *MGD, *SCHEDULE, 'MODEL.TEACHER.WEIGHTS', teachers['base_retinanet_R50'],
                 'OUTPUT_DIR', str(folder), *options)
    cfg.freeze()
    folder.mkdir(exist_ok=True)
    trainer = train_net.Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def test_a_run_its_checkpoint_and_its_resume(teachers, coco, tmp_path, monkeypatch):
    begun, original = [], train_net.Epochs.start
    monkeypatch.setattr(train_net.Epochs, 'start', lambda self, i: (begun.append(i), original(self, i)))
    divisor = ['MODEL.DISTILL.MGD.LOSS_FACTOR', 1e6]
    trainer = trainer_for(teachers, tmp_path / 'run', divisor)
    trainer.train()
    assert begun == [0, 2, 5]
    assert 'bbox' in trainer._last_eval_results and trainer.model.kd['mgd'].updated == 3
    metrics = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.json').read_text().splitlines()]
    assert all('loss_mgd' in row for row in metrics if 'loss_cls' in row)

    # the checkpoint, in a plain detector
    file = torch.load(tmp_path / 'run' / 'model_final.pth', weights_only=True)
    assert set(file) == {'model', 'distill', 'run', 'trainer', 'iteration'}
    plain = build_model(config('base_retinanet_R18')).eval()
    assert set(file['model']) == set(plain.state_dict())
    missing, unexpected = plain.load_state_dict(file['model'], strict=True)
    assert not missing and not unexpected
    student = trainer.model.eval()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in student.modules())
    for batch in trainer.build_test_loader(trainer.cfg, 'toy_val'):
        x = student.preprocess_image(batch).tensor
        torch.testing.assert_close(plain.backbone.bottom_up(x)['res5'], student.backbone.bottom_up(x)['res5'],
                                   rtol=0, atol=1e-5)
    student.train()

    # resumed in the same folder: all is there, and nothing is matched anew
    begun.clear()
    kept = copy.deepcopy((trainer.model.state_dict(), trainer.model.kd.state_dict(),
                          trainer.optimizer.state_dict()['state']))
    monkeypatch.setattr('distillers.mgd.match', lambda *_: pytest.fail('matched anew'))
    again = trainer_for(teachers, tmp_path / 'run', [*divisor, 'SOLVER.MAX_ITER', 7], resume=True)
    assert again.start_iter == 6
    again._hooks[1].before_train()
    state = again.model.state_dict(), again.model.kd.state_dict(), again.optimizer.state_dict()['state']
    assert begun == [6]
    for a, b in zip(kept[:2], state[:2]):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for key, values in kept[2].items():
        assert torch.equal(values['momentum_buffer'], state[2][key]['momentum_buffer'])

    # but not under another teacher
    other = torch.load(teachers['base_retinanet_R50'], weights_only=True)
    other['model']['backbone.bottom_up.res5.2.conv3.weight'][0] += 1
    torch.save(other, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=r'MODEL\.TEACHER\.WEIGHTS: the run that --resume .* had weights of hash'):
        trainer_for({'base_retinanet_R50': str(tmp_path / 'other.pth')}, tmp_path / 'run', divisor, resume=True)
    # nor with a rate or methods that Detectron2 would not take
    # nor with what fits another run
    bgr = ['MODEL.TEACHER.OPTS', [*SMALL, 'INPUT.FORMAT', 'BGR']]
    for more, key in ((['SOLVER.BASE_LR', 0.5], 'SOLVER.BASE_LR'), (['SOLVER.NESTEROV', False], 'SOLVER.NESTEROV'),
                      (['MODEL.DISTILL.METHODS', ('mgd', 'ofd')], 'MODEL.DISTILL.METHODS'),
                      (['MODEL.DISTILL.LAST_NORM', 'GN'], 'MODEL.DISTILL.LAST_NORM'),
                      (['MODEL.BACKBONE.FREEZE_AT', 0], 'MODEL.BACKBONE.FREEZE_AT'),
                      (bgr, 'MODEL.TEACHER.CONFIG_FILE or OPTS')):
        with pytest.raises(ValueError, match=f'^{key}: the run that --resume would go on with had'):
            trainer_for(teachers, tmp_path / 'run', [*divisor, *more], resume=True)


def test_group_norm_marks_its_checkpoint(caplog):
    logging.getLogger('d2').propagate = True
    with caplog.at_level(logging.WARNING):
        student = build_model(config('mgd_retinanet_R18_R50', 'MODEL.DISTILL.LAST_NORM', 'GN'))
    assert 'its own config' in caplog.text
    caplog.clear()
    plain = build_model(config('base_retinanet_R18'))
    _, unexpected = plain.load_state_dict(student.state_dict(), strict=False)
    assert unexpected == ['needs_LAST_NORM_GN']


@pytest.mark.parametrize('freeze_at, kinds', [(1, 4), (2, 3)])
def test_last_norms_are_replaced_where_the_block_trains(freeze_at, kinds):
    plain = build_model(config('base_retinanet_R18', 'MODEL.BACKBONE.FREEZE_AT', freeze_at))
    names = [*replace_last_norms(plain, 'BN')]
    assert names == [f'backbone.bottom_up.{stage}.1.conv{k}.norm' for stage in STAGES[-kinds:] for k in (1, 2)]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules()) == 2 * kinds


def two_ranks(rank, port, weights, out):
    os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    model = distilled({'base_retinanet_R50': weights}, options=['MODEL.DISTILL.LAST_NORM', 'GN'])
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    batch = inputs(4)[2 * rank:2 * rank + 2]
    model.start_epoch(1, lambda: [batch])
    with EventStorage():
        losses = ddp(batch)
        (losses['loss_mgd'] + 0 * sum(losses.values())).backward()  # the others count anchors rank by rank
    result = {'flow': model.kd['mgd'].stages[1].flow, 'loss': losses['loss_mgd'].detach(),
              'grad': {name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
    torch.save(result, f'{out}/{rank}.pt')
    torch.distributed.destroy_process_group()


def test_two_processes_are_as_one(teachers, tmp_path):
    from utils.distributed import _free_port
    weights = teachers['base_retinanet_R50']
    mp.spawn(two_ranks, (_free_port(), weights, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in (0, 1))
    assert torch.equal(a['flow'], b['flow']) and not torch.equal(a['flow'], torch.arange(512).view(4, 128))
    assert all(torch.equal(a['grad'][name], b['grad'][name]) for name in a['grad'])

    model = distilled(teachers, options=['MODEL.DISTILL.LAST_NORM', 'GN'])
    model.start_epoch(1, lambda: [inputs(4)])
    assert torch.equal(model.kd['mgd'].stages[1].flow, a['flow'])
    loss = losses_of(model, inputs(4))['loss_mgd']
    loss.backward()
    assert loss.item() == pytest.approx(((a['loss'] + b['loss']) / 2).item(), rel=1e-4)
    for name, p in model.named_parameters():
        if p.grad is not None:
            difference = (p.grad - a['grad'][name]).abs().max() / p.grad.abs().max().clamp(min=1e-12)
            assert difference < 1e-3, name


# Command line

def arguments(name, *options):
    return SimpleNamespace(config_file=str(CONFIGS / f'{name}.yaml'), resume=False, eval_only=False, eval_teacher=False,
                           opts=[*map(str, options)])


@pytest.mark.parametrize('name, options, complaint', [
    ('mgd_retinanet_R18_R50', ['MODEL.TEACHER.WEIGHTS', ''], 'no such file'),
    ('mgd_retinanet_R18_R50', ['MODEL.TEACHER.WEIGHTS', '/nowhere/t.pth'], 'no such file'),
    ('mgd_retinanet_R18_R50', ['MODEL.TEACHER.WEIGHTS', 'base_retinanet_R18'], 'do not fit its config'),
    ('mgd_retinanet_R18_R50', ['MODEL.TEACHER.CONFIG_FILE', 'missing.yaml'], 'there is no missing.yaml'),
    ('mgd_retinanet_R18_R50', ['MODEL.BACKBONE.FREEZE_AT', 2], 'no parameter of the student trains before res2'),
    ('mgd_retinanet_R18_R50', ['MODEL.META_ARCHITECTURE', 'RetinaNet', 'MODEL.DISTILL.LAST_NORM', ''],
     'learn from a teacher'),
    ('mgd_retinanet_R18_R50', ['MODEL.META_ARCHITECTURE', 'RetinaNet'], 'a RetinaNet has no such norms'),
    ('mgd_retinanet_R18_R50', ['MODEL.RETINANET.NUM_CLASSES', 4], 'toy_train has 3 categories (red, green, blue)'),
    ('mgd_retinanet_R18_R50', ['MODEL.DEVICE', 'cuda'], 'there is no GPU: MODEL.DEVICE cpu'),
    ('mgd_retinanet_R18_R50', ['SOLVER.AMP.ENABLED', True], 'AMP.ENABLED is for GPUs'),
    ('mgd_retinanet_R18_R50', ['SOLVER.REFERENCE_WORLD_SIZE', 3], 'IMS_PER_BATCH 2 cannot be shared by 3 GPUs'),
    ('mgd_retinanet_R18_R50', ['MODEL.WEIGHTS', 'TMP/torn'], 'torn is damaged, or no checkpoint ('),
    ('mgd_retinanet_R18_R50', ['MODEL.WEIGHTS', 'base_retinanet_R50'], 'of its backbone, '),
    ('base_retinanet_R18', [], 'MODEL.TEACHER is named, and MODEL.DISTILL.METHODS is empty'),
    ('mgd_retinanet_R18_R50', ['DATASETS.TRAIN', ()], 'DATASETS.TRAIN is empty'),
    ('mgd_retinanet_R18_R50', ['SOLVER.BASE_LR', 1e12], 'infinite or NaN at iteration'),
    ('mgd_retinanet_R18_R50', ['TEST.AUG.ENABLED', True], "TEST.AUG is for the evaluation by Detectron2's"),
    ('mgd_retinanet_R18_R50', ['DATASETS.COCO_FORMAT', "(('odd','TMP/odd.json','TMP/odd'),)",
                               'DATASETS.TEST', ('odd',)], 'odd, which is no folder'),
    ('mgd_retinanet_R18_R50', ['MODEL.BACKBONE.NAME', 'build_mobilenet_v2_fpn_backbone'],
     "cannot be built of these keys: KeyError 'p7'"),
    ('mgd_retinanet_R18_R50', ['MODEL.WEIGHTS', 'base_retinanet_R50', 'MODEL.RESNETS.DEPTH', 50,
                               'MODEL.RESNETS.RES2_OUT_CHANNELS', 256],
     'norm is folded into its convolution'),
    ('mgd_retinanet_R18_R50', ['MODEL.DISTILL.METHODS', ('crd',)], 'crd is none of those for detectors'),
    ('mgd_retinanet_R18_R50', ['MODEL.DISTILL.METHODS', ('dkd',)], 'takes a box head'),
    ('mgd_retinanet_R18_R50', ['MODEL.DISTILL.METHODS', ('reviewkd',)], 'no map p2'),
    ('mgd_retinanet_R18_R50', ['MODEL.DISTILL.MGD.REDUCER', 'mean'], "REDUCER is 'mean'"),
    ('mgd_retinanet_R18_R50', ['MODEL.DISTILL.PERIODS', (5,)], 'one more than STEPS'),
    ('mgd_retinanet_R18_R50', ['MODEL.DISTILL.LAST_NORM', 'LN'], 'LAST_NORM'),
    ('dkd_fasterrcnn_R18_R101', ['MODEL.ROI_HEADS.NUM_CLASSES', 2], 'student has 2 classes, the teacher 3'),
    ('dkd_fasterrcnn_R18_R101', ['MODEL.DISTILL.METHODS', ('edkd',), 'MODEL.DISTILL.EDKD.BETA', 'batch'], 'sample'),
    ('mgd_retinanet_R18_R50', ['MODEL.NO_KEY', 1], 'Non-existent key: MODEL.NO_KEY'),
    ('mgd_retinanet_R18_R50', ['MODEL.DISTILL.MGD.LOSS_FACTOR', 5000], 'Type mismatch'),
    ('mgd_retinanet_R18_R50', ['MODEL.TEACHER.OPTS', ['MODEL.NO_KEY', 1]], 'MODEL.TEACHER: Non-existent key'),
    ('mgd_retinanet_R18_R50', ['MODEL.TEACHER.WEIGHTS', 'TMP/text'], 'no weights'),
    ('mgd_retinanet_R18_R50', ['MODEL.WEIGHTS', 'TMP/nowhere.pth'], 'nowhere.pth not found'),
    ('mgd_retinanet_R18_R50', ['DATASETS.TRAIN', ('unheard_of',)], "'unheard_of' is not registered"),
    ('mgd_retinanet_R18_R50', ['DATASETS.TEST', ('unheard_of',)], "'unheard_of' is not registered"),
    ('mgd_retinanet_R18_R50', ['DATASETS.TEST', ('coco_2017_val',)], 'should be in'),
    ('mgd_retinanet_R18_R50', ['DATASETS.COCO_FORMAT', ('mine', 'a.json', 'img/')], "DATASETS.COCO_FORMAT has 'mine'"),
    ('mgd_retinanet_R18_R50', ['MODEL.META_ARCHITECTURE', 'RetinaNot'], "found in 'META_ARCH' registry"),
    ('mgd_retinanet_R18_R50', ['MODEL.TEACHER.WEIGHTS', 'TMP/deeper'], 'are of another backbone, such as backbone.bo'),
    ('mgd_retinanet_R18_R50', ['MODEL.DISTILL.METHODS', ('at',), 'MODEL.DISTILL.AT.WEIGHT', 0.0],
     'MODEL.DISTILL.AT.WEIGHT is 0.0, but has'),
    ('mgd_retinanet_R18_R50', ['MODEL.DISTILL.METHODS', ('fsp',), 'MODEL.DISTILL.FSP.FEATURES', ('p3',)],
     'try MODEL.DISTILL.FSP.PAIRING depth'),
    ('mgd_retinanet_R18_R50', ['MODEL.DISTILL.ITERS', 0], 'ITERS is 0'),
    ('mgd_retinanet_R18_R50', ['MODEL.DISTILL.METHODS', ('at',), 'MODEL.DISTILL.AT.FEATURES', ()], 'FEATURES is empty'),
])
def test_bad_input_ends_in_one_line(teachers, coco, tmp_path, monkeypatch, capsys, name, options, complaint):
    for name_ in ('default_setup', 'setup_logger'):
        monkeypatch.setattr(train_net, name_, lambda *_, **__: None)
    teacher = 'base_fasterrcnn_R18' if 'dkd' in name else 'base_retinanet_R50'
    options = [str(value).replace('TMP', str(tmp_path)) if isinstance(value, str) else value for value in options]
    options = [teachers.get(value, value) if isinstance(value, str) else value for value in options]
    given = [*SMALL, *SCHEDULE, 'MODEL.TEACHER.OPTS', SMALL, 'MODEL.TEACHER.CONFIG_FILE', f'{teacher}.yaml',
             'MODEL.TEACHER.WEIGHTS', teachers[teacher], 'OUTPUT_DIR', tmp_path, *options]
    if complaint == 'no weights':
        (tmp_path / 'text').write_text('of no use')
    (tmp_path / 'odd.json').touch()
    (tmp_path / 'torn').write_bytes(Path(teachers[teacher]).read_bytes()[:9999])
    if 'cuda' in options:
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    if 'folded' in complaint:
        weights = torch.load(teachers['base_retinanet_R50'], weights_only=True)['model']
        for key, value in weights.items():
            if key.endswith('running_mean'):
                weights[key], weights[key[:-4] + 'var'] = torch.zeros_like(value), torch.ones_like(value)
        torch.save({'model': weights}, tmp_path / 'folded.pth')
        given[given.index('MODEL.WEIGHTS', -6) + 1] = tmp_path / 'folded.pth'
    if 'another backbone' in complaint:
        weights = torch.load(teachers[teacher], weights_only=True)
        weights['model']['backbone.bottom_up.res4.6.conv1.weight'] = torch.zeros(1)
        torch.save(weights, tmp_path / 'deeper')
    with pytest.raises(SystemExit) as end:
        train_net.main(arguments(name, *given))
    error, = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert end.value.code == 1 and complaint in error


@pytest.mark.parametrize('options, complaint', [
    (['DATASETS.TEST', ()], 'DATASETS.TEST is empty'),
    (['MODEL.WEIGHTS', ''], 'MODEL.WEIGHTS is empty'), (['MODEL.RESNETS.DEPTH', 50], 'they do not fit its config'),
    (['MODEL.RETINANET.NUM_CLASSES', 4], 'they do not fit its config'), ([], None)])
def test_an_evaluation_is_of_the_weights_that_are_named(teachers, coco, tmp_path, monkeypatch, capsys, options,
                                                        complaint):
    for name in ('default_setup', 'setup_logger'):
        monkeypatch.setattr(train_net, name, lambda *_, **__: None)
    args = arguments('base_retinanet_R18', *SMALL, *SCHEDULE, 'OUTPUT_DIR', tmp_path, 'MODEL.WEIGHTS',
                     teachers['base_retinanet_R18'], *options)
    args.eval_only = True
    if complaint:
        with pytest.raises(SystemExit):
            train_net.main(args)
        assert complaint in capsys.readouterr().err
    else:
        assert 'bbox' in train_net.main(args)


def test_categories_of_the_test_are_compared_before_the_training(teachers, coco, tmp_path):
    told = json.loads((coco / 'toy_val.json').read_text())
    told['categories'].append({'id': 9, 'name': 'super'})
    (coco / 'more.json').write_text(json.dumps(told))
    register_coco_instances('toy_more', {}, str(coco / 'more.json'), str(coco / 'toy_val'))
    try:
        with pytest.raises(ValueError, match=r'toy_more has 4 categories \(red, green, blue, super\), .*CLASSES is 3'):
            trainer_for(teachers, tmp_path / 'run', ['DATASETS.TEST', ('toy_more',)])
    finally:
        DatasetCatalog.remove('toy_more')
        MetadataCatalog.remove('toy_more')


def test_what_a_method_says_before_an_epoch_is_one_line(teachers, coco, tmp_path, monkeypatch, capsys):
    for name in ('default_setup', 'setup_logger'):
        monkeypatch.setattr(train_net, name, lambda *_, **__: None)
    def diverged(*_):
        raise ValueError('the paraphraser diverged: a smaller --mgd-loss-factor may help')
    monkeypatch.setattr('distillers.mgd.MGD.start_epoch', diverged)
    with pytest.raises(SystemExit) as end:
        train_net.main(arguments('mgd_retinanet_R18_R50', *SMALL, *SCHEDULE, 'MODEL.TEACHER.OPTS', SMALL, 'OUTPUT_DIR',
                                 tmp_path, 'MODEL.TEACHER.WEIGHTS', teachers['base_retinanet_R50']))
    assert end.value.code == 1 and ('error: MODEL.DISTILL.MGD: the paraphraser diverged: a smaller '
                                    'MODEL.DISTILL.MGD.LOSS_FACTOR may') in capsys.readouterr().err


def test_a_student_with_groups_is_no_teacher_without_them(tmp_path):
    student = build_model(config('base_retinanet_R18_as_mgd', 'MODEL.DISTILL.LAST_NORM', 'GN'))
    torch.save({'model': student.state_dict()}, tmp_path / 'gn.pth')
    with pytest.raises(ValueError, match='LAST_NORM GN'):
        build_teacher(config('mgd_retinanet_R18_R50', 'MODEL.TEACHER.CONFIG_FILE', 'base_retinanet_R18.yaml',
                             'MODEL.TEACHER.WEIGHTS', str(tmp_path / 'gn.pth')))


def test_a_finished_run_prepares_for_nothing():
    begun, cfg = [], default_config().MODEL.DISTILL
    hook = Epochs(cfg, SimpleNamespace(start_epoch=lambda epoch, batches: begun.append(epoch) or {}), list)
    for hook.trainer in (SimpleNamespace(start_iter=5000, max_iter=n) for n in (5000, 5001)):
        hook.before_train()
    assert begun == [2]


@pytest.mark.parametrize('name, pass_of_student', [('mgd', True), ('ft', False)])
def test_what_a_method_looks_at_before_an_epoch(teachers, caplog, name, pass_of_student):
    """By one loader, however often; by the student if it is asked; and without pyramids."""
    model = distilled(teachers, options=['MODEL.DISTILL.METHODS', (name,), 'MODEL.DISTILL.ITERS', 3])
    loaders, seen = [], []
    for who, network in (('student', model), ('teacher', model.teacher)):
        network.backbone.bottom_up.register_forward_hook(lambda *_, who=who: seen.append(who))
        network.backbone.fpn_output3.register_forward_hook(lambda *_: pytest.fail('nobody reads pyramids'))
    cfg = config('mgd_retinanet_R18_R50', 'MODEL.DISTILL.ITERS', 3).MODEL.DISTILL
    hook = Epochs(cfg, model, lambda: loaders.append(1) or [inputs()] * 5)
    hook.trainer, hook.every = SimpleNamespace(start_iter=0, max_iter=9), 2
    logging.getLogger('d2').propagate = True
    with caplog.at_level(logging.INFO):
        hook.before_train()
    passes = 3 * (1 if pass_of_student else 3)  # FT trains its paraphraser three times on them
    assert len(loaders) == 1 and seen.count('teacher') == passes and seen.count('student') == passes * pass_of_student
    assert 'looked at 2 of 3 batches' in caplog.text


def test_no_more_is_computed_than_is_read(teachers):
    model = distilled(teachers)
    for network, forbidden in ((model.teacher, True), (model, False)):
        ran = []
        network.backbone.fpn_output3.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        losses_of(model, inputs())
        assert bool(ran) != forbidden
    with watching(model, STAGES, preact=False) as seen, torch.autocast('cpu', dtype=torch.bfloat16):
        model.backbone(images())
    assert not any(seen.preact.values()) and all(x.dtype == torch.bfloat16 for x in seen.maps.values())
    shown = seen.features(STAGES)
    assert [x.dtype for x in shown.maps] == [torch.float32] * 4 and [*shown.preact] == [None] * 4


def test_a_rank_that_fails_alone_says_so(capfd):
    from utils.distributed import _free_port
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        mp.spawn(fails, (_free_port(),), nprocs=2)
    assert 'error: no such disk (process 1)' in capfd.readouterr().err


def fails(rank, port):
    os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    if rank:
        train_net.stop(OSError('no such disk'))
    torch.distributed.barrier()


def test_offsets_of_deformable_convolutions_get_no_norm():
    student = build_model(config('base_retinanet_R18'))
    block = student.backbone.bottom_up.stages[-1][-1]
    block.conv2_offset = Conv2d(8, 18, 3)
    assert not [name for name in replace_last_norms(student, 'GN') if 'offset' in name]
    assert block.conv2_offset.norm is None


def test_the_schedules_of_the_published_code():
    """Which trained MGD's teacher and baseline by Detectron2's own script, without Nesterov."""
    nesterov = {name: config(name).SOLVER.NESTEROV for name in (
        'base_retinanet_R50', 'base_retinanet_R18', 'base_retinanet_R18_as_mgd', 'mgd_retinanet_R18_R50')}
    assert list(nesterov.values()) == [False, False, True, True]
    assert default_config().MODEL.DISTILL.EDKD.WARMUP == 1


def test_strides_and_unknown_backbones_are_refused(teachers):
    student, teacher = (build_model(config('base_retinanet_R18', *options)) for options in (
        [], ['MODEL.RESNETS.RES5_DILATION', 1, 'MODEL.FPN.IN_FEATURES', ['res3', 'res4'],
             'MODEL.RETINANET.IN_FEATURES', ['p3', 'p4', 'p5'], 'MODEL.ANCHOR_GENERATOR.SIZES', [[32], [64], [128]]]))
    with pytest.raises(ValueError, match='pad images differently'):
        check_images(student, teacher)
    teacher.backbone.bottom_up.res5[0].conv1.stride = teacher.backbone.bottom_up.res5[0].shortcut.stride = (1, 1)
    with pytest.raises(ValueError, match='strides of student and teacher differ at res5: 32 and 16'):
        check_maps(View(student, ('res4', 'res5')), View(teacher, ('res4', 'res5')), reads_preact=True)

    class Strange(Backbone):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, 4, 1)
            self._out_features = ['res2']
            self._out_feature_channels, self._out_feature_strides = {'res2': 8}, {'res2': 4}

        def forward(self, x):
            return {'res2': self.conv(x).relu()}

    BACKBONE_REGISTRY._obj_map['Strange'] = lambda cfg, shape: Strange()
    options = ['MODEL.BACKBONE.NAME', 'Strange', 'MODEL.RETINANET.IN_FEATURES', ['res2'],
               'MODEL.ANCHOR_GENERATOR.SIZES', [[32.0]], 'MODEL.DISTILL.LAST_NORM', '']
    student = build_model(config('mgd_retinanet_R18_R50', *options))
    view = View(student, ('res2',))
    assert [*probe(view).preact] == [None] and probe(view).maps[0].shape[1] == 8
    teacher = View(build_teacher(config('mgd_retinanet_R18_R50', 'MODEL.TEACHER.WEIGHTS',
                                        teachers['base_retinanet_R50'])), ('res2',))
    with pytest.raises(ValueError, match='its backbone is Strange'):
        check_maps(view, teacher, reads_preact=True)
    check_maps(view, teacher, reads_preact=False)
    assert bottom_up_of(student) is student.backbone
    del BACKBONE_REGISTRY._obj_map['Strange']


def test_the_script_from_another_folder(teachers, coco, tmp_path):
    """Plain training of a data set of one's own is covered by eval: the script finds its imports and its data."""
    data = str(tuple((f'mine_{split}', str(coco / f'toy_{split}.json'), str(coco / f'toy_{split}'))
                     for split in ('train', 'val')))
    schedule = [str(value).replace('toy_', 'mine_') for value in SCHEDULE]
    command = [sys.executable, str(ROOT / 'd2/train_net.py'), '--eval-teacher', '--config-file',
               str(CONFIGS / 'mgd_retinanet_R18_R50.yaml'), *map(str, SMALL), *schedule, 'DATASETS.COCO_FORMAT', data,
               'MODEL.TEACHER.OPTS', str(SMALL), 'MODEL.TEACHER.WEIGHTS', teachers['base_retinanet_R50']]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {'OMP_NUM_THREADS': '1'}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'Evaluation results for bbox' in done.stdout


@pytest.mark.parametrize('content, complaint', [
    (lambda state: {'format': 1, 'model': state, 'ema': None}, None), (lambda state: {'state_dict': state}, None),
    (lambda state: {f'module.{key}': value for key, value in state.items()}, None),
    (lambda state: create_model('mobilenet_v1', 10).state_dict(), 'weights of no ResNet and no MobileNetV2'),
    (lambda state: create_model('resnet20', 10).state_dict(), 'weights of no ResNet and no MobileNetV2'),
    (lambda state: None, 'does not exist')])
def test_files_to_convert(tmp_path, content, complaint):
    state = torchvision.models.resnet18().state_dict()
    if made := content(state):
        torch.save(made, tmp_path / 'source.pth')
    run = subprocess.run([sys.executable, str(ROOT / 'd2' / 'convert_weights.py'), str(tmp_path / 'source.pth'),
                          str(tmp_path / 'target.pth')], capture_output=True, text=True)
    assert run.returncode == bool(complaint) and (complaint or '') in run.stderr and run.stderr.count('\n') <= 1
    if not complaint:
        made = torch.load(tmp_path / 'target.pth', weights_only=True)['model']
        assert torch.equal(made['stem.conv1.weight'], state['conv1.weight'])


def test_converted_weights_compute_what_torchvision_computes():
    torch.manual_seed(0)
    original = torchvision.models.resnet18().eval()
    for norm in original.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    torch.save(convert(original.state_dict()), path := f'/tmp/r18-{os.getpid()}.pth')
    detector = build_model(config('base_retinanet_R18')).eval()
    DetectionCheckpointer(detector).load(path)
    os.remove(path)
    x = original.maxpool(original.relu(original.bn1(original.conv1(images()))))
    for k in (1, 2, 3, 4):
        x = original.get_submodule(f'layer{k}')(x)
    torch.testing.assert_close(detector.backbone.bottom_up(images())['res5'], x, rtol=1e-4, atol=1e-4)


# Configs

def yamls():
    return sorted(path.stem for path in CONFIGS.glob('[a-z]*.yaml'))


@pytest.mark.parametrize('name', yamls())
def test_config_builds(name):
    cfg = default_config()
    cfg.merge_from_file(str(CONFIGS / f'{name}.yaml'))
    cfg.merge_from_list(['MODEL.DEVICE', 'meta'])
    with torch.device('meta'):
        assert not any('num_batches' in key for key in build_model(cfg).state_dict())
    if cfg.MODEL.DISTILL.METHODS:
        assert name.startswith('_'.join(cfg.MODEL.DISTILL.METHODS))
        teacher = teacher_config(cfg)
        student_name, teacher_name = name.split('_')[-2:]
        assert f'R{teacher.MODEL.RESNETS.DEPTH}' == teacher_name
        assert student_name == ('MV2' if 'mobilenet' in cfg.MODEL.BACKBONE.NAME else f'R{cfg.MODEL.RESNETS.DEPTH}')
    mean = cfg.MODEL.PIXEL_MEAN
    assert (mean[0] > mean[2]) == (cfg.INPUT.FORMAT == 'RGB')


def test_nothing_needs_the_model_zoo():
    for path in Path(ROOT / 'd2').glob('*.py'):
        assert 'model_zoo' not in path.read_text()
