"""The results of the study as rows, and what they say: means, paired differences, correlations.

A setting is (scheme, bits of weights, bits of activations): ("none", 32, 32) is full precision.
Networks whose activations are quantized have their batch norms folded. "recalibrated" are those
whose batch-norm statistics were estimated again after uniform quantization, "corrected" (of uniform
quantization) and "corrected pwlq" those whose channels of weights keep their means, with outliers
among the activations clipped.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis.report import UNQUANTIZED
from engine.io import read_json, save_json

Setting = tuple[str, int, int]
FULL: Setting = (UNQUANTIZED, 32, 32)
SCHEME_OF = {  # what a scheme is called in rows, by study.QUANTIZATIONS; or as it is
    ("recalibrated", "uniform"): "recalibrated",
    ("corrected", "uniform"): "corrected",
    ("corrected_folded", "uniform"): "corrected",
    ("corrected_folded", "pwlq"): "corrected pwlq",
}
# Of the first table, and of figures and differences.
SUMMARY_SETTINGS: list[Setting] = [
    FULL,
    *(("uniform", bits, 32) for bits in (4, 3, 2)),
    ("uniform", 4, 4),
]
MAIN: list[Setting] = [
    FULL,
    *((scheme, bits, 32) for scheme in ("uniform", "corrected") for bits in (4, 3, 2)),
    *((scheme, 4, 4) for scheme in ("uniform", "corrected", "corrected pwlq")),
]
PAIRS = (  # beside every variant minus the control
    ("l2grad", "l1grad"),
    ("l2grad_weights", "l1grad_weights"),
    ("stepl2grad", "stepl1grad"),
    ("l2grad_frozen", "control_frozen"),
    ("l2grad_frozen", "stepnoise_frozen"),
    ("rangenorm", "l2grad"),
    ("rangenorm", "kurtosisnorm"),
    ("rangenorm_folded", "rangenorm"),
    ("kurtosisnorm_folded", "kurtosisnorm"),
    ("kurtosisnorm_folded", "rangenorm_folded"),
    ("stepnoise_frozen", "control_frozen"),
    ("stepnoise_frozen", "stepnoise"),
    ("stepl2grad", "l2grad"),
    ("stepl1grad", "l1grad"),
    ("l2grad", "stepnoise"),
    ("stepl1grad", "stepnoise"),
    ("stepl2grad", "stepnoise"),
    ("rangenorm", "stepnoise"),
    ("stepl2grad", "stepl2grad_held"),
    ("stepl1grad", "stepl1grad_held"),
    ("rangenorm", "stepl2grad"),
    ("rangenorm", "stepl1grad"),
    ("l2grad_weights", "l2grad"),
    ("l1grad_weights", "l1grad"),
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
    quantized: dict[str, Path]  # the results.json of each of study.FINAL
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
        """Read what `save` wrote; raises FileError."""
        with read_json(path) as kept:
            candidates = {
                float(lmbda): of and _pair(of) for lmbda, of in kept["candidates"].items()
            }
            if not candidates[kept["lmbda"]]:
                raise ValueError("the λ that was taken has no accuracies")
            return cls(_pair(kept["control"]), candidates, float(kept["lmbda"]))

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        save_json(asdict(self), path)


def _pair(of: Sequence[Any]) -> tuple[float, float]:
    """Return both accuracies as numbers; raises ValueError or TypeError."""
    full, quantized = map(float, of)
    return full, quantized


def rows_of(result: Result, history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each setting of one variant and seed; full precision as in float32.

    `history` is that of the training's record. Raises FileError.
    """
    seconds = statistics.fmean(entry["epoch_seconds"] for entry in history[result.first :])
    rows = []
    for how, path in result.quantized.items():
        with read_json(path) as quantized:
            for row in quantized["rows"]:
                if row["scheme"] == UNQUANTIZED and how != "folded":
                    continue
                rows.append(
                    {
                        "variant": result.variant,
                        "lmbda": result.lmbda,
                        "seed": result.seed,
                        "scheme": SCHEME_OF.get((how, row["scheme"]), row["scheme"]),
                        **{key: row[key] for key in ("bits", "act_bits", "levels")},
                        **{
                            key: float(row[key])
                            for key in ("accuracy", "accuracy_change", "squared_error")
                        },
                        "epoch_seconds": seconds,
                    }
                )
    return rows


def tracked_rows(result: Result, history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each value that --track logged of one variant and seed."""
    return [
        {
            "variant": result.variant,
            "seed": result.seed,
            "epoch": entry["epoch"],
            "name": key.removeprefix("track_"),
            "value": value,
        }
        for entry in history
        for key, value in entry.items()
        if key.startswith("track_")
    ]


def read(results: Sequence[Result]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows and the tracked rows of all results; raises FileError."""
    rows, tracked = [], []
    for result in results:
        with read_json(result.record) as record:
            rows += rows_of(result, record["history"])
            tracked += tracked_rows(result, record["history"])
    return rows, tracked


def setting(row: dict[str, Any]) -> Setting:
    """Return the setting of a row."""
    return row["scheme"], row["bits"], row["act_bits"]


def network(row: dict[str, Any]) -> tuple[str, int]:
    """Return the network of a row, as variant and seed."""
    return row["variant"], row["seed"]


def by_seed(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, Setting], dict[int, float]]:
    """Return the accuracies of each variant and setting, by seed."""
    found: dict[tuple[str, Setting], dict[int, float]] = {}
    for row in rows:
        found.setdefault((row["variant"], setting(row)), {})[row["seed"]] = row["accuracy"]
    return found


def restrict_to_shared_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the seeds that all variants share: means beside each other are of these.

    Of a variant with one seed so far every row, and of all where they share none.
    """
    seeds: dict[str, set[int]] = {}
    for row in rows:
        seeds.setdefault(row["variant"], set()).add(row["seed"])
    several = [of for of in seeds.values() if len(of) > 1]
    shared = set.intersection(*several) if several else set()
    return [
        row
        for row in rows
        if not shared or row["seed"] in shared or len(seeds[row["variant"]]) == 1
    ]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over comparable seeds of each variant and setting."""
    lmbda = {row["variant"]: row["lmbda"] for row in rows}
    return [
        {
            "variant": variant,
            "lmbda": lmbda[variant],
            "scheme": of[0],
            "bits": of[1],
            "act_bits": of[2],
            "n": len(accuracies),
            "mean": statistics.fmean(accuracies.values()),
            "std": statistics.stdev(accuracies.values()) if len(accuracies) > 1 else None,
        }
        for (variant, of), accuracies in by_seed(restrict_to_shared_seeds(rows)).items()
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
                found.append({"variant": a, "minus": b, **_interval(of, known)})
    return found


def accuracy_drops(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what quantization costs each variant: full precision minus quantized, by network."""
    accuracies = by_seed(rows)
    found = []
    for (variant, of), quantized in accuracies.items():
        known = difference(accuracies.get((variant, FULL), {}), quantized)
        if known and of != FULL:
            found.append({"variant": variant, **_interval(of, known)})
    return found


def _interval(of: Setting, known: tuple[int, float, float]) -> dict[str, Any]:
    """Return what `difference` found in that setting, as the end of a row."""
    n, mean, half = known
    return {
        "scheme": of[0],
        "bits": of[1],
        "act_bits": of[2],
        "n": n,
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
    }


Networks = dict[tuple[str, int], float]  # a number of each network, by variant and seed
FinalValues = dict[str, Networks]  # by name


def accuracy_drop(rows: Sequence[dict[str, Any]], of: Setting) -> Networks:
    """Return what that setting costs each network: full precision minus its accuracy there."""
    full, there = (
        {network(row): row["accuracy"] for row in rows if setting(row) == which}
        for which in (FULL, of)
    )
    return {key: full[key] - there[key] for key in full if key in there}


def final_values(tracked: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> FinalValues:
    """Return what was tracked after each network's last epoch, and its squared error at 4 bits."""
    last: dict[tuple[str, int], int] = {}
    for row in tracked:
        last[network(row)] = max(row["epoch"], last.get(network(row), 0))
    ends: FinalValues = {}
    for row in tracked:
        if row["epoch"] == last[network(row)]:
            ends.setdefault(row["name"], {})[network(row)] = row["value"]
    for row in rows:
        if setting(row) == ("uniform", 4, 32):
            ends.setdefault("squared error", {})[network(row)] = row["squared_error"]
    return ends


Points = list[tuple[float, float]]  # (x, y) of networks


def all_networks(x: Networks, y: Networks) -> list[Points]:
    """Return one group: (x, y) of each network that has both."""
    return [[(x[key], y[key]) for key in x if key in y]]


def of_each_seed(x: Networks, y: Networks) -> list[Points]:
    """Return a group for each seed, its networks: they differ by their variant alone."""
    groups: dict[int, Points] = {}
    for (variant, seed), value in x.items():
        if (variant, seed) in y:
            groups.setdefault(seed, []).append((value, y[variant, seed]))
    return list(groups.values())


def within_variants(x: Networks, y: Networks) -> list[Points]:
    """Return one group: each network's (x, y) as deviations from the mean of its variant."""
    of: dict[str, Points] = {}
    for (variant, seed), value in x.items():
        if (variant, seed) in y:
            of.setdefault(variant, []).append((value, y[variant, seed]))
    deviations = []
    for points in of.values():
        mean_x, mean_y = (statistics.fmean(values) for values in zip(*points, strict=True))
        if len(points) > 1:
            deviations += [(a - mean_x, b - mean_y) for a, b in points]
    return [deviations]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's ρ, with mean ranks for equal values; None where one of them is constant."""

    def ranks(of: Sequence[float]) -> list[float]:
        return [sum(v < u for v in of) + sum(v == u for v in of) / 2 for u in of]

    try:
        return statistics.correlation(ranks(x), ranks(y))
    except statistics.StatisticsError:
        return None
