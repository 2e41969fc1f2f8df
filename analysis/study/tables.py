"""The tables of the study, as markdown pages and as CSV files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from analysis.study.grid import lambda_text
from analysis.study.lambda_choice import Choice, HoldoutAccuracy
from analysis.study.records import ARCHIVE_NAME
from analysis.study.results import (
    FULL_PRECISION,
    MAIN_SETTINGS,
    SETTING,
    SUMMARY_SETTINGS,
    Grouping,
    Result,
    Setting,
    Statistics,
    all_networks,
    correlations,
    deviations_within_variants,
    networks_of_each_seed,
    pivot,
)
from engine.system.io import atomic_write

ANSWER_VARIANTS = (  # of the README's table, at most eight
    "control", "l1grad", "l2grad", "variancenorm", "stepnoise", "rangenorm", "kurtosisnorm",
    "kurtosisnorm_folded",
)  # fmt: skip
MISSING = "–"
GROUPINGS = {  # titles of the tables of correlations, and the networks that each is over
    "Over all networks": all_networks,
    "Between variants: of the networks of one seed, mean over seeds, and the extremes": (
        networks_of_each_seed
    ),
    "Between seeds: deviations from the mean of the variant": deviations_within_variants,
}

SUMMARY_NOTE = (
    "(W,A): weights and activations. Epoch time: of a regularized epoch, of the fastest seed, "
    "relative to the control's: other work on the machine adds to it. Means and correlations are "
    "of the seeds that all variants share, differences and accuracy drops of all that there are."
)
TRACKED_NOTE = (
    "With λ = 1 and in evaluation mode, on one batch of training images after the last epoch, "
    "mean over seeds: one batch is noisy, and in training, where batch norm takes the batch's "
    "statistics unless they are frozen, gradients are smaller. The squared error is that of "
    "uniform quantization at 4 bits."
)
CHOICE_NOTE = (
    "Held-out accuracy in %, of one seed: candidates that differ by less than seeds do are not "
    "told apart, and a variant with more of them has more chances. The command of each is in "
    f"{ARCHIVE_NAME}, under the path tuning/…"
)


def label(setting: Setting) -> str:
    """Return the setting as a column's title."""
    scheme, bits, act_bits = setting
    if setting == FULL_PRECISION:
        return "full precision"
    return f"{scheme} {bits}" if act_bits == 32 else f"{scheme} ({bits},{act_bits})"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table: the first column to the left, numbers to the right.

    Not pandas' to_markdown, whose padding would change every line when one number grows.
    """
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *lines))


# --- tables ----------------------------------------------------------------------------------


def relative_epoch_times(rows: pd.DataFrame) -> pd.Series:
    """Return, by variant, the time of a regularized epoch in epochs of the control, as text.

    The fastest seed of each counts, since other work on the machine only adds to it.
    """
    fastest = rows.groupby("variant", sort=False)["epoch_seconds"].min()
    if "control" not in fastest:
        return fastest.map(lambda _: MISSING)
    return (fastest / fastest["control"]).map("{:.2f}".format)


def cells_by_setting(
    rows: pd.DataFrame, lines: list[str], settings: Sequence[Setting]
) -> Iterator[tuple]:
    """Yield the values of the columns `lines` and the cell in each setting, line by line."""
    table = pivot(rows, lines, SETTING, "cell").reindex(columns=list(settings))
    table = table.astype(object).fillna(MISSING)
    return table.itertuples(name=None)


def accuracy_table(
    statistics: Statistics, settings: Sequence[Setting], only: Sequence[str] = ()
) -> str:
    """Return the accuracies in %, with λ, seeds and epoch time, of all variants or `only` some."""
    header, lines = accuracy_lines(statistics, settings)
    return markdown(header, [lines[name] for name in only or lines if name in lines])


def accuracy_lines(
    statistics: Statistics, settings: Sequence[Setting]
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the header and, by variant, the lines of `accuracy_table`.

    A cell of fewer seeds than the variant has elsewhere says how many they are.
    """
    summary = statistics.summary
    times = relative_epoch_times(statistics.rows)
    n_seeds = summary.groupby("variant")["n"].transform("max")
    columns = (summary["mean"], summary["std"], summary["n"], n_seeds)
    cells = [
        f"{100 * mean:.2f}"
        + ("" if pd.isna(std) else f" ± {100 * std:.2f}")
        + ("" if n == n_most else f" (n = {n})")
        for mean, std, n, n_most in zip(*columns, strict=True)
    ]
    lmbdas = ["" if pd.isna(lmbda) else lambda_text(lmbda) for lmbda in summary["lmbda"]]
    rows = summary.assign(cell=cells, lmbda=lmbdas, n=n_seeds)
    lines = {
        name: [name, lmbda, str(n), *cells, times[name]]
        for (name, lmbda, n), *cells in cells_by_setting(rows, ["variant", "lmbda", "n"], settings)
    }
    return ["", "λ", "seeds", *map(label, settings), "epoch time"], lines


def interval_table(intervals: pd.DataFrame, settings: Sequence[Setting]) -> str:
    """Return a table of means and 95 % intervals in percentage points.

    A line has the `intervals` of one variant, or pair, over the same number of seeds.
    """
    names = intervals["variant"]
    if "minus" in intervals:
        names = names + " − " + intervals["minus"]
    half = (intervals["high"] - intervals["low"]) / 2
    means = zip(intervals["mean"], half, strict=True)
    cells = [f"{100 * mean:+.2f} ± {100 * h:.2f}" for mean, h in means]
    rows = cells_by_setting(intervals.assign(name=names, cell=cells), ["name", "n"], settings)
    lines = ([name, str(n), *line] for (name, n), *line in rows)
    return markdown(["", "seeds", *map(label, settings)], lines)


def tracked_table(final_values: pd.DataFrame) -> str:
    """Return the table of what was tracked, at the end: means over seeds."""

    def cell(mean: float) -> str:
        return MISSING if pd.isna(mean) else f"{mean:.0f}" if mean >= 100 else f"{mean:.3g}"

    means = final_values.groupby(level="variant", sort=False).mean()
    lines = ([name, *map(cell, values)] for name, values in means.iterrows())
    return markdown(["", *means.columns], lines)


def prediction_table(
    final_values: pd.DataFrame, drops: pd.DataFrame, grouped: Grouping = all_networks
) -> str:
    """Return rank correlations, over networks, of final values with drops in each setting.

    Given are the mean over the groups of networks, and the extremes.
    """

    def cell(x: pd.Series, y: pd.Series) -> str:
        rhos = correlations(x, y, grouped)
        mean = f"{sum(rhos) / len(rhos):+.2f}" if rhos else MISSING
        return f"{mean} ({min(rhos):+.2f} to {max(rhos):+.2f})" if len(rhos) > 1 else mean

    lines = (
        [name, *(cell(values, drops[setting]) for setting in drops)]
        for name, values in final_values.items()
    )
    return markdown(["", *map(label, drops)], lines)


def choice_table(choices: Mapping[str, Choice]) -> str:
    """Return the table of every λ that was tried, and which was taken."""

    def cells(accuracies: HoldoutAccuracy | None) -> list[str]:
        return [f"{100 * a:.2f}" for a in accuracies] if accuracies else ["failed", MISSING]

    lines = [
        [variant, lambda_text(lmbda), *cells(accuracies), "taken" if lmbda == choice.lmbda else ""]
        for variant, choice in choices.items()
        for lmbda, accuracies in choice.candidates.items()
    ]
    control = next(iter(choices.values())).control
    return markdown(
        ["", "λ", "full precision", "quantized", ""], [["control", "", *cells(control), ""], *lines]
    )


# --- pages -----------------------------------------------------------------------------------


def summary_note(of_grid: str) -> str:
    """Return what stands below a table of accuracies: the grid's own note first."""
    return f"{of_grid} {SUMMARY_NOTE}".strip()


def tracked_sections(statistics: Statistics) -> list[str]:
    """Return the paragraphs about what was tracked and what it goes with; none if nothing was."""
    values = statistics.final_values
    if values is None:
        return []
    settings = [setting for setting in MAIN_SETTINGS[1:] if setting[1] > 2]
    drops = statistics.drops.loc[statistics.shared_networks].reindex(columns=settings)
    sections = [
        "## What the regularizers did",
        tracked_table(values),
        TRACKED_NOTE,
        "## What goes with the accuracy drop",
        f"Spearman's rank correlation of these values with the accuracy drop of the same "
        f"{len(drops)} networks: 1 where the one with the larger value always drops more. It is "
        "no more than that: the variants were made to differ in these values, and many of them "
        "are close to the control.",
    ]
    for title, grouped in GROUPINGS.items():
        sections += [f"{title}:", prediction_table(values, drops, grouped)]
    return sections


def document(
    statistics: Statistics, results: Sequence[Result], choices: Mapping[str, Choice], note: str
) -> str:
    """Return all tables as one markdown page, with the commands of every row.

    `note` says what the grid's quantizations are.
    """
    differences = statistics.differences
    n_intervals = differences.set_index(SETTING).index.isin(MAIN_SETTINGS).sum()
    sections = [
        "# The study: accuracy in % on the test set, mean ± standard deviation over seeds",
        accuracy_table(statistics, SUMMARY_SETTINGS),
        summary_note(note),
        "## Paired differences, percentage points, 95 % confidence interval",
        interval_table(differences, MAIN_SETTINGS),
        f"Student's t over seeds, each difference for itself: of these {n_intervals} intervals "
        f"about {n_intervals / 20:.0f} are expected to miss the true difference.",
        "## Accuracy drop: full precision minus quantized, 95 % confidence interval",
        interval_table(statistics.accuracy_drops, MAIN_SETTINGS[1:]),
        "Percentage points, of the same network, over seeds.",
    ]
    settings = sorted(statistics.accuracies, key=lambda s: (s[0], s[2] != 32, -s[1]))
    for scheme in dict.fromkeys(setting[0] for setting in settings if setting != FULL_PRECISION):
        columns = [FULL_PRECISION, *(setting for setting in settings if setting[0] == scheme)]
        sections += [f"## {scheme}", accuracy_table(statistics, columns)]  # by falling bits
    sections += tracked_sections(statistics)
    if choices:
        sections += ["## The choice of λ", choice_table(choices), CHOICE_NOTE]
    sections += ["## Commands", "In this order, from the root of the repository."]
    for result in results:
        commands = "\n".join(result.commands)
        sections += [f"{result.variant}, seed {result.seed}:", f"```sh\n{commands}\n```"]
    return "\n\n".join(sections) + "\n"


def write_networks(out: Path, statistics: Mapping[str, Statistics], note: str) -> None:
    """Write networks.md: one table of every variant of every network, and the grid's note."""
    lines = []
    for network, each in statistics.items():
        header, of_network = accuracy_lines(each, SUMMARY_SETTINGS)
        lines += [[network, *line] for line in of_network.values()]
    page = "\n\n".join(
        [
            "# Every network: accuracy in % on the test set, mean ± standard deviation over seeds",
            markdown(["network", "variant", *header[1:]], lines),
            summary_note(note),
        ]
    )
    atomic_write(out / "networks.md", partial(Path.write_bytes, data=(page + "\n").encode()))


def write_tables(
    out: Path,
    statistics: Statistics,
    results: Sequence[Result],
    choices: Mapping[str, Choice],
    note: str,
) -> None:
    """Write tables.md, answer.md and the CSV files into `out`; there is at least one result."""
    for name in ("results", "summary", "differences", "accuracy_drops", "tracked"):
        path = out / f"{name}.csv"
        table = getattr(statistics, "rows" if name == "results" else name)
        if len(table):
            atomic_write(path, partial(table.to_csv, index=False))
        else:
            path.unlink(missing_ok=True)
    pages = {
        "tables": document(statistics, results, choices, note),
        "answer": accuracy_table(statistics, SUMMARY_SETTINGS, ANSWER_VARIANTS) + "\n",
    }
    for name, page in pages.items():
        atomic_write(out / f"{name}.md", partial(Path.write_bytes, data=page.encode()))
