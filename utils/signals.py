"""SIGTERM, SIGINT and SIGUSR1 ask a run to save and stop: the handler notes it, the loop acts between two steps."""
import os
import signal
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: not done, the same command goes on from here
SAME_EVENT = 1.0  # seconds: a scheduler and a launcher may both deliver one event

_caught = []  # (signal, time) of the first


def _note(number, frame):
    if not _caught:
        _caught.append((number, time.monotonic()))
    elif time.monotonic() - _caught[0][1] > SAME_EVENT:
        os._exit(128 + number)


def listen():
    for number in SIGNALS:
        signal.signal(number, _note)


def ignore():
    """For loader workers: a signal to the process group must not take them away before the run has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def caught() -> int:
    """The number of the signal that asks to stop, or 0."""
    return int(_caught[0][0]) if _caught else 0
