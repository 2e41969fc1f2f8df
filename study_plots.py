"""The figures of the study: every variant beside the control."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import files
from report import COLOURS, STYLE, accuracy_plot, look
from study_results import MAIN, Choice, by_seed, summary
from study_tables import label

SHOWN = (  # in the figures of curves, which have seven colours
    "control", "rangenorm", "stepnoise_frozen", "l2grad", "l1grad", "variancenorm", "kurtosisnorm",
)


def look_of(variant: str, variants: Iterable[str]) -> dict[str, str]:
    """Return how a variant is drawn in figures of these: the same in all, SHOWN ones first."""
    variants = dict.fromkeys(variants)
    order = [*(v for v in SHOWN if v in variants), *(v for v in variants if v not in SHOWN)]
    i = order.index(variant)
    return {**look(i), "linestyle": ("-", "--", ":")[i // len(COLOURS) % 3]}


def overview_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each main setting: every variant's mean and standard deviation, and seeds.

    The vertical line is the control's mean.
    """
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    accuracies = by_seed(rows)
    with rc_context(STYLE):
        lines = 2
        columns = -(-len(MAIN) // lines)
        figure = Figure(figsize=(2 + 2 * columns, lines * (0.9 + 0.2 * len(variants))))
        panels = figure.subplots(lines, columns, sharey=True)
        for axes in panels.flat[len(MAIN):]:
            axes.remove()
        for axes, of in zip(panels.flat, MAIN, strict=False):
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
        panels.flat[0].set_yticks(range(len(variants)), variants)
        panels.flat[0].invert_yaxis()
        files.write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


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
            for variant in shown:
                if of := values.get((name, variant)):
                    means = [statistics.fmean(of[epoch]) for epoch in of]
                    axes.plot(list(of), means, label=variant, **look_of(variant, shown))
            axes.axvline(first + 0.5, color="#666666", linestyle=(0, (4, 3)), linewidth=0.9)
            axes.set(title=name, xlabel="epochs")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if all(row["value"] > 0 for row in tracked if row["name"] == name):
                axes.set_yscale("log")
            legend |= {line.get_label(): line for line in axes.get_legend_handles_labels()[0]}
        figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend))
        files.write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def choice_plot(choices: Mapping[str, Choice], variants: Sequence[str], path: Path) -> None:
    """Draw 4-bit against full-precision accuracy on held-out images: a line a variant, over its λ.

    A white dot in a marker is on the λ that was taken; the star is the control. `variants` are
    those of the other figures.
    """
    control = next(iter(choices.values())).control
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4))
        axes = figure.subplots()
        for variant, choice in choices.items():
            found = {lmbda: of for lmbda, of in sorted(choice.candidates.items()) if of}
            full, quantized = zip(*found.values(), strict=True)
            style = look_of(variant, [*variants, *choices])
            axes.plot([100 * a for a in full], [100 * a for a in quantized], label=variant, **style)
            for lmbda, of in found.items():
                x, y = (100 * a for a in of)
                axes.annotate(f"{lmbda:g}", (x, y), xytext=(4, 3), textcoords="offset points",
                              fontsize=7, color=style["color"])
                if lmbda == choice.lmbda:
                    axes.plot(x, y, ".", color="white", markersize=3)
        axes.plot(*(100 * a for a in control), "*", color="#666666", markersize=11, label="control",
                  linestyle="none")
        axes.set(xlabel="held-out accuracy in full precision, %",
                 ylabel="held-out accuracy, uniform 4 bits, %")
        figure.legend(loc="outside right center")
        files.write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def draw(
    out: Path, rows: Sequence[dict[str, Any]], tracked: Sequence[dict[str, Any]],
    choices: Mapping[str, Choice], first: int,
) -> None:
    """Draw overview, accuracy, tracked and choice.png into `out`; there is at least one row."""
    overview_plot(rows, out / "overview.png")
    if curves := curve_rows(rows):
        accuracy_plot(curves, out / "accuracy.png")
    if shown := [row for row in tracked if row["variant"] in SHOWN]:
        tracked_plot(shown, first, out / "tracked.png")
    if choices:
        variants = list(dict.fromkeys(row["variant"] for row in rows))
        choice_plot(choices, variants, out / "choice.png")
