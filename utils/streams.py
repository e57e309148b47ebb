"""Output that nobody may be left to read: a `tee` that was killed, a terminal that was closed."""
import errno
import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def enduring():
    """What cannot be printed ends no run. A stream that was closed before the start (`>&-`) is None."""
    with open(os.devnull, 'w') as nowhere:
        out, err = (Enduring(stream or nowhere) for stream in (sys.stdout, sys.stderr))
        with redirect_stdout(out), redirect_stderr(err):
            yield


class Enduring:
    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str):
        self._attempt(self.stream.write, text)

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, action, *what):
        try:
            action(*what)
        except UnicodeEncodeError as error:  # of a name that the terminal's encoding lacks
            action(*(text.encode(error.encoding, 'backslashreplace').decode(error.encoding) for text in what))
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # for ever: what it holds, and all to come, goes nowhere
                with open(os.devnull, 'w') as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())
