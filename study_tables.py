"""The tables of the study: means and standard deviations over seeds, paired differences.

A setting is (scheme, bits of weights, bits of activations): ("none", 32, 32) is full precision.
Networks whose activations are quantized have their batch norms folded.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import files
from report import UNQUANTIZED, save_csv

Setting = tuple[str, int, int]
FULL: Setting = (UNQUANTIZED, 32, 32)
MAIN: list[Setting] = [
    FULL, *(("uniform", bits, 32) for bits in (4, 3, 2)), ("pwlq", 3, 32), ("uniform", 4, 4),
]
PAIRS = (  # beside every variant minus the control
    ("l2grad", "l1grad"), ("l2grad_weights", "l1grad_weights"), ("stepl2grad", "stepl1grad"),
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


# --- times of jobs ---------------------------------------------------------------------------


def note(out: Path, kind: str, seconds: float, line: str) -> None:
    """Add a job that was run at one go to <out>/jobs.jsonl."""
    with open(out / "jobs.jsonl", "a", encoding="utf-8") as file:
        print(json.dumps({"kind": kind, "seconds": round(seconds, 1), "command": line}), file=file)


def job_seconds(out: Path) -> dict[str, float]:
    """Return the median time of the jobs of each kind that <out>/jobs.jsonl knows."""
    found: dict[str, list[float]] = {}
    path = out / "jobs.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        job = json.loads(line)
        found.setdefault(job["kind"], []).append(job["seconds"])
    return {kind: statistics.median(seconds) for kind, seconds in found.items()}


# --- numbers ---------------------------------------------------------------------------------


def rows_of(result: Result) -> list[dict[str, Any]]:
    """Return a row for each setting of one variant and seed."""
    history = json.loads(result.record.read_text())["history"]
    seconds = statistics.median(entry["epoch_seconds"] for entry in history[result.first:])
    rows = []
    for how, path in result.quantized.items():
        for row in json.loads(path.read_text())["rows"]:
            if row["scheme"] == UNQUANTIZED and how != "weights":
                continue
            rows.append({
                "variant": result.variant, "lmbda": result.lmbda, "seed": result.seed,
                **{key: row[key] for key in ("scheme", "bits", "act_bits", "levels")},
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
    lines: dict[tuple[str, str], dict[Setting, str]] = {}
    for d in differences(rows):
        half = 100 * (d["high"] - d["low"]) / 2
        text = f"{100 * d['mean']:+.2f} ± {half:.2f}"
        lines.setdefault((d["variant"], d["minus"]), {})[setting(d)] = text
    return markdown(
        ["", *map(label, settings)],
        ([f"{a} − {b}", *(cells.get(of, "–") for of in settings)]
         for (a, b), cells in lines.items()),
    )


def tracked_table(tracked: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of what was tracked, at the end, and of the squared error at 4 bits."""
    last = max(row["epoch"] for row in tracked)
    values: dict[tuple[str, str], list[float]] = {}
    for row in tracked:
        if row["epoch"] == last:
            values.setdefault((row["variant"], row["name"]), []).append(row["value"])
    for row in rows:
        if setting(row) == ("uniform", 4, 32):
            values.setdefault((row["variant"], "squared error"), []).append(row["squared_error"])
    names = list(dict.fromkeys(name for _, name in values))
    lines = []
    for variant in dict.fromkeys(variant for variant, _ in values):
        means = [statistics.fmean(values[variant, name]) for name in names]
        lines.append([variant, *(f"{m:.0f}" if m >= 100 else f"{m:.3g}" for m in means)])
    return markdown(["", *names], lines)


def document(
    results: Sequence[Result], rows: Sequence[dict[str, Any]], tracked: Sequence[dict[str, Any]]
) -> str:
    """Return all tables as one markdown page, with the commands of every row."""
    settings = sorted(set(map(setting, rows)), key=lambda s: (s[0], s[2] != 32, -s[1]))
    text = ["# The study: accuracy in % on the test set, mean ± standard deviation over seeds",
            accuracy_table(rows, MAIN),
            "A b-bit PWLQ has 2^(b+1) − 1 levels. (W,A): weights and activations, batch norms "
            "folded. Epoch time: of a regularized epoch, relative to the control's.",
            "## Paired differences, percentage points, 95 % confidence interval",
            difference_table(rows, MAIN)]
    for scheme in dict.fromkeys(s[0] for s in settings if s != FULL):
        columns = [FULL, *(s for s in settings if s[0] == scheme)]
        text += [f"## {scheme}", accuracy_table(rows, columns)]
    if tracked:
        text += ["## What the regularizers did", tracked_table(tracked, rows),
                 "With λ = 1, on one batch of 128 training images after the last epoch, mean over "
                 "seeds; the squared error is that of uniform quantization at 4 bits."]
    threads = sorted({json.loads(r.record.read_text())["machine"]["threads"] for r in results})
    text += ["## Commands", "In this order, from the root of the repository; for the same bits, on "
             f"such a machine and with OMP_NUM_THREADS={' or '.join(map(str, threads))}."]
    for result in results:
        text += [f"{result.variant}, seed {result.seed}:",
                 "```sh\n" + "\n".join(result.lines) + "\n```"]
    return "\n\n".join(text) + "\n"


def write(out: Path, results: Sequence[Result]) -> None:
    """Write tables.md and the CSV files into `out`; there is at least one result."""
    rows = [row for result in results for row in rows_of(result)]
    tracked = [row for result in results for row in tracked_rows(result)]
    page = document(results, rows, tracked)
    tables = {"results": rows, "summary": summary(rows), "differences": differences(rows),
              "tracked": tracked}
    for name, of in tables.items():
        if of:
            save_csv(of, list(of[0]), out / f"{name}.csv")
    files.write_file(out / "tables.md", lambda path: path.write_text(page, encoding="utf-8"))
