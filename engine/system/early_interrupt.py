"""Importing this makes a Ctrl-C one line, until a script takes the signals over.

That is while PyTorch is imported, which takes seconds, and while flags are read: nothing has begun
that would have to be ended well. An exception would not do, for some imports catch all of them, and
the script would go on.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _end(number: int, frame: object) -> None:
    os.write(2, f"{os.path.basename(sys.argv[0])}: stopped\n".encode())
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def _is_script() -> bool:
    """Tell whether a script of ours is what runs, not a program that imports one."""
    main = getattr(sys.modules["__main__"], "__file__", None) or ""
    return Path(main).resolve().parent == ROOT and multiprocessing.parent_process() is None


if _is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
