"""The figures of the study: every variant beside the control."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import files
from report import STYLE, accuracy_plot, look
from study_tables import MAIN, Result, by_seed, label, rows_of, summary, tracked_rows

SHOWN = (  # in the figures of curves, which have seven colours
    "control", "rangenorm", "stepnoise_frozen", "l2grad", "l1grad", "variancenorm", "kurtosisnorm",
)


def overview_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each main setting: every variant's mean and standard deviation, and seeds.

    The vertical line is the control's mean.
    """
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    accuracies = by_seed(rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(2 + 1.8 * len(MAIN), 1.2 + 0.24 * len(variants)))
        panels = figure.subplots(1, len(MAIN), sharey=True)
        for axes, of in zip(panels, MAIN, strict=True):
            for y, variant in enumerate(variants):
                points = [100 * a for a in accuracies.get((variant, of), {}).values()]
                if not points:
                    continue
                mean, std = statistics.fmean(points), statistics.pstdev(points)
                if len(points) > 1:
                    std = statistics.stdev(points)
                axes.plot(points, [y] * len(points), "|", color="#999999")
                axes.errorbar(mean, y, xerr=std, capsize=2, **look(variant != "control"))
                if variant == "control":
                    axes.axvline(mean, color="#666666", linestyle=(0, (4, 3)), linewidth=0.9)
            axes.set(title=label(of), xlabel="test accuracy, %")
        panels[0].set_yticks(range(len(variants)), variants)
        panels[0].invert_yaxis()
        files.write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def curve_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the means over seeds of the SHOWN variants as rows that accuracy_plot takes."""
    return [
        {**s, "checkpoint": s["variant"], "accuracy": s["mean"], "accuracy_std": s["std"]}
        for s in sorted(summary(rows), key=lambda s: s["bits"])
        if s["variant"] in SHOWN and s["act_bits"] == 32
    ]


def tracked_plot(tracked: Sequence[dict[str, Any]], first: int, path: Path) -> None:
    """Draw what was tracked against epochs: a panel each, a line for the mean of a SHOWN variant.

    The vertical line is where regularization begins.
    """
    values: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in tracked:
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
        for axes in grid.flat[len(names):]:
            axes.remove()
        for axes, name in zip(grid.flat, names, strict=False):
            for i, variant in enumerate(shown):
                if of := values.get((name, variant)):
                    means = [statistics.fmean(of[epoch]) for epoch in of]
                    axes.plot(list(of), means, label=variant, **look(i))
            axes.axvline(first + 0.5, color="#666666", linestyle=(0, (4, 3)), linewidth=0.9)
            axes.set(title=name, xlabel="epochs")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if all(row["value"] > 0 for row in tracked if row["name"] == name):
                axes.set_yscale("log")
            legend |= {line.get_label(): line for line in axes.get_legend_handles_labels()[0]}
        figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend))
        files.write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def draw(out: Path, results: Sequence[Result]) -> None:
    """Draw overview.png, accuracy.png and tracked.png into `out`; there is at least one result."""
    rows = [row for result in results for row in rows_of(result)]
    overview_plot(rows, out / "overview.png")
    if curves := curve_rows(rows):
        accuracy_plot(curves, out / "accuracy.png")
    shown = [r for result in results if result.variant in SHOWN for r in tracked_rows(result)]
    if shown:
        tracked_plot(shown, results[0].first, out / "tracked.png")
