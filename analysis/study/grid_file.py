"""Files of grids, in TOML: see docs/studies.md."""

import tomllib
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any

import flags
from analysis.study.grid import Grid, Quantization, Variant
from engine.system.io import file_boundary

TYPES = {  # of what a file may give
    "training": str, "note": str, "flags": str, "lambda_from": str, "names": dict, "tuning": dict,
    "cost": (int, float), "seconds": (int, float), "full_precision": bool, "lmbdas": list,
}  # fmt: skip
TEXTS = {"names", "tuning"}  # tables of text by name


def load_grid(path: Path) -> Grid:
    """Read a grid from a TOML file; raises FileError, in one line, where it holds something else.

    Its tables are those of `Grid`, `Variant` and `Quantization`; `check_grid` tries what they say.
    Networks in [tuning] are then as --models has them.
    """
    with file_boundary(path, "is no grid of a study"):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        for part, kind in (("variants", Variant), ("quantizations", Quantization)):
            content[part] = {
                name: _make(kind, values, f"{part}.{name}")
                for name, values in content[part].items()
            }
        grid = _make(Grid, content, "the file")
    with file_boundary(path, "is no grid of a study: tuning"):
        tuning = {flags.study_network(network): words for network, words in grid.tuning.items()}
        if len(tuning) < len(grid.tuning):
            raise ValueError(f"one network is there twice: {', '.join(grid.tuning)}")
    return replace(grid, tuning=tuning)


def _make(kind: type, values: dict[str, Any], where: str) -> Any:
    """Return a dataclass of the values; ValueError where one is unknown, missing or of no use."""
    names = [each.name for each in fields(kind)]
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{where} has {name!r}: it may have {', '.join(names)}")
        fits = isinstance(value, TYPES.get(name, dict))
        if fits and name in TEXTS:
            fits = all(isinstance(text, str) for text in value.values())
        if not fits:
            raise ValueError(f"{where}: {name} cannot be {value!r}")
    if "lmbdas" in values:
        values = {**values, "lmbdas": tuple(map(float, values["lmbdas"]))}
    missing = [each.name for each in fields(kind) if _is_required(each) and each.name not in values]
    if missing:
        raise ValueError(f"{where} has no {missing[0]}")
    return kind(**values)


def _is_required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
