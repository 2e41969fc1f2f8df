"""The tables of the study, as one markdown page and as CSV files."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.report import save_csv
from analysis.study_results import (
    FULL,
    MAIN,
    SUMMARY_SETTINGS,
    Choice,
    FinalValues,
    Networks,
    Points,
    Result,
    Setting,
    accuracy_drop,
    accuracy_drops,
    all_networks,
    differences,
    final_values,
    network,
    of_each_seed,
    rank_correlation,
    restrict_to_shared_seeds,
    setting,
    summary,
    within_variants,
)
from engine.io import atomic_write


def label(of: Setting) -> str:
    """Return the setting as a column's title."""
    scheme, bits, act_bits = of
    if of == FULL:
        return "full precision"
    return f"{scheme} {bits}" if act_bits == 32 else f"{scheme} ({bits},{act_bits})"


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
    fastest = {variant: min(times) for variant, times in seconds.items()}

    def cell(variant: str, of: Setting) -> str:
        if (variant, of) not in found:
            return "–"
        mean, std = (found[variant, of][key] for key in ("mean", "std"))
        return f"{100 * mean:.2f}" if std is None else f"{100 * mean:.2f} ± {100 * std:.2f}"

    lines = []
    for variant in fastest:
        entry = next(s for s in found.values() if s["variant"] == variant)
        lmbda = "" if entry["lmbda"] is None else f"{entry['lmbda']:g}"
        relative = f"{fastest[variant] / fastest['control']:.2f}" if "control" in fastest else "–"
        cells = [cell(variant, of) for of in settings]
        lines.append([variant, lmbda, str(entry["n"]), *cells, relative])
    return markdown(["", "λ", "seeds", *map(label, settings), "epoch time"], lines)


def difference_table(rows: Sequence[dict[str, Any]], settings: Sequence[Setting]) -> str:
    """Return the table of paired differences in percentage points with their 95 % intervals."""
    return interval_table(differences(rows), settings, lambda d: f"{d['variant']} − {d['minus']}")


def loss_table(rows: Sequence[dict[str, Any]], settings: Sequence[Setting]) -> str:
    """Return the table of what quantization costs, in percentage points with 95 % intervals."""
    return interval_table(accuracy_drops(rows), settings, lambda d: d["variant"])


def interval_table(
    found: Sequence[dict[str, Any]],
    settings: Sequence[Setting],
    name: Callable[[dict[str, Any]], str],
) -> str:
    """Return a table of means and 95 % intervals in percentage points, with a line a name."""
    lines: dict[tuple[str, int], dict[Setting, str]] = {}
    for d in found:
        half = 100 * (d["high"] - d["low"]) / 2
        text = f"{100 * d['mean']:+.2f} ± {half:.2f}"
        lines.setdefault((name(d), d["n"]), {})[setting(d)] = text
    return markdown(
        ["", "seeds", *map(label, settings)],
        (
            [of, str(n), *(cells.get(of, "–") for of in settings)]
            for (of, n), cells in lines.items()
        ),
    )


def tracked_table(ends: FinalValues) -> str:
    """Return the table of what was tracked, at the end: means over seeds."""
    values: dict[tuple[str, str], list[float]] = {}
    for name, of in ends.items():
        for (variant, _), value in of.items():
            values.setdefault((variant, name), []).append(value)

    def cell(variant: str, name: str) -> str:
        if (variant, name) not in values:
            return "–"
        mean = statistics.fmean(values[variant, name])
        return f"{mean:.0f}" if mean >= 100 else f"{mean:.3g}"

    variants = dict.fromkeys(variant for of in ends.values() for variant, _ in of)
    return markdown(
        ["", *ends], ([variant, *(cell(variant, name) for name in ends)] for variant in variants)
    )


def prediction_table(
    ends: FinalValues,
    lost: Mapping[Setting, Networks],
    grouped: Callable[[Networks, Networks], list[Points]] = all_networks,
) -> str:
    """Return the rank correlations of each name's values with the points lost in each setting.

    The mean of those of the groups that have at least three networks, and the extremes.
    """

    def cell(of: Networks, points: Networks) -> str:
        groups = [group for group in grouped(of, points) if len(group) > 2]
        found = [rank_correlation(*zip(*group, strict=True)) for group in groups]
        known = [rho for rho in found if rho is not None]
        mean = f"{statistics.fmean(known):+.2f}" if known else "–"
        return f"{mean} ({min(known):+.2f} to {max(known):+.2f})" if len(known) > 1 else mean

    return markdown(
        ["", *map(label, lost)],
        ([name, *(cell(of, points) for points in lost.values())] for name, of in ends.items()),
    )


def choice_table(choices: Mapping[str, Choice]) -> str:
    """Return the table of every λ that was tried, and which was taken."""

    def cells(of: Sequence[float] | None) -> list[str]:
        return [f"{100 * accuracy:.2f}" for accuracy in of] if of else ["failed", "–"]

    lines = [
        [variant, f"{lmbda:g}", *cells(of), "taken" if lmbda == choice.lmbda else ""]
        for variant, choice in choices.items()
        for lmbda, of in choice.candidates.items()
    ]
    control = next(iter(choices.values())).control
    return markdown(
        ["", "λ", "full precision", "uniform 4", ""], [["control", "", *cells(control), ""], *lines]
    )


def document(
    results: Sequence[Result],
    rows: Sequence[dict[str, Any]],
    tracked: Sequence[dict[str, Any]],
    choices: Mapping[str, Choice],
) -> str:
    """Return all tables as one markdown page, with the commands of every row."""
    settings = sorted(set(map(setting, rows)), key=lambda s: (s[0], s[2] != 32, -s[1]))
    n_intervals = sum(setting(d) in MAIN for d in differences(rows))
    text = [
        "# The study: accuracy in % on the test set, mean ± standard deviation over seeds",
        accuracy_table(rows, SUMMARY_SETTINGS),
        "A b-bit PWLQ has 2^(b+1) − 1 levels. Recalibrated: uniform, then batch-norm "
        "statistics estimated again on 4,000 training images. (W,A): weights and activations, "
        "batch norms folded. Corrected: uniform, or PWLQ, then the mean of every channel of "
        "weights as before (--mean_correction); at (4,4) the range of an activation is then "
        "without its 0.01 % largest values, in place of the median of the ten largest. Full "
        "precision and (W,A) are measured in float32, weights alone in bfloat16 convolutions; "
        "of dorefa, which is stochastic, one rounding. Epoch time: of a regularized epoch, of "
        "the fastest seed, relative to the control's: other work on the machine adds to it. "
        "Means and correlations are of the seeds that all variants share, differences and "
        "points lost of all that there are.",
        "## Paired differences, percentage points, 95 % confidence interval",
        difference_table(rows, MAIN),
        f"Student's t over seeds, each difference for itself: of these {n_intervals} intervals "
        f"about {n_intervals / 20:.0f} are expected to miss the true difference.",
        "## Points lost: full precision minus quantized, 95 % confidence interval",
        loss_table(rows, MAIN[1:]),
        "Of the same network, over seeds.",
    ]
    for scheme in dict.fromkeys(s[0] for s in settings if s != FULL):
        columns = [FULL, *(s for s in settings if s[0] == scheme)]
        text += [f"## {scheme}", accuracy_table(rows, columns)]
    if tracked:
        compared = restrict_to_shared_seeds(rows)
        ends = final_values(restrict_to_shared_seeds(tracked), compared)
        networks = set(map(network, compared))
        text += [
            "## What the regularizers did",
            tracked_table(ends),
            "With λ = 1 and in evaluation mode, on one batch of training images after the "
            "last epoch, mean over seeds: one batch is noisy, and in training, where batch "
            "norm takes the batch's statistics unless they are frozen, gradients are smaller. "
            "The squared error is that of uniform quantization at 4 bits.",
            "## What goes with the accuracy that quantization loses",
            f"Spearman's rank correlation of these values with the points of accuracy that "
            f"the same {len(networks)} networks lose: 1 where the one with the larger value "
            "always loses more. It is no more than that: the variants were made to "
            "differ in these values, and many of them are close to the control.",
        ]
        lost = {of: accuracy_drop(compared, of) for of in MAIN[1:] if of[1] > 2}
        for title, grouped in (
            ("Over all networks", all_networks),
            (
                "Between variants: of the networks of one seed, mean over seeds, and the extremes",
                of_each_seed,
            ),
            ("Between seeds: deviations from the mean of the variant", within_variants),
        ):
            text += [f"{title}:", prediction_table(ends, lost, grouped)]
    if choices:
        text += [
            "## The choice of λ",
            choice_table(choices),
            "Held-out accuracy in %, of one seed: candidates that differ by less than seeds "
            "do are not told apart, and a variant with more of them has more chances. "
            "The commands are the first lines of the logs in tuning/.",
        ]
    text += ["## Commands", "In this order, from the root of the repository."]
    for result in results:
        text += [
            f"{result.variant}, seed {result.seed}:",
            "```sh\n" + "\n".join(result.lines) + "\n```",
        ]
    return "\n\n".join(text) + "\n"


def write(
    out: Path,
    results: Sequence[Result],
    rows: Sequence[dict[str, Any]],
    tracked: Sequence[dict[str, Any]],
    choices: Mapping[str, Choice],
) -> None:
    """Write tables.md and the CSV files into `out`; there is at least one result."""
    page = document(results, rows, tracked, choices)
    tables = {
        "results": rows,
        "summary": summary(rows),
        "differences": differences(rows),
        "losses": accuracy_drops(rows),
        "tracked": tracked,
    }
    for name, of in tables.items():
        path = out / f"{name}.csv"
        if of:
            save_csv(of, list(of[0]), path)
        else:
            path.unlink(missing_ok=True)
    atomic_write(out / "tables.md", lambda path: path.write_text(page, encoding="utf-8"))
