"""The figures of the study: every variant beside the control."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures import STYLE, accuracy_plot, line_style
from analysis.study_results import (
    MAIN,
    Choice,
    by_seed,
    difference,
    restrict_to_shared_seeds,
    setting,
    summary,
)
from analysis.study_tables import label
from engine.io import atomic_write

SHOWN = (  # in the figures of curves, which have seven colours
    "control",
    "l2grad",
    "stepl2grad",
    "variancenorm",
    "rangenorm",
    "rangenorm_folded",
    "kurtosisnorm",
)


def overview_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each main setting: how many points more than the control a variant has.

    Paired by seed: each seed a tick, the mean a marker with its 95 % interval, which may go beyond
    the frame: a circle where it holds 0, a square where it does not. In a study without the control
    its first variant takes that place.
    """
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    base = "control" if "control" in variants else variants[0]
    others = [variant for variant in variants if variant != base]
    accuracies = by_seed(rows)
    means = {(s["variant"], setting(s)): s["mean"] for s in summary(rows)}
    with rc_context(STYLE):
        lines = 2
        columns = -(-len(MAIN) // lines)
        figure = Figure(figsize=(2 + 2 * columns, lines * (1.1 + 0.2 * len(others))))
        panels = figure.subplots(lines, columns, sharey=True)
        for axes in panels.flat[len(MAIN) :]:
            axes.remove()
        for axes, of in zip(panels.flat, MAIN, strict=False):
            of_base = accuracies.get((base, of), {})
            for y, variant in enumerate(others):
                found = accuracies.get((variant, of), {})
                points = [100 * (found[seed] - of_base[seed]) for seed in found if seed in of_base]
                axes.plot(points, [y] * len(points), "|", color="#999999")
            axes.margins(x=0.25)
            axes.autoscale_view()
            axes.autoscale(False, axis="x")
            for y, variant in enumerate(others):
                if known := difference(accuracies.get((variant, of), {}), of_base):
                    _, mean, half = known
                    differs = abs(mean) > half
                    axes.errorbar(100 * mean, y, xerr=100 * half, capsize=2, **line_style(differs))
            axes.axvline(0, color="#666666", linestyle=(0, (4, 3)), linewidth=0.9)
            mean = f"{100 * means[base, of]:.1f} %" if of_base else "–"
            axes.set(title=f"{label(of)}\n{base}: {mean}", xlabel="points more")
        panels.flat[0].set_yticks(range(len(others)), others)
        panels.flat[0].set_ylim(len(others) - 0.5, -0.5)
        atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))


def curve_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the means over seeds of the SHOWN variants as rows that accuracy_plot takes."""
    shown = [s for s in summary(rows) if s["variant"] in SHOWN and s["act_bits"] == 32]
    return [
        {**s, "checkpoint": s["variant"], "accuracy": s["mean"], "accuracy_std": s["std"]}
        for s in sorted(shown, key=lambda s: (SHOWN.index(s["variant"]), s["bits"]))
    ]


def tracked_plot(tracked: Sequence[dict[str, Any]], first: int, path: Path) -> None:
    """Draw what was tracked against epochs: a panel each, a line for the mean of a SHOWN variant.

    The vertical line is where regularization begins.
    """
    values: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in restrict_to_shared_seeds(tracked):
        of = values.setdefault((row["name"], row["variant"]), {})
        of.setdefault(row["epoch"] + 1, []).append(row["value"])
    names = list(dict.fromkeys(name for name, _ in values))
    shown = [variant for variant in SHOWN if any(of == variant for _, of in values)]
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 2.4 * columns, 0.7 + 2 * lines))
        grid = figure.subplots(lines, columns, squeeze=False)
        legend = {}
        for axes in grid.flat[len(names) :]:
            axes.remove()
        for axes, name in zip(grid.flat, names, strict=False):
            for i, variant in enumerate(shown):
                if of := values.get((name, variant)):
                    means = [statistics.fmean(of[epoch]) for epoch in of]
                    axes.plot(list(of), means, label=variant, **line_style(i))
            axes.axvline(first, color="#666666", linestyle=(0, (4, 3)), linewidth=0.9)
            axes.set(title=name, xlabel="epochs")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if all(row["value"] > 0 for row in tracked if row["name"] == name):
                axes.set_yscale("log")
            legend |= {line.get_label(): line for line in axes.get_legend_handles_labels()[0]}
        figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend))
        atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))


SHOWN_BELOW = 8.0  # points below the control at 4 bits: candidates that lose more are cut off


def choice_plot(choices: Mapping[str, Choice], path: Path) -> None:
    """Draw held-out accuracy against λ: a panel for each variant, one line for full precision.

    The other is for 4 bits, and horizontal ones for the control. The vertical line is where the λ
    is that was taken.
    """
    control = next(iter(choices.values())).control
    every = [
        *control,
        *(
            accuracy
            for choice in choices.values()
            for of in choice.candidates.values()
            if of
            for accuracy in of
        ),
    ]
    low = max(100 * min(every), 100 * control[1] - SHOWN_BELOW)
    columns = min(5, len(choices))
    lines = -(-len(choices) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 2 * columns, 0.7 + 1.8 * lines))
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(choices) :]:
            axes.remove()
        for axes, (variant, choice) in zip(grid.flat, choices.items(), strict=False):
            found = {lmbda: of for lmbda, of in sorted(choice.candidates.items()) if of}
            for i, name in enumerate(("full precision", "uniform 4")):
                accuracies = [100 * of[i] for of in found.values()]
                axes.plot(list(found), accuracies, label=name, **line_style(i))
                axes.axhline(
                    100 * control[i],
                    color=line_style(i)["color"],
                    linestyle=(0, (4, 3)),
                    linewidth=0.9,
                )
            axes.axvline(choice.lmbda, color="#666666", linestyle=":", linewidth=0.9)
            axes.set(title=variant, xlabel="λ", xscale="log", ylim=(low - 1, 100 * max(every) + 1))
            axes.set_xticks(list(found), [f"{lmbda:g}" for lmbda in found])
            axes.set_xticks([], minor=True)
        grid[0][0].set_ylabel("held-out accuracy, %")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))


def draw(
    out: Path,
    rows: Sequence[dict[str, Any]],
    tracked: Sequence[dict[str, Any]],
    choices: Mapping[str, Choice],
    first: int,
) -> None:
    """Draw overview, accuracy, tracked and choice.png into `out`; there is at least one row."""
    overview_plot(rows, out / "overview.png")
    if curves := curve_rows(rows):
        accuracy_plot(curves, out / "accuracy.png")
    if shown := [row for row in tracked if row["variant"] in SHOWN]:
        tracked_plot(shown, first, out / "tracked.png")
    if choices:
        choice_plot(choices, out / "choice.png")
