"""Importing this makes two things one line: a Ctrl-C, and an error of ours, during the imports.

PyTorch takes seconds to import, and until flags are read nothing has begun that would have to be
ended well. For a Ctrl-C an exception would not do: some imports catch all of them, and the script
would go on. An error of ours is, for instance, a regularizer whose name is taken.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import TracebackType

from engine.system.errors import ReportedError

ROOT = Path(__file__).parents[2]


def _end(number: int, frame: object) -> None:
    os.write(2, f"{os.path.basename(sys.argv[0])}: stopped\n".encode())
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, ReportedError):
        os.write(2, f"{os.path.basename(sys.argv[0])}: error: {error}\n".encode())
    else:
        _hook_before(kind, error, trace)


def _is_script() -> bool:
    """Tell whether a script of ours is what runs, not a program that imports one."""
    main = getattr(sys.modules["__main__"], "__file__", None) or ""
    return Path(main).resolve().parent == ROOT and multiprocessing.parent_process() is None


_hook_before = sys.excepthook
if _is_script():
    sys.excepthook = _report
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
