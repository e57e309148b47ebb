"""The methods: name on the command line -> class, one line each."""
from .ab import AB
from .at import AT
from .base import Distillation, Distiller, adapts, reads_outputs
from .cc import CC
from .crd import CRD
from .dist import DIST
from .dkd import DKD
from .dml import DML
from .edkd import EDKD
from .expkd import ExpKD
from .fitnet import FitNet
from .flags import add_flags, describe, drop_foreign, from_flags
from .fsp import FSP
from .ft import FT
from .kd import KD
from .kdsvd import KDSVD
from .mgd import MGD
from .mrkd import MRKD
from .nst import NST
from .ofd import OFD
from .pkt import PKT
from .reviewkd import ReviewKD
from .rkd import RKD
from .simkd import SimKD
from .sp import SP
from .srd import SRD
from .srdwithdist import SRDwithDIST
from .vid import VID

__all__ = ['DISTILLERS', 'Distillation', 'Distiller', 'adapts', 'add_flags', 'describe', 'drop_foreign', 'from_flags',
           'reads_outputs']

DISTILLERS = {
    'kd': KD,
    'dkd': DKD,
    'edkd': EDKD,
    'mrkd': MRKD,
    'dist': DIST,
    'dml': DML,
    'sp': SP,
    'rkd': RKD,
    'pkt': PKT,
    'cc': CC,
    'crd': CRD,
    'fitnet': FitNet,
    'at': AT,
    'nst': NST,
    'vid': VID,
    'kdsvd': KDSVD,
    'ofd': OFD,
    'ab': AB,
    'fsp': FSP,
    'ft': FT,
    'reviewkd': ReviewKD,
    'expkd': ExpKD,
    'srd': SRD,
    'srdwithdist': SRDwithDIST,
    'simkd': SimKD,
    'mgd': MGD,
}
