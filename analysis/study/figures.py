"""The figures of the study: every variant beside the control, and what the study found."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures import STYLE, accuracy_plot, line_style, save_png
from analysis.report import UNQUANTIZED
from analysis.study import results as study_results
from analysis.study.grid import lambda_text
from analysis.study.lambda_choice import Choice
from analysis.study.results import FULL_PRECISION, MAIN_SETTINGS, SETTING, Setting, Statistics
from analysis.study.tables import label

CURVE_VARIANTS = (  # in the figures of curves, which have seven colours
    "control", "l2grad", "stepl2grad", "variancenorm", "rangenorm", "rangenorm_folded",
    "kurtosisnorm",
)  # fmt: skip
CurveStyles = Mapping[str, tuple[str, str, str]]  # name, colour and marker, by variant
# The README's figure: variants with the name, colour (Okabe and Ito's) and marker they have in it.
ANSWER_CURVES = {
    "kurtosisnorm": ("KurtosisNorm", "#009E73", "^"),
    "rangenorm": ("RangeNorm", "#0072B2", "s"),
    "stepnoise": ("StepNoise", "#E69F00", "D"),
    "l2grad": ("L2Grad", "#D55E00", "v"),
    "control": ("control", "#444444", "o"),
}
ANSWER_FOLDED = {  # drawn in the right panel only
    "kurtosisnorm_folded": ("KurtosisNorm, folded", "#009E73", "^"),
    "rangenorm_folded": ("RangeNorm, folded", "#0072B2", "s"),
}
ANSWER_SETTINGS: dict[str, Setting] = {"full": FULL_PRECISION}
ANSWER_SETTINGS |= {str(bits): ("uniform", bits, 32) for bits in (8, 4, 3, 2)}
ANSWER_4_4: Setting = ("uniform", 4, 4)
ANSWER_AXIS = "test accuracy, %: mean, range of seeds"
REFERENCE_LINE = {"color": "#666666", "linestyle": (0, (4, 3)), "linewidth": 0.9}
MAX_DROP_SHOWN = 8.0  # points below the quantized control: candidates that drop more are cut off


def panels(n: int, columns: int, width: float, height: float, **share: Any) -> tuple[Figure, list]:
    """Return a figure and its n panels, in rows of so many columns; sizes are of one, in inches."""
    columns = min(columns, n)
    lines = -(-n // columns)
    figure = Figure(figsize=(0.6 + width * columns, 0.7 + height * lines))
    grid = figure.subplots(lines, columns, squeeze=False, **share).flat
    for axes in grid[n:]:
        axes.remove()
    return figure, list(grid[:n])


# --- differences from the control ------------------------------------------------------------


def overview_plot(statistics: Statistics, path: Path) -> None:
    """Draw, in a panel for each main setting, the difference of each variant from the control.

    In points of accuracy, paired by seed: a tick for each seed and the mean with its 95 % interval,
    a circle where that holds 0, else a square. Without a control the first variant takes its place.
    """
    variants = list(statistics.accuracies.index.unique("variant"))
    base = "control" if "control" in variants else variants[0]
    others = [variant for variant in variants if variant != base]
    means = statistics.summary.set_index(["variant", *SETTING])["mean"]
    with rc_context(STYLE):
        n = len(MAIN_SETTINGS)
        figure, grid = panels(n, -(-n // 2), 2.35, 0.8 + 0.2 * len(others), sharey=True)
        for axes, setting in zip(grid, MAIN_SETTINGS, strict=True):
            _draw_differences(axes, statistics.accuracies, setting, base, others)
            mean = f"{100 * means[base, *setting]:.1f} %" if (base, *setting) in means else "–"
            axes.set(title=f"{label(setting)}\n{base}: {mean}", xlabel="points more")
        grid[0].set_yticks(range(len(others)), others)
        grid[0].set_ylim(len(others) - 0.5, -0.5)
        save_png(figure, path)


def _draw_differences(
    axes: Axes, accuracies: pd.DataFrame, setting: Setting, base: str, others: Sequence[str]
) -> None:
    """Draw the differences of the other variants from the base in one setting, a line each."""
    points = pd.DataFrame(index=accuracies.index.unique("seed"), columns=others, dtype=float)
    if setting in accuracies:
        by_seed = 100 * accuracies[setting].unstack("variant")
        points = by_seed[others].sub(by_seed[base], axis="index")
    draw_seeds(axes, points)
    axes.axvline(0, **REFERENCE_LINE)


def draw_seeds(axes: Axes, points: pd.DataFrame) -> None:
    """Draw a line for each column: a mark for each row, a seed, and the mean with its interval.

    The mean of two seeds or more has its 95 % interval; a circle where that holds 0, else a square.
    """
    for y, variant in enumerate(points):
        axes.plot(points[variant], [y] * len(points), "|", color="#999999")
    axes.margins(x=0.25)
    axes.autoscale_view()
    axes.autoscale(False, axis="x")  # an interval of two seeds would hide all others
    intervals = study_results.mean_intervals(points)
    for y, variant in enumerate(points):
        if variant in intervals.index:
            mean, high = intervals.loc[variant, ["mean", "high"]]
            differs = abs(mean) > high - mean
            axes.errorbar(mean, y, xerr=high - mean, capsize=2, **line_style(differs))


# --- curves ----------------------------------------------------------------------------------


def curve_rows(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the means over seeds of CURVE_VARIANTS as rows that accuracy_plot takes."""
    shown = summary[summary["variant"].isin(CURVE_VARIANTS) & (summary["act_bits"] == 32)]
    rows = [
        {**row, "checkpoint": row["variant"], "accuracy": row["mean"], "accuracy_std": row["std"]}
        for row in shown.astype(object).where(shown.notna(), None).to_dict("records")
    ]
    return sorted(rows, key=lambda row: (CURVE_VARIANTS.index(row["variant"]), row["bits"]))


def tracked_plot(tracked: pd.DataFrame, first: int, path: Path) -> None:
    """Draw what was tracked against epochs: a panel for each name, a line for each variant."""
    tracked = tracked[tracked["variant"].isin(CURVE_VARIANTS)]
    shared = study_results.restrict_to_shared_seeds(tracked)
    means = shared.groupby(["name", "variant", "epoch"])["value"].mean()
    names = list(tracked["name"].unique())
    shown = [variant for variant in CURVE_VARIANTS if variant in set(tracked["variant"])]
    with rc_context(STYLE):
        figure, grid = panels(len(names), 4, 2.4, 2)
        legend = {}
        for axes, name in zip(grid, names, strict=True):
            for i, variant in enumerate(shown):
                if variant in means[name].index.unique("variant"):
                    curve = means[name, variant]
                    axes.plot(curve.index + 1, curve, label=variant, **line_style(i))
            axes.axvline(first, **REFERENCE_LINE)  # where regularization begins
            axes.set(title=name, xlabel="epochs")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if (tracked.loc[tracked["name"] == name, "value"] > 0).all():
                axes.set_yscale("log")
            legend |= {line.get_label(): line for line in axes.get_legend_handles_labels()[0]}
        figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend))
        save_png(figure, path)


def choice_plot(choices: Mapping[str, Choice], path: Path) -> None:
    """Draw held-out accuracy against λ, in full precision and quantized: a panel for each variant.

    Horizontal lines are the control's; the vertical one is the λ that was taken.
    """
    control = next(iter(choices.values())).control
    tried = [a for choice in choices.values() for a in choice.candidates.values() if a]
    low = max(100 * min(map(min, [control, *tried])), 100 * control.quantized - MAX_DROP_SHOWN)
    high = 100 * max(map(max, [control, *tried]))
    with rc_context(STYLE):
        figure, grid = panels(len(choices), 5, 2, 1.8, sharey=True)
        for axes, (variant, choice) in zip(grid, choices.items(), strict=True):
            candidates = {lmbda: a for lmbda, a in sorted(choice.candidates.items()) if a}
            for i, name in enumerate(("full precision", "quantized")):
                accuracies = [100 * accuracy[i] for accuracy in candidates.values()]
                style = line_style(i)
                axes.plot(list(candidates), accuracies, label=name, **style)
                axes.axhline(100 * control[i], **{**REFERENCE_LINE, "color": style["color"]})
            axes.axvline(choice.lmbda, color="#666666", linestyle=":", linewidth=0.9)
            if len(candidates) == 1:  # no range to fit the axis to
                axes.set_xlim(choice.lmbda / 2, choice.lmbda * 2)
            axes.set_xscale("log")
            axes.set_xticks(list(candidates), map(lambda_text, candidates))
            axes.set_xticks([], minor=True)
            axes.set(title=variant, xlabel="λ", ylim=(low - 1, high + 1))
        grid[0].set_ylabel("held-out accuracy, %")
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        save_png(figure, path)


# --- the answer ------------------------------------------------------------------------------


def spread_labels(positions: Sequence[float], distance: float) -> Iterator[float]:
    """Yield positions for labels, from the lowest to the highest, at least `distance` apart."""
    last = -np.inf
    for position in positions:
        last = max(position, last + distance)
        yield last


def answer_plot(statistics: Statistics, n_classes: int | None, path: Path) -> None:
    """Draw what the study found, for the README: means and ranges over shared seeds, in %.

    Left, accuracy against bits of a weight, with that of guessing where the number of classes is
    known; right, with 4-bit weights and activations.
    """
    accuracies = 100 * statistics.accuracies.loc[statistics.shared_networks]
    variants = accuracies.index.unique("variant")
    curves = {name: style for name, style in ANSWER_CURVES.items() if name in variants}
    dots = {n: style for n, style in (ANSWER_FOLDED | curves).items() if n in variants}
    with rc_context({**STYLE, "axes.titleweight": "bold", "axes.titlelocation": "left"}):
        figure = Figure(figsize=(9.6, 3.9))
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _draw_answer_curves(left, accuracies, curves)
        if n_classes:
            _draw_chance(left, 100 / n_classes)
        _draw_answer_dots(right, accuracies, dots)
        save_png(figure, path)


def _draw_answer_curves(axes: Axes, accuracies: pd.DataFrame, curves: CurveStyles) -> None:
    """Draw accuracy against bits, a bar from the worst to the best seed, and labels at the ends."""
    shown = {bits: s for bits, s in ANSWER_SETTINGS.items() if s in accuracies}
    x = np.arange(len(shown))
    ends = {}
    highest = accuracies[list(shown.values())].max(axis=None)
    for i, (name, (_, colour, marker)) in enumerate(reversed(curves.items())):
        seeds = accuracies.loc[name, list(shown.values())]
        mean = seeds.mean()
        beside = x + 0.05 * (i - (len(curves) - 1) / 2)  # no bar hides another
        axes.vlines(beside, seeds.min(), seeds.max(), colour, linewidth=2.5, alpha=0.45)
        axes.plot(beside, mean, color=colour, marker=marker)
        ends[name] = mean.iloc[-1]
    lowest_first = sorted(ends, key=ends.get)
    heights = spread_labels([ends[name] for name in lowest_first], distance=6)
    for name, height in zip(lowest_first, heights, strict=True):
        text, colour, _ = curves[name]
        axes.text(x[-1] + 0.2, height, text, color=colour, va="center", weight="bold")
    axes.set_xticks(x, shown)
    axes.set(xlim=(-0.2, x[-1] + 1.5), ylim=(0, max(92, highest + 3)))
    axes.set(xlabel="bits of a weight (uniform, per tensor)", ylabel=ANSWER_AXIS)
    axes.set_title("Quantized weights")


def _draw_chance(axes: Axes, accuracy: float) -> None:
    """Draw the accuracy of guessing across the curves."""
    ticks = axes.get_xticks()
    axes.plot(ticks[[0, -1]], [accuracy, accuracy], **REFERENCE_LINE)
    axes.annotate("chance", (0, accuracy), (0, 3), textcoords="offset points", color="#666666")


def _draw_answer_dots(axes: Axes, accuracies: pd.DataFrame, dots: CurveStyles) -> None:
    """Draw the accuracies at (4,4), a dot and a bar for each variant, the best on top."""
    means = accuracies[ANSWER_4_4].groupby(level="variant").mean()
    order = sorted(dots, key=means.get)
    for y, name in enumerate(order):
        _, colour, marker = dots[name]
        values = accuracies.loc[name, ANSWER_4_4]
        axes.hlines(y, values.min(), values.max(), colour, linewidth=2.5, alpha=0.45)
        axes.plot(means[name], y, color=colour, marker=marker, markersize=7)
        above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{means[name]:.1f}", (means[name], y), **above)
    axes.set_yticks(range(len(order)), [dots[name][0] for name in order])
    for tick, name in zip(axes.get_yticklabels(), order, strict=True):
        tick.set(color=dots[name][1], weight="bold")
    axes.set(ylim=(-0.6, len(order) - 0.3), xlabel=ANSWER_AXIS)
    axes.grid(False, axis="y")
    axes.set_title("4-bit weights and activations")


def draw_figures(
    out: Path,
    statistics: Statistics,
    choices: Mapping[str, Choice],
    first: int,
    n_classes: int | None,
) -> None:
    """Draw the study's figures into `out`, as PNG; there is at least one result.

    Regularization begins at epoch `first`.
    """
    if len(statistics.accuracies.index.unique("variant")) > 1:
        overview_plot(statistics, out / "overview.png")
    curves = curve_rows(statistics.summary)
    if any(row["scheme"] != UNQUANTIZED for row in curves):  # else none is of weights alone
        accuracy_plot(curves, out / "accuracy.png")
    if statistics.tracked["variant"].isin(CURVE_VARIANTS).any():
        tracked_plot(statistics.tracked, first, out / "tracked.png")
    if choices:
        choice_plot(choices, out / "choice.png")
    if "control" in statistics.accuracies.index and ANSWER_4_4 in statistics.accuracies:
        answer_plot(statistics, n_classes, out / "answer.png")
