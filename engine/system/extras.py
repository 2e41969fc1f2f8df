"""Packages that only some flags need: requirements-export.txt and requirements-runtimes.txt."""

import importlib
from types import ModuleType

from engine.system.errors import SetupError


def require(module: str, flag: str, file: str = "requirements-export.txt") -> ModuleType:
    """Import and return a module of a package in the file; SetupError, in one line, without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise SetupError(f"{flag} needs {package}: python -m pip install -r {file}") from error
