"""What a study is: the length and flags of its runs, saved as study.json and the same ever after.

A setting is checked by the same functions whether it comes from the command line or the file.
"""

import argparse
import json
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from engine.system.cli import bounded_number
from engine.system.errors import FileError, ReportedError

MIN_EPOCHS = 6
Settings = dict[str, Any]  # by name, a key of SETTING_TYPES


class SettingsError(ReportedError):
    """The command line asks for another study than the one in the folder."""

    exit_code = 2


def epoch_names(n_epochs: int) -> dict[str, int]:
    """Return the epochs that flags of a variant name, of a run whose last third is regularized.

    `first` is the first regularized epoch; `late` and `last` are half and two thirds into them.
    """
    n_regularized = n_epochs // 3
    first = n_epochs - n_regularized
    return {
        "first": first,
        "late": first + n_regularized // 2,
        "last": first + n_regularized * 2 // 3,
    }


def shell_words(text: str, epochs: Mapping[str, int] | None = None) -> str:
    """Return text that is flags, once `epochs` are filled in where given: an argparse type."""
    try:
        shlex.split(text.format(**epochs) if epochs else text)
    except (LookupError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error!r}") from error
    return text


SETTING_TYPES = {
    "n_epochs": bounded_number(int, at_least=MIN_EPOCHS),
    "holdout": bounded_number(int, at_least=1),
    "train_flags": shell_words,
    "data_flags": shell_words,
    "grid": str,
    "models": shell_words,
    "TRAINING": partial(shell_words, epochs=epoch_names(MIN_EPOCHS)),
}
EARLIER = {"grid": "", "models": ""}  # of studies that do not say it


def load_settings(path: Path) -> Settings | None:
    """Return the settings in a study.json, None without one; FileError if it holds others."""
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(settings, dict):
            settings = EARLIER | settings
        if not isinstance(settings, dict) or settings.keys() != SETTING_TYPES.keys():
            raise ValueError(f"these are not the settings of a study: {', '.join(SETTING_TYPES)}")
        for name, parse in SETTING_TYPES.items():
            if parse(str(settings[name])) != settings[name]:  # such as "9" for 9
                raise ValueError(f"{name} cannot be {settings[name]!r}")
    except argparse.ArgumentTypeError as error:
        raise FileError(f"{name}: {error}") from error
    except (OSError, ValueError) as error:
        raise FileError(str(error)) from error
    return settings


def resolve_settings(
    out: str, saved: Settings | None, requested: Mapping[str, Any], defaults: Settings
) -> Settings:
    """Return the settings of the study in the folder `out`: the saved ones, or of a new study.

    `requested` are those of the command line, None where a flag was left out. Raises SettingsError
    where one of them contradicts a saved one: runs of other lengths or flags are another study. It
    may get more networks.
    """
    explicit = {name: value for name, value in requested.items() if value is not None}
    if saved is None:
        return {**defaults, **explicit}
    models = explicit.pop("models", "")
    if models and not saved["models"]:
        raise SettingsError(
            f"--models {models}: the study in {out} has one network alone: choose another --out"
        )
    more = [model for model in models.split() if model not in saved["models"].split()]
    saved = {**saved, "models": " ".join([*saved["models"].split(), *more])}
    for name, value in explicit.items():
        if value != saved[name]:
            theirs = repr(saved[name]) if saved[name] != "" else "none"
            raise SettingsError(
                f"--{name} {value}: the study in {out} has {theirs}: choose another --out"
            )
    return saved
