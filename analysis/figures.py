"""Figures of quantized networks, and the style that all figures share."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import Formatter
from torch import Tensor

from analysis.report import UNQUANTIZED, Row
from engine.system.io import atomic_write

# --- style -----------------------------------------------------------------------------------

# Okabe and Ito's palette: told apart also by colour-blind readers. Markers repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", ":", "-.")
REFERENCE_LINES = ((0, (4, 3)), (0, (4, 2, 1, 2)), (0, (1, 3)))  # thin ones, beside LINES
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
}
HISTOGRAM_STYLE = {**STYLE, "axes.grid": False, "axes.spines.left": False}
TITLES = {  # with levels: bits alone would flatter PWLQ
    "uniform": "uniform, to nearest (2ᵇ levels)",
    "dorefa": "DoReFa, stochastic (2ᵇ levels)",
    "pwlq": "PWLQ (2ᵇ⁺¹ − 1 levels)",
    "clip": "uniform, range of least error (2ᵇ levels)",
    "recalibrated": "uniform, new batch-norm statistics",
    "corrected": "uniform, means corrected",
}
MIN_ACCURACY_SPAN = 0.02  # of the y axis: else a difference of one image fills the panel
LABEL_CHARACTERS = 40  # of a line of the legend


def line_style(i: int) -> dict[str, str]:
    """Return colour, marker and line style of the i-th thing compared; the first 147 differ."""
    turn = i // len(COLOURS)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[(i + turn) % len(MARKERS)],
        "linestyle": LINES[turn % len(LINES)],
    }


class PercentTickFormatter(Formatter):
    """Tick labels in percent, with as many decimals as tell neighbouring ticks apart."""

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Return the labels of ticks at fractions of 1; none for an accuracy above 1."""
        n_decimals = percent_decimals(min((b - a for a, b in pairwise(values)), default=1))
        return [f"{x:.{n_decimals}%}" if x < 1 + 1e-9 else "" for x in values]


def percent_decimals(distance: float) -> int:
    """Return the decimals that show multiples of the distance, a fraction of 1, exactly in %."""
    percent = 100 * distance
    return next((n for n in range(6) if math.isclose(round(percent, n), percent)), 6)


def wrap(text: str, width: int) -> str:
    """Return the text in lines of at most `width` characters, ended after " ", "_", "/" or "-"."""
    lines = [""]
    for piece in re.findall(rf"[^ _/-]{{0,{width - 1}}}[ _/-]|[^ _/-]{{1,{width}}}", text):
        if len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines).replace("$", r"\$")


def place_legend(figure: Figure, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    """Put a legend below the panels, in as many columns as fit; the figure grows by its height."""
    labels = [wrap(label, LABEL_CHARACTERS) for label in labels]
    for columns in range(len(labels), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    width, height = figure.get_size_inches()
    legend_width, legend_height = legend.get_window_extent().size / figure.dpi
    figure.set_size_inches(max(width, legend_width), height + legend_height)


# --- accuracy --------------------------------------------------------------------------------


def accuracy_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy against bits: a line for each checkpoint, dashed for its unquantized accuracy.

    There is a panel for each scheme, and for each bit-width of activations where there are several.
    `rows` are those of results.json. An error bar is one `accuracy_std`: over trials, or seeds.
    """
    full = {row["checkpoint"]: row["accuracy"] for row in rows if row["scheme"] == UNQUANTIZED}
    quantized = [row for row in rows if row["scheme"] != UNQUANTIZED]
    by_panel: dict[tuple[str, str], list[Row]] = {}
    for row in quantized:
        by_panel.setdefault((row["scheme"], _act_bits_of_panel(row, quantized)), []).append(row)
    with rc_context(STYLE):
        figure = Figure(figsize=(1 + 2.7 * len(by_panel), 2.9))
        panels = figure.subplots(1, len(by_panel), sharey=True, squeeze=False)[0]
        for axes, ((scheme, act_bits), points) in zip(panels, by_panel.items(), strict=True):
            accuracy_panel(axes, points, full)
            learned = {"adaround": "AdaRound", "qdrop": "QDrop"}.get(points[0].get("rounding"))
            title = f"{scheme}, {learned} (2ᵇ levels)" if learned else TITLES.get(scheme, scheme)
            axes.set(title=title, xlabel=act_bits or bits_label(points))
        low, high = panels[0].get_ylim()
        grow = max(0, MIN_ACCURACY_SPAN - (high - low)) / 2
        panels[0].set(ylabel="test accuracy", ylim=(low - grow, min(1.02, high + grow)))
        panels[0].yaxis.set_major_formatter(PercentTickFormatter())
        handles, labels = panels[0].get_legend_handles_labels()
        handles.append(Line2D([], [], color="#666666", linestyle=REFERENCE_LINES[0], linewidth=0.9))
        place_legend(figure, handles, [*labels, "not quantized"])
        save_png(figure, path)


def _act_bits_of_panel(row: Row, rows: Sequence[Row]) -> str:
    """Return the x label that tells a row's panel apart: "" where weights have one row each."""
    widths = {(r["bits"], r["act_bits"]) for r in rows if r["scheme"] == row["scheme"]}
    has_several = len(widths) > len({bits for bits, _ in widths})
    return bits_label([row]) if has_several else ""


def accuracy_panel(axes: Axes, rows: Sequence[Row], full: Mapping[str, float]) -> None:
    """Draw the rows of one scheme; `full` is each checkpoint's accuracy without quantizing."""
    offset = min(0.05, 0.5 / len(full))  # beside each other: no error bar hides another
    for i, (checkpoint, accuracy) in enumerate(full.items()):
        points = [row for row in rows if row["checkpoint"] == checkpoint]
        style = line_style(i)
        x = [r["bits"] + offset * (i - (len(full) - 1) / 2) for r in points]
        y = [r["accuracy"] for r in points]
        bars = [r["accuracy_std"] or math.nan for r in points]  # NaN draws nothing
        axes.errorbar(x, y, bars, capsize=2, label=checkpoint, **style)
        dashes = REFERENCE_LINES[LINES.index(style["linestyle"])]
        axes.axhline(accuracy, color=style["color"], linestyle=dashes, linewidth=0.9)
    bits = sorted({row["bits"] for row in rows})
    axes.set_xticks(bits)
    axes.set_xlim(bits[0] - 0.5, bits[-1] + 0.5)


def bits_label(rows: Sequence[Row]) -> str:
    """Return what the b of the rows is, with the bits of the activations where they have fewer."""
    act_bits = {row["act_bits"] for row in rows if row["scheme"] != UNQUANTIZED}
    if act_bits == {32}:
        return "bits of a weight, b"
    if len(act_bits) == 1:
        return f"bits of a weight, b (activations: {act_bits.pop()})"
    return "bits of weights and activations, b"


# --- layer by layer --------------------------------------------------------------------------


def per_layer_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw what quantizing one layer alone does to the accuracy, in percentage points.

    `rows` are those of per_layer.csv. There is a row of panels for each network, a column for each
    bit-width, and a line for each scheme.
    """
    names, widths, schemes, layers = (
        list(dict.fromkeys(row[key] for row in rows))
        for key in ("checkpoint", "bits", "scheme", "layer")
    )
    size = (1 + max(2.2, 0.28 * len(layers)) * len(widths), 0.9 + 1.7 * len(names))
    with rc_context(STYLE):
        figure = Figure(figsize=size)
        panels = figure.subplots(len(names), len(widths), sharex=True, sharey="row", squeeze=False)
        for i, name in enumerate(names):
            for axes, n_bits in zip(panels[i], widths, strict=True):
                shown = [r for r in rows if (r["checkpoint"], r["bits"]) == (name, n_bits)]
                per_layer_panel(axes, shown, schemes, layers)
                axes.set_title(f"{wrap(name, 30)}, {n_bits} bits")
            panels[i][0].set_ylabel("accuracy change (pp)")
        place_legend(figure, *panels[0][0].get_legend_handles_labels())
        save_png(figure, path)


def per_layer_panel(
    axes: Axes, rows: Sequence[Row], schemes: Sequence[str], layers: Sequence[str]
) -> None:
    """Draw the rows of one network and bit-width: a line for each scheme, over the layers."""
    axes.axhline(0, color="#666666", linewidth=0.9)
    for i, scheme in enumerate(schemes):
        change = {r["layer"]: 100 * r["accuracy_change"] for r in rows if r["scheme"] == scheme}
        values = [change.get(layer, math.nan) for layer in layers]
        axes.plot(range(len(layers)), values, label=scheme, **line_style(i))
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)


# --- weights ---------------------------------------------------------------------------------


def grid_values(quantizer: Callable[..., Tensor], w: Tensor, n_bits: int) -> Tensor:
    """Return every value that the quantizer gives to numbers in the range of w, in order."""
    m = w.abs().max().item()
    n = 2 ** max(17, n_bits + 5)  # closer than the grid
    return quantizer(torch.linspace(-m, m, n + 1), n_bits, range_source=w).unique()


def weights_plot(
    name: str,
    weights: Mapping[str, Tensor],
    quantizers: Mapping[str, Callable[..., Tensor]],
    bits: Mapping[str, Mapping[str, int]],
    per_channel: bool,
    path: Path,
) -> None:
    """Draw a histogram of each layer's weights above the values that each scheme can give them.

    `weights` are by layer, `bits` by scheme and layer. `per_channel`: only the first output
    channel, which has its own range.
    """
    title = f"{name}: weights, and the values that quantization leaves"
    if per_channel:
        title += " (first output channel of each layer)"
    columns = min(5, len(weights))
    lines = -(-len(weights) // columns)
    with rc_context(HISTOGRAM_STYLE):
        figure = Figure(figsize=(2.3 * columns, 2.2 * lines + 0.6))
        panels = figure.subplots(lines, columns, squeeze=False).flat
        for axes in panels[len(weights) :]:
            axes.set_visible(False)
        n_values = dict.fromkeys(quantizers, 0)
        for axes, (layer, w) in zip(panels, weights.items(), strict=False):
            w = w[:1] if per_channel else w
            grids = {s: grid_values(q, w, bits[s][layer]) for s, q in quantizers.items()}
            histogram_panel(axes, w, list(grids.values()))
            axes.set_title(f"{layer}{'[0]' * per_channel}: {w.numel():,} weights")
            n_values = {scheme: max(n, len(grids[scheme])) for scheme, n in n_values.items()}
        handles = [Line2D([], [], color=COLOURS[i], linewidth=2) for i in range(len(quantizers))]
        labels = [
            f"{scheme}, {'/'.join(map(str, sorted({*bits[scheme].values()})))} bits: {n} values"
            for scheme, n in n_values.items()
        ]
        figure.suptitle(wrap(title, 20 * columns))
        place_legend(figure, handles, labels)
        save_png(figure, path)


def histogram_panel(axes: Axes, w: Tensor, grids: Sequence[Tensor]) -> None:
    """Draw a histogram of w, and below it a row of ticks for each grid of values."""
    heights, edges = torch.histogram(w.flatten().float().cpu(), bins=80)
    axes.stairs(heights / heights.max(), edges, fill=True, color="#9a9a9a")
    for i, values in enumerate(grids):
        low = -0.12 * (i + 1) - 0.02
        if len(values) < 200:
            axes.vlines(values, low, low + 0.09, COLOURS[i], linewidth=0.8)
        else:  # closer than a pixel
            axes.fill_between(values[[0, -1]], low, low + 0.09, color=COLOURS[i])
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(labelsize=8)


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as PNG."""
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))
