"""What networks do that they must not, and errors of their code in one line."""
import traceback

from torch import Tensor


class Unfit(RuntimeError):
    """What a network does in training and must not, in words for its owner."""


def only_logits(made) -> Tensor:
    if not isinstance(made, Tensor):
        raise Unfit(f'in training the network returns a {type(made).__name__}, but it has to return its logits alone')
    return made


def line(error: Exception) -> str:
    """The first line of what it says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def blame(error: Exception) -> str:
    """What went wrong in somebody's code, and in which line, in one line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f'{line(error)} ({type(error).__name__} at {last.filename}:{last.lineno})'
