"""main_base.py that is killed in the middle of the n-th call of a function: CRASH='torch.save 3'."""
import importlib
import os
import signal
import sys

import main_base

name, number = os.environ['CRASH'].split()
module, function = name.split('.')
module = importlib.import_module(module)
genuine, calls = getattr(module, function), 0


def call(*args, **kwargs):
    global calls
    if any('args.json' in str(a) for a in args):  # count only what a checkpoint is made of
        return genuine(*args, **kwargs)
    calls += 1
    if calls == int(number):
        if name == 'torch.save':
            args[1].write(b'PK half a file')
            args[1].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(*args, **kwargs)


setattr(module, function, call)
sys.argv[0] = 'main_base.py'
main_base.main()
