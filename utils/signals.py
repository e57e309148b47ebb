"""SIGTERM, SIGINT and SIGUSR1 ask a run to save and stop: they are noted, and the loop acts between two updates.

A thread does the noting. Python runs a signal's handler in the main thread, which may be waiting inside a collective
for a rank that hangs: there a second signal, the demand to exit at once, would wait with it.
"""
import atexit
import os
import signal
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: not done, the same command goes on from here
SAME_EVENT = 1.0  # seconds: a scheduler and a launcher may both deliver one event

_caught = []  # (signal, time) of the first
_thread = None


def listen():
    """To be called in the main thread, before there is anything to lose."""
    global _thread
    if _thread is None:
        read, write = os.pipe()
        os.set_blocking(write, False)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        _thread = threading.Thread(target=_watch, args=(read,), daemon=True)
        _thread.start()
        atexit.register(ignore)


def _watch(pipe: int):
    while True:
        for number in os.read(pipe, 16):
            if number in SIGNALS:
                _note(number)


def _note(number: int):
    if not _caught:
        _caught.append((number, time.monotonic()))
    elif time.monotonic() - _caught[0][1] > SAME_EVENT:
        os._exit(128 + number)


def ignore(worker: int = 0):
    """For loader workers: a signal to the process group must not take them away before the run has saved.

    And for the end of a process, for which Python takes a second or more: there it takes its handlers away, so a signal
    would kill, and the exit code be another.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def caught() -> int:
    """The number of the signal that asks to stop, or 0."""
    return _caught[0][0] if _caught else 0
