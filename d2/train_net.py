"""Train a detector, distil one, or evaluate one.

    python d2/train_net.py --num-gpus 8 --config-file d2/configs/base_retinanet_R50.yaml
    python d2/train_net.py --num-gpus 8 --config-file d2/configs/mgd_retinanet_R18_R50.yaml MODEL.TEACHER.WEIGHTS T.pth
    python d2/train_net.py --eval-only --config-file d2/configs/base_retinanet_R18.yaml MODEL.WEIGHTS S.pth
"""
import errno
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator, verify_results
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from d2.build import Start, Whole, build_detector, build_student, build_teacher, check_start, features_of, student_of
from d2.config import Refused, arguments, default_config, teacher_config
from d2.hooks import Epochs
from models.errors import line
from utils.checkpoint import fingerprint


class Trainer(DefaultTrainer):
    def __init__(self, cfg):
        super().__init__(rescaled(cfg, comm.get_world_size()))
        for name in (*self.cfg.DATASETS.TRAIN, *self.cfg.DATASETS.TEST):
            if MetadataCatalog.get(name).get('thing_classes') is None:
                DatasetCatalog.get(name)  # which tells them
            check_classes(self.cfg, name)
        student, checkpointer = student_of(self.model), self.checkpointer
        # first what the others have to fit
        checkpointer.checkpointables = {'run': Identity(self.cfg, student), **checkpointer.checkpointables}
        if self.cfg.MODEL.DISTILL.METHODS:
            checkpointer.add_checkpointable('distill', student.kd)

    def resume_or_load(self, resume=True):
        if resume and self.checkpointer.has_checkpoint():
            super().resume_or_load(resume)
        elif self.cfg.MODEL.WEIGHTS:
            Start(self.model).load(self.cfg.MODEL.WEIGHTS)
            if self.cfg.MODEL.DISTILL.LAST_NORM:
                check_start(student_of(self.model))

    @classmethod
    def build_model(cls, cfg):
        return build_student(cfg)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        check_classes(cfg, dataset_name)
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR) / 'inference'))

    def build_hooks(self):
        hooks = super().build_hooks()
        if self.cfg.MODEL.DISTILL.METHODS:  # after the clock, and before the checkpoint, which shall hold what they do
            hooks.insert(1, Epochs(self.cfg.MODEL.DISTILL, student_of(self.model),
                                   lambda: self.build_train_loader(self.cfg)))
        return hooks


class Identity:
    """What a run is tied to: Detectron2 would go on with the rate and decay that it had, whatever the config says."""

    def __init__(self, cfg, student):
        methods, head = cfg.MODEL.DISTILL.METHODS, head_of(cfg)
        self.facts = {f'SOLVER.{key}': cfg.SOLVER[key] for key in (
            'IMS_PER_BATCH', 'BASE_LR', 'MOMENTUM', 'NESTEROV', 'WEIGHT_DECAY', 'WEIGHT_DECAY_NORM',
            'WEIGHT_DECAY_BIAS', 'BIAS_LR_FACTOR')}
        self.facts |= {f'MODEL.{head}.NUM_CLASSES': cfg.MODEL[head].NUM_CLASSES,
                       'MODEL.BACKBONE.FREEZE_AT': cfg.MODEL.BACKBONE.FREEZE_AT,
                       'MODEL.DISTILL.LAST_NORM': cfg.MODEL.DISTILL.LAST_NORM,
                       'MODEL.DISTILL.METHODS': ' '.join(methods)}
        for name in methods:
            values = {'FEATURES': ' '.join(features_of(name, cfg)), **arguments(name, cfg)}
            self.facts |= {f'MODEL.DISTILL.{name.upper()}.{key.upper()}': value for key, value in values.items()}
        if methods:
            own = teacher_config(cfg)
            self.facts['MODEL.TEACHER.WEIGHTS'] = f'weights of hash {fingerprint(student.teacher)}'
            self.facts['MODEL.TEACHER.CONFIG_FILE or OPTS'] = (  # of which no weight tells
                f'INPUT.FORMAT {own.INPUT.FORMAT}, PIXEL_MEAN {own.MODEL.PIXEL_MEAN}, PIXEL_STD {own.MODEL.PIXEL_STD}, '
                f'STRIDE_IN_1X1 {own.MODEL.RESNETS.STRIDE_IN_1X1}')

    def state_dict(self) -> dict:
        return self.facts

    def load_state_dict(self, state: dict):
        for key in state:  # a run of an older version tells less
            if state[key] != self.facts.get(key):
                raise ValueError(f'{key}: the run that --resume would go on with had {state[key]}, and here it is '
                                 f'{self.facts.get(key)}: give what it had (with as many GPUs), or another OUTPUT_DIR')


def rescaled(cfg, world: int):
    """Detectron2's schedule for another number of GPUs than SOLVER.REFERENCE_WORLD_SIZE, and the methods' with it."""
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    cfg = DefaultTrainer.auto_scale_workers(cfg, world).clone()
    if reference:
        cfg.defrost()
        for key in ('PERIODS', 'STEPS'):
            cfg.MODEL.DISTILL[key] = tuple(round(n * reference / world) for n in cfg.MODEL.DISTILL[key])
        cfg.MODEL.DISTILL.ITERS = round(cfg.MODEL.DISTILL.ITERS * reference / world)
        cfg.freeze()
    return cfg


def setup(args):
    cfg = default_config()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name='d2')
    for data in cfg.DATASETS.COCO_FORMAT:
        if not isinstance(data, (tuple, list)) or len(data) != 3:
            raise ValueError(f"DATASETS.COCO_FORMAT has {data!r}: what it lists are ('name', 'file.json', 'images/')")
        register_coco_instances(data[0], {}, *data[1:])
    trains = not (args.eval_only or args.eval_teacher)
    check_machine(cfg, comm.get_world_size(), trains)
    if trains and not cfg.DATASETS.TRAIN:
        raise ValueError('DATASETS.TRAIN is empty: name what to train on')
    if not (trains or cfg.DATASETS.TEST):
        raise ValueError('DATASETS.TEST is empty: name what to evaluate on')
    check_data([*cfg.DATASETS.TEST, *(cfg.DATASETS.TRAIN if trains else ())])
    return cfg


def check_machine(cfg, world: int, trains: bool):
    """What Detectron2 asserts, or finds out later."""
    solver = cfg.SOLVER
    if cfg.MODEL.DEVICE.startswith('cuda') and not torch.cuda.is_available():
        raise ValueError(f'MODEL.DEVICE is {cfg.MODEL.DEVICE}, and there is no GPU: MODEL.DEVICE cpu')
    if trains and solver.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith('cuda'):
        raise ValueError('SOLVER.AMP.ENABLED is for GPUs')
    if cfg.TEST.AUG.ENABLED:
        raise ValueError("TEST.AUG is for the evaluation by Detectron2's tools/train_net.py")
    ranks = solver.REFERENCE_WORLD_SIZE or world  # by the first it is made fit for the second
    if trains and solver.IMS_PER_BATCH % ranks:
        raise ValueError(f'SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} cannot be shared by {ranks} GPUs; '
                         'SOLVER.REFERENCE_WORLD_SIZE tells how many it is meant for, if others than there are')


def head_of(cfg) -> str:
    return 'RETINANET' if 'RetinaNet' in cfg.MODEL.META_ARCHITECTURE else 'ROI_HEADS'


def check_classes(cfg, name: str):
    """Once the data are loaded: a class more than the detector has would be its background."""
    known = MetadataCatalog.get(name).get('thing_classes')
    key = head_of(cfg)
    if known is not None and len(known) != cfg.MODEL[key].NUM_CLASSES:
        some = ', '.join(known[:4]) + ', ...' * (len(known) > 4)
        raise Refused(f'the data set {name} has {len(known)} categories ({some}), and MODEL.{key}.NUM_CLASSES is '
                      f'{cfg.MODEL[key].NUM_CLASSES}')


def check_data(names):
    """Refuse at once what an evaluation would miss after the last iteration."""
    for name in names:
        if name not in DatasetCatalog:
            raise ValueError(f'the data set {name!r} is not registered: DATASETS.COCO_FORMAT names those of your own')
        file = MetadataCatalog.get(name).get('json_file')
        if file and '://' not in file and not PathManager.isfile(file):
            raise ValueError(f'the data set {name} should be in {file}, which is not there; DATASETS.TRAIN, TEST and '
                             'COCO_FORMAT, and the variable DETECTRON2_DATASETS, tell where data are')
        folder = MetadataCatalog.get(name).get('image_root')
        if folder and '://' not in folder and not PathManager.isdir(folder):
            raise ValueError(f'the images of the data set {name} should be in {folder}, which is no folder')


def stop(error: Exception):
    """In one line. Where all processes fail alike, the first tells it, and the launcher ends the others meanwhile."""
    time.sleep(5 * (comm.get_rank() > 0))
    print(f'error: {str(error.args[0] if isinstance(error, KeyError) else error).splitlines()[0]}'
          + f' (process {comm.get_rank()})' * (comm.get_rank() > 0), file=sys.stderr, flush=True)
    sys.exit(1)


def load(checkpointer, cfg, resume: bool, resume_or_load):
    goes_on = resume and checkpointer.has_checkpoint()
    try:
        resume_or_load(resume=resume)
    except (ValueError, AssertionError, KeyError, torch.OutOfMemoryError):  # which say what is wrong
        raise
    except Exception as error:  # there is no end to what a broken file can raise
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # but that of a disk or of a network
            raise
        file = checkpointer.get_checkpoint_file() if goes_on else f'MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}'
        raise ValueError(f'{file} is damaged, or no checkpoint ({type(error).__name__}: {line(error)})') from error


def main(args):
    try:
        cfg = setup(args)
    except (ValueError, KeyError, AssertionError, OSError, yaml.YAMLError) as error:  # yacs's own, of keys and files
        stop(error)
    try:
        if args.eval_teacher:
            cfg, model = teacher_config(cfg), build_teacher(cfg)
        elif args.eval_only:
            model = build_detector(cfg)
            trained = Whole(model, save_dir=cfg.OUTPUT_DIR)
            if not (cfg.MODEL.WEIGHTS or (args.resume and trained.has_checkpoint())):
                raise ValueError('MODEL.WEIGHTS is empty: name the weights to evaluate')
            load(trained, cfg, args.resume, partial(trained.resume_or_load, cfg.MODEL.WEIGHTS))
        else:
            trainer = Trainer(cfg)
            load(trainer.checkpointer, cfg, args.resume, trainer.resume_or_load)
    except (ValueError, OSError, yaml.YAMLError) as error:
        stop(error)
    except (AssertionError, KeyError) as error:  # of Detectron2, for weights and data that are not there
        if not any(words in str(error) for words in ('not found', 'registry', 'No valid data')):
            raise
        stop(error)
    try:
        if not (args.eval_only or args.eval_teacher):
            return trainer.train()
        results = Trainer.test(cfg, model)
    except (Refused, FloatingPointError) as error:
        stop(error)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


if __name__ == '__main__':
    parser = default_argument_parser()
    parser.add_argument('--eval-teacher', action='store_true', help='evaluate the teacher, and nothing else')
    args = parser.parse_args()
    if args.num_gpus > 1 and args.num_gpus > torch.cuda.device_count():
        parser.error(f'--num-gpus {args.num_gpus}, and there are {torch.cuda.device_count()}')
    try:
        launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
    except ProcessExitedException as ended:  # which has said why, if it could
        if ended.exit_code < 0:
            sys.exit(f'error: process {ended.error_index} was killed by signal {-ended.exit_code}: out of memory?')
        sys.exit(ended.exit_code)
