"""The quantization report: rows, and how they are printed and saved."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from engine.quantization.coverage import Coverage
from engine.system.environment import describe_environment
from engine.system.io import atomic_write, backup_existing, save_json

Row = dict[str, Any]
UNQUANTIZED = "none"  # as a row's scheme: the weights as they were trained
LEARNED = "lsq"  # as a row's scheme: the step sizes that --steps_from gives
FLOAT_BITS = 32  # of what is not quantized
MEASURED = (
    "checkpoint", "scheme", "bits", "levels", "accuracy", "accuracy_change", "squared_error",
    "accuracy_std", "trials", "loss", "act_bits", "quantized_macs", "quantized_weights",
    "layer_bits",
)  # fmt: skip
PROVENANCE = (
    "per_channel", "fold_bn", "equalize", "rounding", "run_id", "regularizer", "lmbda", "seed"
)  # fmt: skip
COLUMNS = MEASURED + PROVENANCE
PRINTED_COLUMNS = (*COLUMNS[:7], "quantized_macs", "quantized_weights")
LAYER_COLUMNS = (
    "checkpoint", "scheme", "bits", "layer", "accuracy_change", "squared_error", "loss_change",
    "first_order", "first_order_bound", "second_order",
)  # fmt: skip
# Files of earlier results that are renamed before new ones are written: (stem, suffix).
FILES = (
    ("results", ".csv"), ("results", ".json"), ("per_layer", ".csv"), ("per_layer", ".png"),
    ("accuracy", ".png"), ("distributions", ".csv"), ("distributions", ".png"),
)  # fmt: skip


class Trial(NamedTuple):
    """What was measured of one quantized network, or of the unquantized one."""

    accuracy: float
    loss: float
    squared_error: float = 0.0  # of its weights


# --- rows ------------------------------------------------------------------------------------


def make_row(
    checkpoint: str,
    scheme: str,
    n_bits: float,
    trials: Sequence[Trial],
    full_accuracy: float,
    *,
    levels: int | None = None,
    act_bits: int = FLOAT_BITS,
    coverage: Coverage | None = None,
    layer_bits: Mapping[str, int] | None = None,
) -> Row:
    """Return a row with the means over the trials; `full_accuracy` is that without quantizing.

    `coverage` says which shares of multiply-adds and of weights are quantized, `layer_bits` the
    bits of each layer by name: where they differ from n_bits they are told in place of `levels`.
    """
    has_exceptions = layer_bits is not None and {*layer_bits.values()} != {n_bits}
    accuracies, losses, errors = zip(*trials, strict=True)
    accuracy = fmean(accuracies)
    return {
        "checkpoint": checkpoint,
        "scheme": scheme,
        "bits": n_bits,
        "levels": None if has_exceptions else levels,
        "accuracy": accuracy,
        "accuracy_change": accuracy - full_accuracy,
        "squared_error": fmean(errors),
        "accuracy_std": stdev(accuracies) if len(trials) > 1 else None,
        "trials": len(trials),
        "loss": fmean(losses),
        "act_bits": act_bits,
        "quantized_macs": coverage and coverage.multiply_adds,
        "quantized_weights": coverage and coverage.weights,
        "layer_bits": " ".join(f"{name}:{n}" for name, n in layer_bits.items())
        if has_exceptions
        else None,
    }


@dataclass
class Results:
    """The rows measured so far, of all networks."""

    rows: list[Row] = field(default_factory=list)
    layer_rows: list[Row] = field(default_factory=list)

    def checkpoints(self) -> set[str]:
        """Return the names of the networks that have rows."""
        return {row["checkpoint"] for row in self.rows}

    def discard(self, name: str) -> None:
        """Remove the rows of a network."""
        self.rows = [row for row in self.rows if row["checkpoint"] != name]
        self.layer_rows = [row for row in self.layer_rows if row["checkpoint"] != name]


# --- tables ----------------------------------------------------------------------------------


def format_cell(key: str, value: Any, row: Row) -> str:
    """Return a value of a row as the table shows it."""
    if value is None:
        return "–"
    if key == "accuracy":
        std = row.get("accuracy_std")
        return f"{value:.2%}" if std is None else f"{value:.2%} ± {std * 100:.2f}"
    if key in ("quantized_macs", "quantized_weights"):
        return f"{value:.1%}"
    if key == "accuracy_change":
        return f"{value * 100:+.2f} pp"  # percentage points
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return the rows as aligned text, with a rule before each checkpoint's first."""
    header = [column.replace("_", " ") for column in columns]
    body = [[format_cell(column, row[column], row) for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(header, *body, strict=True)]
    justify = [str.ljust if isinstance(rows[0][c], str) else str.rjust for c in columns]
    lines = [
        "  ".join(f(cell, w) for f, cell, w in zip(justify, cells, widths, strict=True)).rstrip()
        for cells in (header, *body)
    ]
    rule = "─" * max(map(len, lines))
    groups = groupby(zip(rows, lines[1:], strict=True), lambda pair: pair[0]["checkpoint"])
    body = [line for _, group in groups for line in (rule, *(line for _, line in group))]
    return "\n".join([lines[0], *body])


# --- files -----------------------------------------------------------------------------------


def save_csv(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """Write the rows as CSV, with an empty cell for None."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, lambda temporary: temporary.write_bytes(text.getvalue().encode()))


def weights_figures(names: Iterable[str]) -> dict[str, str]:
    """Return the name, without suffix, of the figure of each network's weights."""
    figures: dict[str, str] = {}
    for name in names:
        stem = f"weights_{name.replace('/', '_')}"
        figures[name] = f"{stem}_{len(figures)}" if stem in figures.values() else stem
    return figures


def save_tables(
    rows: Sequence[Row], layer_rows: Sequence[Row], settings: Row, folder: Path
) -> None:
    """Write results.csv, results.json and per_layer.csv; earlier ones and figures are renamed."""
    names = dict.fromkeys(row["checkpoint"] for row in rows)
    files = (*FILES, *((stem, ".png") for stem in weights_figures(names).values()))
    backup_existing([(folder / stem, suffix) for stem, suffix in files])
    save_csv(rows, COLUMNS, folder / "results.csv")
    record = {"settings": {**settings, **describe_environment()}, "rows": list(rows)}
    if layer_rows:
        save_csv(layer_rows, LAYER_COLUMNS, folder / "per_layer.csv")
        record["per_layer"] = list(layer_rows)
    save_json(record, folder / "results.json")
