"""Saves without end, until it is killed; run by `test_export_killed.py`.

Usage: python save_again.py PROGRAMS PATH. PROGRAMS holds two programs, traced already, that are
saved in turn. For each line of the input a process is forked that does so; its number is printed,
and, once it is gone, another line.
"""

import os
import pickle
import sys
import warnings
from itertools import cycle
from pathlib import Path

from jaxaccel.export import _save

if __name__ == "__main__":
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # no backend is started
    programs = cycle(pickle.loads(Path(sys.argv[1]).read_bytes()))
    _save.exported = lambda *args: next(programs)
    print("ready", flush=True)
    for _ in sys.stdin:
        next(programs)  # who is killed soon should not always save the same one
        child = os.fork()
        while not child:
            _save.save(sys.argv[2], print, {})
        print(child, flush=True)
        os.waitpid(child, 0)
        print("gone", flush=True)
