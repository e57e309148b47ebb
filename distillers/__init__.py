"""The methods: name on the command line -> class, one line each."""
from .base import Distillation, Distiller, add_flags, from_flags
from .kd import KD
from .mgd import MGD

__all__ = ['DISTILLERS', 'Distillation', 'Distiller', 'add_flags', 'from_flags']

DISTILLERS = {
    'kd': KD,
    'mgd': MGD,
}
