"""The tables of the study: means and standard deviations over seeds, paired differences.

A setting is (scheme, bits of weights, bits of activations): ("none", 32, 32) is full precision.
Networks whose activations are quantized have their batch norms folded; RECALIBRATED are those whose
batch-norm statistics were estimated again after uniform quantization.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import files
from report import UNQUANTIZED, save_csv

Setting = tuple[str, int, int]
FULL: Setting = (UNQUANTIZED, 32, 32)
RECALIBRATED = "recalibrated"
MAIN: list[Setting] = [
    FULL, *(("uniform", bits, 32) for bits in (4, 3, 2)), ("pwlq", 3, 32), ("uniform", 4, 4),
    (RECALIBRATED, 4, 32), (RECALIBRATED, 3, 32),
]
PAIRS = (  # beside every variant minus the control
    ("l2grad", "l1grad"), ("l2grad_weights", "l1grad_weights"), ("stepl2grad", "stepl1grad"),
    ("l2grad_frozen", "control_frozen"), ("stepl2grad_frozen", "control_frozen"),
    ("stepnoise_frozen", "control_frozen"), ("stepnoise_frozen", "stepnoise"),
    ("stepl2grad", "l2grad"), ("stepl1grad", "l1grad"), ("l2grad", "stepnoise"),
)
# Student's t, 97.5 %, for 1, 2, … degrees of freedom; the last one stands for more, too wide.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)


@dataclass(frozen=True)
class Result:
    """Where the final results of one variant and seed are, and how to have them again."""

    variant: str
    lmbda: float | None
    seed: int
    record: Path  # of the training
    quantized: dict[str, Path]  # "weights" and "folded": the results.json of each
    lines: list[str]  # the commands
    first: int  # regularized epoch


@dataclass(frozen=True)
class Choice:
    """How the λ of a variant was chosen: (full-precision, 4-bit uniform) held-out accuracies."""

    control: tuple[float, float]
    candidates: dict[float, tuple[float, float] | None]  # by λ; None: the training failed
    lmbda: float

    @classmethod
    def load(cls, path: Path) -> "Choice":
        """Read what `save` wrote; raises FileNotFoundError."""
        kept = json.loads(path.read_text(encoding="utf-8"))
        candidates = {float(lmbda): of for lmbda, of in kept["candidates"].items()}
        return cls(kept["control"], candidates, kept["lmbda"])

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        files.save_json(asdict(self), path)


# --- numbers ---------------------------------------------------------------------------------


def rows_of(result: Result) -> list[dict[str, Any]]:
    """Return a row for each setting of one variant and seed; full precision as in float32."""
    history = json.loads(result.record.read_text())["history"]
    seconds = statistics.fmean(entry["epoch_seconds"] for entry in history[result.first:])
    rows = []
    for how, path in result.quantized.items():
        schemes = {"uniform": RECALIBRATED} if how == RECALIBRATED else {}
        for row in json.loads(path.read_text())["rows"]:
            if row["scheme"] == UNQUANTIZED and how != "folded":
                continue
            rows.append({
                "variant": result.variant, "lmbda": result.lmbda, "seed": result.seed,
                "scheme": schemes.get(row["scheme"], row["scheme"]),
                **{key: row[key] for key in ("bits", "act_bits", "levels")},
                **{key: row[key] for key in ("accuracy", "accuracy_change", "squared_error")},
                "epoch_seconds": seconds,
            })
    return rows


def tracked_rows(result: Result) -> list[dict[str, Any]]:
    """Return a row for each value that --track logged of one variant and seed."""
    return [
        {"variant": result.variant, "seed": result.seed, "epoch": entry["epoch"],
         "name": key.removeprefix("track_"), "value": value}
        for entry in json.loads(result.record.read_text())["history"]
        for key, value in entry.items() if key.startswith("track_")
    ]


def read(results: Sequence[Result]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows and the tracked rows of all results."""
    rows = [row for result in results for row in rows_of(result)]
    return rows, [row for result in results for row in tracked_rows(result)]


def setting(row: dict[str, Any]) -> Setting:
    """Return the setting of a row."""
    return row["scheme"], row["bits"], row["act_bits"]


def label(of: Setting) -> str:
    """Return the setting as a column's title."""
    scheme, bits, act_bits = of
    if of == FULL:
        return "full precision"
    return f"{scheme} {bits}" if act_bits == 32 else f"{scheme} ({bits},{act_bits})"


def by_seed(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, Setting], dict[int, float]]:
    """Return the accuracies of each variant and setting, by seed."""
    found: dict[tuple[str, Setting], dict[int, float]] = {}
    for row in rows:
        found.setdefault((row["variant"], setting(row)), {})[row["seed"]] = row["accuracy"]
    return found


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over seeds of each variant and setting."""
    lmbda = {row["variant"]: row["lmbda"] for row in rows}
    return [
        {
            "variant": variant, "lmbda": lmbda[variant], "scheme": of[0], "bits": of[1],
            "act_bits": of[2], "n": len(accuracies), "mean": statistics.fmean(accuracies.values()),
            "std": statistics.stdev(accuracies.values()) if len(accuracies) > 1 else None,
        }
        for (variant, of), accuracies in by_seed(rows).items()
    ]


def difference(a: dict[int, float], b: dict[int, float]) -> tuple[int, float, float] | None:
    """Return, of a − b over the seeds that both have: n, the mean, and half its 95 % interval.

    Paired, because variants of one seed grow out of the same network; Student's t. None below two.
    """
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    n = len(differences)
    if n < 2:
        return None
    t = T975[min(n - 1, len(T975)) - 1]
    return n, statistics.fmean(differences), t * statistics.stdev(differences) / math.sqrt(n)


def differences(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every paired difference: of PAIRS, and of each variant from the control."""
    accuracies = by_seed(rows)
    variants = dict.fromkeys(row["variant"] for row in rows)
    pairs = [*PAIRS, *((v, "control") for v in variants if v != "control")]
    found = []
    for a, b in pairs:
        for of in dict.fromkeys(map(setting, rows)):
            known = difference(accuracies.get((a, of), {}), accuracies.get((b, of), {}))
            if known:
                n, mean, half = known
                found.append({
                    "variant": a, "minus": b, "scheme": of[0], "bits": of[1], "act_bits": of[2],
                    "n": n, "mean": mean, "low": mean - half, "high": mean + half,
                })
    return found


# --- text ------------------------------------------------------------------------------------


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table: the first column to the left, numbers to the right."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *lines))


def accuracy_table(rows: Sequence[dict[str, Any]], settings: Sequence[Setting]) -> str:
    """Return the table of mean ± standard deviation, in %, with λ and the time of an epoch."""
    found = {(s["variant"], setting(s)): s for s in summary(rows)}
    seconds: dict[str, list[float]] = {}
    for row in rows:
        seconds.setdefault(row["variant"], []).append(row["epoch_seconds"])
    median = {variant: statistics.median(times) for variant, times in seconds.items()}

    def cell(variant: str, of: Setting) -> str:
        if (variant, of) not in found:
            return "–"
        mean, std = (found[variant, of][key] for key in ("mean", "std"))
        return f"{100 * mean:.2f}" if std is None else f"{100 * mean:.2f} ± {100 * std:.2f}"

    lines = []
    for variant in median:
        entry = next(s for s in found.values() if s["variant"] == variant)
        lmbda = "" if entry["lmbda"] is None else f"{entry['lmbda']:g}"
        relative = f"{median[variant] / median['control']:.2f}" if "control" in median else "–"
        cells = [cell(variant, of) for of in settings]
        lines.append([variant, lmbda, str(entry["n"]), *cells, relative])
    return markdown(["", "λ", "seeds", *map(label, settings), "epoch time"], lines)


def difference_table(rows: Sequence[dict[str, Any]], settings: Sequence[Setting]) -> str:
    """Return the table of paired differences in percentage points with their 95 % intervals."""
    lines: dict[tuple[str, str, int], dict[Setting, str]] = {}
    for d in differences(rows):
        half = 100 * (d["high"] - d["low"]) / 2
        text = f"{100 * d['mean']:+.2f} ± {half:.2f}"
        lines.setdefault((d["variant"], d["minus"], d["n"]), {})[setting(d)] = text
    return markdown(
        ["", "seeds", *map(label, settings)],
        ([f"{a} − {b}", str(n), *(cells.get(of, "–") for of in settings)]
         for (a, b, n), cells in lines.items()),
    )


def tracked_table(tracked: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of what was tracked, at the end, and of the squared error at 4 bits."""
    last: dict[str, int] = {}
    for row in tracked:
        last[row["variant"]] = max(row["epoch"], last.get(row["variant"], 0))
    values: dict[tuple[str, str], list[float]] = {}
    for row in tracked:
        if row["epoch"] == last[row["variant"]]:
            values.setdefault((row["variant"], row["name"]), []).append(row["value"])
    for row in rows:
        if setting(row) == ("uniform", 4, 32):
            values.setdefault((row["variant"], "squared error"), []).append(row["squared_error"])
    names = list(dict.fromkeys(name for _, name in values))

    def cell(variant: str, name: str) -> str:
        if (variant, name) not in values:
            return "–"
        mean = statistics.fmean(values[variant, name])
        return f"{mean:.0f}" if mean >= 100 else f"{mean:.3g}"

    variants = dict.fromkeys(variant for variant, _ in values)
    return markdown(
        ["", *names], ([variant, *(cell(variant, name) for name in names)] for variant in variants)
    )


def choice_table(choices: Mapping[str, Choice]) -> str:
    """Return the table of every λ that was tried, and which was taken."""
    def cells(of: Sequence[float] | None) -> list[str]:
        return [f"{100 * accuracy:.2f}" for accuracy in of] if of else ["failed", "–"]

    lines = [[variant, f"{lmbda:g}", *cells(of), "taken" if lmbda == choice.lmbda else ""]
             for variant, choice in choices.items() for lmbda, of in choice.candidates.items()]
    control = next(iter(choices.values())).control
    return markdown(["", "λ", "full precision", "uniform 4", ""],
                    [["control", "", *cells(control), ""], *lines])


def document(
    results: Sequence[Result], rows: Sequence[dict[str, Any]], tracked: Sequence[dict[str, Any]],
    choices: Mapping[str, Choice],
) -> str:
    """Return all tables as one markdown page, with the commands of every row."""
    settings = sorted(set(map(setting, rows)), key=lambda s: (s[0], s[2] != 32, -s[1]))
    text = ["# The study: accuracy in % on the test set, mean ± standard deviation over seeds",
            accuracy_table(rows, MAIN),
            "A b-bit PWLQ has 2^(b+1) − 1 levels. Recalibrated: uniform, then batch-norm "
            "statistics estimated again on 4,000 training images. (W,A): weights and activations, "
            "batch norms folded. Full precision and (W,A) are measured in float32, weights alone "
            "with bfloat16 convolutions. Epoch time: the mean of the regularized epochs, relative "
            "to the control's; where several jobs ran at once, all of them were slower.",
            "## Paired differences, percentage points, 95 % confidence interval",
            difference_table(rows, MAIN),
            "Student's t over seeds, each difference for itself: of twenty intervals around a true "
            "zero, one is expected to miss it."]
    for scheme in dict.fromkeys(s[0] for s in settings if s != FULL):
        columns = [FULL, *(s for s in settings if s[0] == scheme)]
        text += [f"## {scheme}", accuracy_table(rows, columns)]
    if tracked:
        text += ["## What the regularizers did", tracked_table(tracked, rows),
                 "With λ = 1 and in evaluation mode, on one batch of training images after the "
                 "last epoch, mean over seeds: one batch is noisy, and in training, where batch "
                 "norm takes the batch's statistics, gradients are smaller. The squared error is "
                 "that of uniform quantization at 4 bits."]
    if choices:
        text += ["## The choice of λ", choice_table(choices),
                 "Held-out accuracy in %, of one seed: at 4 bits seeds differ by more than these "
                 "candidates do. The commands are the first lines of the logs in tuning/."]
    text += ["## Commands", "In this order, from the root of the repository."]
    for result in results:
        text += [f"{result.variant}, seed {result.seed}:",
                 "```sh\n" + "\n".join(result.lines) + "\n```"]
    return "\n\n".join(text) + "\n"


def write(
    out: Path, results: Sequence[Result], rows: Sequence[dict[str, Any]],
    tracked: Sequence[dict[str, Any]], choices: Mapping[str, Choice],
) -> None:
    """Write tables.md and the CSV files into `out`; there is at least one result."""
    page = document(results, rows, tracked, choices)
    tables = {"results": rows, "summary": summary(rows), "differences": differences(rows),
              "tracked": tracked}
    for name, of in tables.items():
        path = out / f"{name}.csv"
        if of:
            save_csv(of, list(of[0]), path)
        else:
            path.unlink(missing_ok=True)
    files.write_file(out / "tables.md", lambda path: path.write_text(page, encoding="utf-8"))
