"""The results of the study as tables, and what they say: means, paired differences, correlations.

Rows have a network, its variant and seed, and a setting, (scheme, bits of weights, bits of
activations): ("none", 32, 32) is full precision. Networks whose activations are quantized have
their batch norms folded. "recalibrated" are those whose batch-norm statistics were estimated again
after uniform quantization, "corrected" (of uniform quantization) and "corrected pwlq" those whose
channels of weights keep their means, with outliers among the activations clipped.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

import data
from analysis.report import UNQUANTIZED
from analysis.study.grid import Quantization
from analysis.study.records import StudyRecords

Setting = tuple[str, int, int]
FULL_PRECISION: Setting = (UNQUANTIZED, 32, 32)
UNIFORM_4: Setting = ("uniform", 4, 32)
# Columns of the first table and of the README's.
SUMMARY_SETTINGS: list[Setting] = [
    FULL_PRECISION,
    *(("uniform", bits, 32) for bits in (4, 3, 2)),
    ("uniform", 4, 4),
]
# Columns of the tables of differences, panels of the overview figure.
MAIN_SETTINGS: list[Setting] = [
    FULL_PRECISION,
    *((scheme, bits, 32) for scheme in ("uniform", "corrected") for bits in (4, 3, 2)),
    *((scheme, 4, 4) for scheme in ("uniform", "corrected", "corrected pwlq")),
]
COMPARED_PAIRS = (  # compared beside every variant minus the control
    ("l2grad", "l1grad"), ("l2grad_weights", "l1grad_weights"), ("stepl2grad", "stepl1grad"),
    ("l2grad_frozen", "control_frozen"), ("l2grad_frozen", "stepnoise_frozen"),
    ("rangenorm", "l2grad"), ("rangenorm", "kurtosisnorm"), ("rangenorm_folded", "rangenorm"),
    ("kurtosisnorm_folded", "kurtosisnorm"), ("kurtosisnorm_folded", "rangenorm_folded"),
    ("stepnoise_frozen", "control_frozen"), ("stepnoise_frozen", "stepnoise"),
    ("stepl2grad", "l2grad"), ("stepl1grad", "l1grad"), ("l2grad", "stepnoise"),
    ("stepl1grad", "stepnoise"), ("stepl2grad", "stepnoise"), ("rangenorm", "stepnoise"),
    ("stepl2grad", "stepl2grad_held"), ("stepl1grad", "stepl1grad_held"),
    ("rangenorm", "stepl2grad"), ("rangenorm", "stepl1grad"),
    ("l2grad_weights", "l2grad"), ("l1grad_weights", "l1grad"),
)  # fmt: skip
CONFIDENCE = 0.95  # of every interval
MIN_NETWORKS = 3  # for a correlation

NETWORK = ["variant", "seed"]
SETTING = ["scheme", "bits", "act_bits"]
ROW_COLUMNS = ["variant", "lmbda", "seed", *SETTING, "levels"]
ROW_COLUMNS += ["accuracy", "accuracy_change", "squared_error", "epoch_seconds"]
TRACKED_COLUMNS = ["variant", "seed", "epoch", "name", "value"]


# --- reading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Where the final results of one variant and seed are, and how to reproduce them."""

    variant: str
    lmbda: float | None
    seed: int
    training: Path  # its record
    quantized: dict[str, Path]  # the results.json of each final quantization, by its name
    commands: list[str]


def quantization_rows(
    result: Result, records: StudyRecords, quantizations: Mapping[str, Quantization], seconds: float
) -> Iterator[tuple]:
    """Yield a row of ROW_COLUMNS for each setting of one network.

    `seconds` is the time of a regularized epoch. Raises FileError.
    """
    for quantization, path in result.quantized.items():
        how = quantizations[quantization]
        with records.open(path) as quantized:
            for row in quantized["rows"]:
                if row["scheme"] == UNQUANTIZED and not how.full_precision:
                    continue
                network = (result.variant, result.lmbda, result.seed)
                scheme = how.names.get(row["scheme"], row["scheme"])
                integers = [row[key] for key in ("bits", "act_bits", "levels")]
                numbers = ("accuracy", "accuracy_change", "squared_error")
                yield *network, scheme, *integers, *(float(row[key]) for key in numbers), seconds


def read_results(
    results: Sequence[Result],
    records: StudyRecords,
    quantizations: Mapping[str, Quantization],
    first: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of all results, and what was tracked; regularized from epoch `first` on."""
    rows = []
    tracked = []
    for result in results:
        with records.open(result.training) as record:
            history = record["history"]
            seconds = statistics.fmean(entry["epoch_seconds"] for entry in history[first:])
            for entry in history:
                names = [key.removeprefix("track_") for key in entry if key.startswith("track_")]
                epoch = (result.variant, result.seed, entry["epoch"])
                tracked += [(*epoch, name, entry[f"track_{name}"]) for name in names]
        rows += quantization_rows(result, records, quantizations, seconds)
    frame = pd.DataFrame(rows, columns=ROW_COLUMNS).astype({"levels": "Int64"})
    return frame, pd.DataFrame(tracked, columns=TRACKED_COLUMNS)


def count_classes(record: Mapping[str, Any]) -> int | None:
    """Return the number of classes of a training's data set, None where its record has none."""
    classes = record.get("classes") or data.CLASSES.get(record["settings"].get("dataset"))
    return len(classes) if classes else None


# --- means and differences -------------------------------------------------------------------


def restrict_to_shared_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of seeds that all variants have, so that means are of the same seeds.

    Variants with one seed keep their rows and do not count. Where no seed is shared all rows stay.
    """
    seeds = rows.groupby("variant", sort=False)["seed"].agg(set)
    several = [seeds_of_one for seeds_of_one in seeds if len(seeds_of_one) > 1]
    shared = set.intersection(*several) if several else set()
    if not shared:
        return rows
    single = seeds.index[seeds.map(len) == 1]
    return rows[rows["seed"].isin(shared) | rows["variant"].isin(single)]


def pivot(rows: pd.DataFrame, lines: list[str], columns: list[str], values: str) -> pd.DataFrame:
    """Return a column of `rows` as a matrix, whose lines and columns stay in their first order."""
    matrix = rows.pivot(index=lines, columns=columns, values=values)
    return matrix.reindex(index=distinct(rows, lines), columns=distinct(rows, columns))


def distinct(rows: pd.DataFrame, columns: list[str]) -> pd.Index:
    """Return the combinations of values that the columns have, in their first order."""
    return rows.set_index(columns).index.unique()


def summary(shared_rows: pd.DataFrame) -> pd.DataFrame:
    """Return n, mean and standard deviation of the accuracy of each variant and setting."""
    groups = shared_rows.groupby(["variant", *SETTING], sort=False)
    table = groups["accuracy"].agg(n="count", mean="mean", std="std").reset_index()
    lmbda = shared_rows.drop_duplicates("variant").set_index("variant")["lmbda"]
    table.insert(1, "lmbda", table["variant"].map(lmbda))
    return table


def mean_intervals(values: pd.DataFrame) -> pd.DataFrame:
    """Return n, mean and its 95 % confidence interval, low to high, of each column.

    By Student's t; a column with fewer than two values is left out.
    """
    values = values.loc[:, values.count() > 1]
    n = values.count()
    # Correctly rounded: a sum in another order would tip published means that end in half a digit.
    means = [statistics.fmean(column.dropna()) for _, column in values.items()]
    mean = pd.Series(means, values.columns, dtype=float)
    t = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    half = t * values.std() / np.sqrt(n)
    return pd.DataFrame({"n": n, "mean": mean, "low": mean - half, "high": mean + half})


def differences(accuracies: pd.DataFrame) -> pd.DataFrame:
    """Return differences, paired by seed: COMPARED_PAIRS, and each variant minus the control."""
    variants = accuracies.index.unique("variant")
    pairs = [*COMPARED_PAIRS, *((name, "control") for name in variants if name != "control")]
    tables = {
        (a, b): mean_intervals(accuracies.loc[a] - accuracies.loc[b])
        for a, b in pairs
        if a in variants and b in variants
    }
    return _stack(tables, ["variant", "minus"])


def network_drops(accuracies: pd.DataFrame) -> pd.DataFrame:
    """Return what each setting costs each network: full precision minus its accuracy there."""
    full = accuracies[FULL_PRECISION] if FULL_PRECISION in accuracies else np.nan
    return accuracies.drop(columns=[FULL_PRECISION], errors="ignore").rsub(full, axis="index")


def accuracy_drops(drops: pd.DataFrame) -> pd.DataFrame:
    """Return the mean accuracy drop of each variant and setting; `drops` is by network."""
    groups = drops.groupby(level=0, sort=False)
    return _stack({(name,): mean_intervals(group) for name, group in groups}, ["variant"])


def _stack(tables: dict[tuple[str, ...], pd.DataFrame], names: list[str]) -> pd.DataFrame:
    """Return the tables of intervals below each other, with columns for keys and settings."""
    if not tables:
        return pd.DataFrame(columns=[*names, *SETTING, "n", "mean", "low", "high"])
    return pd.concat(tables, names=[*names, *SETTING]).reset_index()


# --- correlations ----------------------------------------------------------------------------


def final_values(tracked: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return what was tracked after each network's last epoch, and its squared error at 4 bits."""
    last = tracked[tracked["epoch"] == tracked.groupby(NETWORK)["epoch"].transform("max")]
    at_4_bits = rows[rows.set_index(SETTING).index.isin([UNIFORM_4])]
    errors = at_4_bits.assign(name="squared error", value=at_4_bits["squared_error"])
    return pivot(pd.concat([last, errors]), NETWORK, ["name"], "value")


Groups = list[pd.DataFrame]  # of networks, with columns x and y
Grouping = Callable[[pd.DataFrame], Groups]


def all_networks(pairs: pd.DataFrame) -> Groups:
    """Return one group: the (x, y) of every network."""
    return [pairs]


def networks_of_each_seed(pairs: pd.DataFrame) -> Groups:
    """Return a group for each seed: its networks differ by their variant alone."""
    return [group for _, group in pairs.groupby(level="seed", sort=False)]


def deviations_within_variants(pairs: pd.DataFrame) -> Groups:
    """Return one group: deviations from the mean (x, y) of a variant, where that has several."""
    groups = pairs.groupby(level="variant", sort=False)
    deviations = pairs - groups.transform("mean")
    return [deviations[groups["x"].transform("size") > 1]]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's ρ; None with fewer than MIN_NETWORKS pairs, or where x or y is constant."""
    if len(x) < MIN_NETWORKS or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return scipy.stats.spearmanr(x, y).statistic


def correlations(x: pd.Series, y: pd.Series, grouped: Grouping) -> list[float]:
    """Return the rank correlation of x and y, values of networks, in each group where it exists."""
    networks = pd.DataFrame({"x": x, "y": y}).dropna()
    if len(networks) < MIN_NETWORKS:  # so no group has enough of them
        return []
    rhos = [rank_correlation(pairs["x"], pairs["y"]) for pairs in grouped(networks)]
    return [rho for rho in rhos if rho is not None]


# --- all of it -------------------------------------------------------------------------------


class Statistics:
    """What the tables and figures show, worked out once from the tables of `read_results`.

    There is at least one row. Means and correlations are of the seeds that all variants share,
    differences and accuracy drops of all seeds.
    """

    def __init__(self, rows: pd.DataFrame, tracked: pd.DataFrame) -> None:
        self.rows = rows
        self.tracked = tracked
        self.accuracies = pivot(rows, NETWORK, SETTING, "accuracy")  # by network and setting
        self.differences = differences(self.accuracies)
        self.drops = network_drops(self.accuracies)  # by network and setting
        self.accuracy_drops = accuracy_drops(self.drops)
        shared_rows = restrict_to_shared_seeds(rows)
        self.shared_networks = distinct(shared_rows, NETWORK)
        self.summary = summary(shared_rows)
        self.final_values = None  # where nothing was tracked
        if len(tracked):
            self.final_values = final_values(restrict_to_shared_seeds(tracked), shared_rows)
