"""The grid of a study: its variants, how their networks are quantized, and how they are trained.

study.py has one of its own; others are TOML files, see docs/studies.md.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from analysis.study.settings import MIN_EPOCHS, epoch_names, shell_words
from engine.system.io import file_boundary

CONTROL = "control"  # the variant that others are compared with
TUNING = "tuning"  # the quantization that λ is chosen by, on held-out images


@dataclass(frozen=True)
class Variant:
    """What is done in the last third of a run.

    In `flags`, {first}, {late} and {last} are epochs (see `epoch_names`), and {lmbda} is λ.
    """

    flags: str  # of train.py or, if they contain --phases, of combined_protocol.py
    lmbdas: tuple[float, ...] = ()  # candidates; () where the flags say it all
    cost: float = 1.0  # of an epoch, in epochs of the control: for estimates before the first one
    lambda_from: str = ""  # the variant whose λ and cost this one takes over


@dataclass(frozen=True)
class Quantization:
    """One call of quant_inference.py on every trained network."""

    flags: str
    seconds: float  # estimated, until one is measured
    names: Mapping[str, str] = field(default_factory=dict)  # of schemes in tables, if not their own
    full_precision: bool = False  # whether its float32 row is the one in the tables


@dataclass(frozen=True)
class Grid:
    """All that a study runs for each network and seed."""

    training: str  # flags of every training, with {first} and so on
    variants: Mapping[str, Variant]
    quantizations: Mapping[str, Quantization]
    tuning: Mapping[str, str] = field(default_factory=dict)  # flags of TUNING, by network
    note: str = ""  # what the quantizations are, under the tables

    def check(self) -> None:
        """Raise ValueError, in one line, where a study cannot be made of it."""
        if CONTROL not in self.variants:
            raise ValueError(f"there is no variant {CONTROL!r}, which others are compared with")
        if TUNING not in self.quantizations:
            raise ValueError(f"there is no quantization {TUNING!r}, which λ is chosen by")
        sources = [name for name, each in self.quantizations.items() if each.full_precision]
        if len(sources) != 1:
            raise ValueError("one quantization has full_precision = true, not " + str(sources))
        for name, variant in self.variants.items():
            shell_words(variant.flags, {**epoch_names(MIN_EPOCHS), "lmbda": 0})
            if variant.lambda_from and variant.lambda_from not in self.variants:
                raise ValueError(f"{name}: there is no variant {variant.lambda_from!r}")


TYPES = {  # of what a file may give
    "training": str, "note": str, "flags": str, "lambda_from": str, "names": dict, "tuning": dict,
    "cost": (int, float), "seconds": (int, float), "full_precision": bool, "lmbdas": list,
}  # fmt: skip


def load_grid(path: Path) -> Grid:
    """Read a grid from a TOML file; raises FileError, in one line, where it holds something else.

    Its tables are those of `Grid`, `Variant` and `Quantization`.
    """
    with file_boundary(path, "is no grid of a study"):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        for part, kind in (("variants", Variant), ("quantizations", Quantization)):
            content[part] = {
                name: _make(kind, values, f"{part}.{name}")
                for name, values in content[part].items()
            }
        grid = _make(Grid, content, "the file")
        grid.check()
        return grid


def _make(kind: type, values: dict[str, Any], where: str) -> Any:
    """Return a dataclass of the values; ValueError where one is unknown, missing or of no use."""
    names = [each.name for each in fields(kind)]
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{where} has {name!r}: it may have {', '.join(names)}")
        if not isinstance(value, TYPES.get(name, dict)):
            raise ValueError(f"{where}: {name} cannot be {value!r}")
    if "lmbdas" in values:
        values = {**values, "lmbdas": tuple(map(float, values["lmbdas"]))}
    missing = [each.name for each in fields(kind) if _is_required(each) and each.name not in values]
    if missing:
        raise ValueError(f"{where} has no {missing[0]}")
    return kind(**values)


def _is_required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
