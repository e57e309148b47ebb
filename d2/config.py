"""The keys of a config: Detectron2's, and those of the distillation, made from the distillers' own arguments."""
import re
from bisect import bisect
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from distillers import DISTILLERS
from distillers.flags import hyper_parameters, options

CONFIGS = Path(__file__).resolve().parent / 'configs'

STAGES, PYRAMID = ('res2', 'res3', 'res4', 'res5'), ('p2', 'p3', 'p4', 'p5', 'p6')

# Methods that compare maps, and by default which. Those that need an image's pooled features or classifier are not
# here: a detector has neither.
MAPS = dict.fromkeys(('mgd', 'ofd', 'ab', 'fitnet', 'at', 'nst', 'vid', 'kdsvd', 'fsp', 'ft'), STAGES)
MAPS['reviewkd'] = PYRAMID
LOGITS = ('kd', 'dkd', 'edkd')  # methods that compare logits: of the box head, on the student's proposals
# of those with maps, the ones that read them before their activation
PREACT = tuple(name for name in MAPS if 'preact' in DISTILLERS[name].teacher_reads)

PUBLISHED = {  # for detectors, where the methods' own defaults are those of small images
    # 1 / 8 of the factors of MGD: its code divided by the number of GPUs, which was 8
    'MGD.LOSS_FACTOR': 4e8, 'MGD.STAGE_FACTORS': (1.0, 1.0, 10.0, 10.0), 'MGD.NORM': 'gn',
    'DKD.ALPHA': 1.0, 'DKD.BETA': 0.25, 'DKD.TEMPERATURE': 1.0,
    'REVIEWKD.WEIGHT': 1.0, 'REVIEWKD.MAX_MID': 256,
    'FT.PARAPHRASER_EPOCHS': 3,  # of ITERS batches
}


class Refused(ValueError):
    """What ends a run in one line, also when it is under way."""


def default_config() -> CfgNode:
    cfg = get_cfg()
    cfg.DATASETS.COCO_FORMAT = ()  # data sets of one's own: (name, json file, folder of images), ...

    cfg.MODEL.TEACHER = CfgNode()
    cfg.MODEL.TEACHER.CONFIG_FILE = ''  # a path, or the name of a file in d2/configs
    cfg.MODEL.TEACHER.WEIGHTS = ''
    cfg.MODEL.TEACHER.OPTS = []  # further keys and values for the teacher

    cfg.MODEL.DISTILL = distill = CfgNode()
    distill.METHODS = ()
    distill.LAST_NORM = ''  # in the last block of each stage of the student: SyncBN, BN, GN or, empty, as they are
    distill.MEASURE_MARGINS = False  # measure the teacher's margins even where its norms tell them
    # What is an epoch to a method: PERIODS[i] iterations, from STEPS[i - 1] on
    distill.PERIODS = (5000, 31000)
    distill.STEPS = (20000,)
    distill.ITERS = 1000  # batches, of all GPUs, that a method may look at before an epoch

    for name in (*MAPS, *LOGITS):
        distill[name.upper()] = method = CfgNode()
        if name in MAPS:
            method.FEATURES = MAPS[name]
        for key, (parameter, _) in hyper_parameters(DISTILLERS[name]).items():
            method[key.upper()] = parameter.default
        if 'WARMUP' in method:
            method.WARMUP = 1  # epochs are few here
    for key, value in PUBLISHED.items():
        name, word = key.split('.')
        distill[name][word] = value
    return cfg


def arguments(name: str, cfg: CfgNode) -> dict:
    """The hyper-parameters of a method."""
    values = {}
    for key, (parameter, _) in hyper_parameters(DISTILLERS[name]).items():
        value = values[key] = cfg.MODEL.DISTILL[name.upper()][key.upper()]
        choices = options(parameter).get('choices', [value])
        if value not in choices:
            raise ValueError(f'MODEL.DISTILL.{name.upper()}.{key.upper()} is {value!r}, but has to be one of {choices}')
    return values


def in_keys(name: str, error: ValueError) -> str:
    """What a method says, which knows its hyper-parameters by their names, or as flags."""
    key, (word, _, rest) = f'MODEL.DISTILL.{name.upper()}', str(error).partition(' ')
    own = word in hyper_parameters(DISTILLERS[name])
    told = f'{key}.{word.upper()} {rest}' if own else f'{key}: {error}'
    return re.sub(rf'--{name}-([a-z-]+)', lambda flag: f'{key}.{flag[1].replace("-", "_").upper()}', told)


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The teacher's own config, on the student's device and data sets."""
    wanted = cfg.MODEL.TEACHER
    if not wanted.CONFIG_FILE:
        raise ValueError('MODEL.TEACHER.CONFIG_FILE is empty: name the config of the teacher')
    file = Path(wanted.CONFIG_FILE)
    if not file.exists():
        file = CONFIGS / wanted.CONFIG_FILE
    if not file.exists():
        raise ValueError(f'MODEL.TEACHER.CONFIG_FILE: there is no {wanted.CONFIG_FILE}, here or in {CONFIGS}')
    teacher = default_config()
    try:
        teacher.merge_from_file(str(file))
        teacher.merge_from_list(wanted.OPTS)
    except (KeyError, AssertionError) as error:  # yacs's own
        raise ValueError(f'MODEL.TEACHER: {error.args[0]}') from error
    teacher.MODEL.WEIGHTS, teacher.MODEL.DEVICE = wanted.WEIGHTS, cfg.MODEL.DEVICE
    teacher.DATASETS, teacher.OUTPUT_DIR = cfg.DATASETS.clone(), cfg.OUTPUT_DIR
    return teacher


def due(iteration: int, periods: tuple[int, ...], steps: tuple[int, ...]) -> bool:
    """Whether an epoch begins with this iteration."""
    return iteration % periods[bisect(steps, iteration)] == 0


def epoch_of(iteration: int, periods: tuple[int, ...], steps: tuple[int, ...]) -> int:
    """Counted from 1."""
    return sum(due(i, periods, steps) for i in range(iteration + 1))


def check_schedule(periods: tuple[int, ...], steps: tuple[int, ...], iters: int):
    if len(periods) != len(steps) + 1 or min(periods) < 1 or list(steps) != sorted(steps):
        raise ValueError(f'MODEL.DISTILL.PERIODS {periods} are not one more than STEPS {steps}, which have to ascend')
    if iters < 1:
        raise ValueError(f'MODEL.DISTILL.ITERS is {iters}, but a method has to look at something')
