"""Student, teacher and methods from a config. What does not fit is a ValueError, before anything trains."""
from pathlib import Path

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from distillers import DISTILLERS
from distillers.margins import tells_margins

from . import meta_arch, mobilenet  # noqa: F401, which register what configs name
from .config import LOGITS, MAPS, PREACT, arguments, check_schedule, in_keys, teacher_config
from .views import View, check_boxes, check_maps


class Whole(DetectionCheckpointer):
    """Loads nothing less than all of a network, and no backbone that is deeper. A file may have other heads, too."""

    def _log_incompatible_keys(self, incompatible):
        missing = [*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)]
        if missing:
            raise ValueError(f'they do not fit its config: {len(missing)} entries are missing or have another shape, '
                             f'such as {missing[0]}')
        if 'needs_LAST_NORM_GN' in incompatible.unexpected_keys:
            raise ValueError('they are of a student with LAST_NORM GN, and its config here is without')
        deeper = [key for key in incompatible.unexpected_keys
                  if key.startswith('backbone.') and not key.endswith('num_batches_tracked')]
        if deeper:
            raise ValueError(f'they do not fit its config: {len(deeper)} entries are of another backbone, such as '
                             f'{deeper[0]}')
        super()._log_incompatible_keys(incompatible)


class Start(DetectionCheckpointer):
    """Loads what a student begins with: heads and pyramid may be missing, the network below them not."""

    def _log_incompatible_keys(self, incompatible):
        below = 'backbone.bottom_up.' if hasattr(self.model.backbone, 'bottom_up') else 'backbone.'
        keys = [key for key in self.model.state_dict() if key.startswith(below) and key.endswith('weight')]
        lost = {*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)}
        if missing := [key for key in keys if key in lost]:
            raise ValueError(f'MODEL.WEIGHTS do not fit the student: of its backbone, {len(missing)} of {len(keys)} '
                             f'weights are missing or have another shape, such as {missing[0]}; those of torchvision '
                             'have to be converted (convert_weights.py)')
        super()._log_incompatible_keys(incompatible)


def build_detector(cfg: CfgNode) -> nn.Module:
    try:
        detector = build_model(cfg)
    except (AssertionError, KeyError, IndexError) as error:  # Detectron2's own, of keys that do not go together
        raise ValueError(f'{cfg.MODEL.META_ARCHITECTURE} cannot be built of these keys: '
                         f'{type(error).__name__} {error}') from error
    if cfg.MODEL.DISTILL.LAST_NORM and not isinstance(detector, meta_arch.Distilled):
        raise ValueError(f'MODEL.DISTILL.LAST_NORM: a {type(detector).__name__} has no such norms; '
                         'MODEL.META_ARCHITECTURE DistilledRetinaNet or DistilledRCNN has, also without a teacher')
    return detector


def check_start(student: nn.Module):
    """Of weights that were just loaded: norms that train have to be those of the features that they normalise."""
    folded = [name for name, norm in student.replaced.items() if not isinstance(norm, nn.GroupNorm)
              and not tells_margins(norm)]
    if folded:
        raise ValueError(f'MODEL.DISTILL.LAST_NORM: in MODEL.WEIGHTS {folded[0]} is folded into its convolution, so '
                         'what trains would normalise a second time: take weights with their norms, such as '
                         "torchvision's (convert_weights.py), not MSRA's")


def build_teacher(cfg: CfgNode) -> nn.Module:
    own = teacher_config(cfg)
    teacher, weights = build_detector(own), own.MODEL.WEIGHTS
    try:
        if not weights or not Path(PathManager.get_local_path(weights)).is_file():
            raise ValueError('there is no such file')
        Whole(teacher).load(weights)
    except Exception as error:  # there is no end to what a broken file can raise
        why = str(error) if isinstance(error, (ValueError, OSError)) else f'no weights: {type(error).__name__} {error}'
        raise ValueError(f'MODEL.TEACHER.WEIGHTS {weights!r}: {why.splitlines()[0]}') from error
    return teacher.eval().requires_grad_(False)


def build_student(cfg: CfgNode) -> nn.Module:
    """With its teacher and methods, if the config has any."""
    if cfg.MODEL.DISTILL.LAST_NORM == 'BN' and comm.get_world_size() > 1:
        raise ValueError('MODEL.DISTILL.LAST_NORM is BN, whose statistics would differ between processes: take SyncBN')
    methods, teacher = cfg.MODEL.DISTILL.METHODS, cfg.MODEL.TEACHER
    if not methods and (teacher.CONFIG_FILE or teacher.WEIGHTS):
        raise ValueError('MODEL.TEACHER is named, and MODEL.DISTILL.METHODS is empty, so nobody would learn from it')
    student = build_detector(cfg)
    if methods:
        check_schedule(cfg.MODEL.DISTILL.PERIODS, cfg.MODEL.DISTILL.STEPS, cfg.MODEL.DISTILL.ITERS)
        if not isinstance(student, meta_arch.Distilled):
            raise ValueError(f'MODEL.META_ARCHITECTURE is {type(student).__name__}; DistilledRetinaNet and '
                             'DistilledRCNN are those that learn from a teacher')
        teacher = build_teacher(cfg)
        check_images(student, teacher)
        names = {name: features_of(name, cfg) for name in methods}
        student.distil(teacher, {name: build_method(name, student, teacher, cfg) for name in methods}, names)
    return student


def build_method(name: str, student: nn.Module, teacher: nn.Module, cfg: CfgNode):
    names = features_of(name, cfg)
    views = View(student, names), View(teacher, names, cfg.MODEL.DISTILL.MEASURE_MARGINS)
    if names:
        check_maps(*views, reads_preact=name in PREACT)
    else:
        check_boxes(student, teacher)
    try:
        method = DISTILLERS[name](*views, **arguments(name, cfg))
    except ValueError as error:
        raise ValueError(in_keys(name, error)) from None
    if method.batch_statistics:
        raise ValueError(f'{name} would normalise the teacher by the batch, but a detector has frozen norms')
    if not getattr(method, 'per_sample', True):
        raise ValueError(f'MODEL.DISTILL.{name.upper()}.BETA batch is a mean over the images of a batch, and what '
                         'detectors classify are boxes, on each rank another number of them: take sample')
    return method


def features_of(name: str, cfg: CfgNode) -> tuple[str, ...]:
    """The maps that a method compares; none: it compares logits."""
    if name in LOGITS:
        return ()
    if name not in MAPS:
        raise ValueError(f'MODEL.DISTILL.METHODS: {name} is none of those for detectors: {", ".join((*MAPS, *LOGITS))}')
    if not (names := tuple(cfg.MODEL.DISTILL[name.upper()].FEATURES)):
        raise ValueError(f'MODEL.DISTILL.{name.upper()}.FEATURES is empty: name the maps to compare')
    return names


def check_images(student: nn.Module, teacher: nn.Module):
    """Both have to see an image at the same size."""
    if not all(hasattr(teacher, part) for part in ('backbone', 'preprocess_image', 'input_format')):
        raise ValueError(f'nothing is known of a teacher of the kind {type(teacher).__name__}')
    s, t = ((x.backbone.size_divisibility, dict(x.backbone.padding_constraints)) for x in (student, teacher))
    if s != t:
        raise ValueError(f'student and teacher pad images differently (multiple, constraints): {s} and {t}')


def student_of(model: nn.Module) -> nn.Module:
    """What DistributedDataParallel may be around."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
