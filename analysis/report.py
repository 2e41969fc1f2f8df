"""The quantization report: rows as table, CSV and curves, and figures that share one look."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from engine.io import atomic_write
from engine.tracking import WandbLogger

Row = dict[str, Any]
UNQUANTIZED = "none"  # the scheme, in the rows, of the weights as they are
COLUMNS = (
    "checkpoint",
    "scheme",
    "bits",
    "levels",
    "accuracy",
    "accuracy_change",
    "squared_error",
    "accuracy_std",
    "trials",
    "loss",
    "act_bits",
)
LAYER_COLUMNS = (
    "checkpoint",
    "scheme",
    "bits",
    "layer",
    "accuracy_change",
    "squared_error",
    "loss_change",
    "first_order",
    "first_order_bound",
    "second_order",
)


# --- rows ------------------------------------------------------------------------------------


def format_cell(key: str, value: Any, row: Row) -> str:
    """Return a value of a row as the table shows it."""
    if value is None:
        return "–"
    if key == "accuracy" and row.get("accuracy_std") is not None:
        return f"{value:.2%} ± {row['accuracy_std'] * 100:.2f}"
    if key == "accuracy":
        return f"{value:.2%}"
    if key == "accuracy_change":
        return f"{value * 100:+.2f} pp"  # percentage points
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return the rows as aligned text, a rule before each checkpoint's; numbers to the right."""
    lines = [[column.replace("_", " ") for column in columns]]
    lines += [[format_cell(column, row[column], row) for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    words = [isinstance(rows[0][column], str) for column in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(line, widths, words, strict=True)
        ).rstrip()
        for line in lines
    ]
    rule, text = "─" * max(map(len, lines)), lines[0]
    for i, line in enumerate(lines[1:]):
        new = i == 0 or rows[i]["checkpoint"] != rows[i - 1]["checkpoint"]
        text += f"\n{rule}\n{line}" if new else f"\n{line}"
    return text


def save_csv(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """Write the rows, nothing for None."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    atomic_write(path, write)


def log(
    tracker: WandbLogger, rows: Sequence[Row], layer_rows: Sequence[Row], drawn: dict[str, Path]
) -> None:
    """Log the rows as tables, curves against bits, and the plots as images."""
    if tracker.run is None:
        return
    wandb = tracker.wandb
    curves: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["scheme"] != UNQUANTIZED:
            for key in ("accuracy", "accuracy_change", "squared_error"):
                name = f"{key}/{row['checkpoint'].replace('/', '_')}/{row['scheme']}"
                tracker.define(name, "bits")
                curves.setdefault(row["bits"], {"bits": row["bits"]})[name] = row[key]
    for n_bits in sorted(curves):
        tracker.log(curves[n_bits])
    tables = {"results": (rows, COLUMNS), "per_layer": (layer_rows, LAYER_COLUMNS)}
    tracker.log(
        {
            **{
                name: wandb.Table(list(columns), [[row[c] for c in columns] for row in of])
                for name, (of, columns) in tables.items()
                if of
            },
            **{f"plots/{title}": wandb.Image(str(path)) for title, path in drawn.items()},
        }
    )


# --- figures ---------------------------------------------------------------------------------

# Okabe and Ito's palette: told apart also by colour-blind readers. Markers repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
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
TITLES = {  # bits alone would flatter PWLQ
    "uniform": "uniform, to nearest (2ᵇ levels)",
    "dorefa": "DoReFa, stochastic (2ᵇ levels)",
    "pwlq": "PWLQ (2ᵇ⁺¹ − 1 levels)",
    "recalibrated": "uniform, new batch-norm statistics",
    "corrected": "uniform, means corrected",
}


def line_style(i: int) -> dict[str, str]:
    """Return colour and marker of the i-th thing that a figure compares."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def bits_label(rows: Sequence[Row]) -> str:
    """Return what the b of the rows is, with the bits of the activations where they have fewer."""
    act_bits = {row["act_bits"] for row in rows if row["scheme"] != UNQUANTIZED}
    if act_bits == {32}:
        return "bits of a weight, b"
    if len(act_bits) == 1:
        return f"bits of a weight, b (activations: {act_bits.pop()})"
    return "bits of weights and activations, b"


def accuracy_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy against bits: a panel a scheme, a line a checkpoint, dashed without quantizing.

    `rows` are those of results.json. An error bar is one `accuracy_std`: over trials, or seeds.
    """
    full = {row["checkpoint"]: row["accuracy"] for row in rows if row["scheme"] == UNQUANTIZED}
    schemes = list(dict.fromkeys(row["scheme"] for row in rows if row["scheme"] != UNQUANTIZED))
    with rc_context(STYLE):
        size = (1 + 2.7 * len(schemes), 3.1 + 0.17 * len(full))
        figure = Figure(figsize=size)
        grid = figure.subplots(1, len(schemes), sharey=True, squeeze=False)
        for axes, scheme in zip(grid[0], schemes, strict=True):
            for i, (checkpoint, accuracy) in enumerate(full.items()):
                of = [r for r in rows if (r["checkpoint"], r["scheme"]) == (checkpoint, scheme)]
                beside = 0.05 * (i - (len(full) - 1) / 2)  # no error bar hides another
                axes.errorbar(
                    [r["bits"] + beside for r in of],
                    [r["accuracy"] for r in of],
                    [r["accuracy_std"] or 0 for r in of],
                    capsize=2,
                    label=checkpoint,
                    **line_style(i),
                )
                axes.axhline(
                    accuracy, color=line_style(i)["color"], linestyle=(0, (4, 3)), linewidth=0.9
                )
            axes.set(title=TITLES.get(scheme, scheme), xlabel=bits_label(rows))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        grid[0][0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        grid[0][0].set_ylabel("test accuracy")
        grid[0][0].set_ylim(top=min(1.02, grid[0][0].get_ylim()[1]))
        handles, labels = grid[0][0].get_legend_handles_labels()
        handles.append(Line2D([], [], color="#666666", linestyle=(0, (4, 3)), linewidth=0.9))
        figure.legend(
            handles,
            [*labels, "not quantized"],
            loc="outside lower center",
            ncols=min(len(labels) + 1, max(1, int(size[0] // 2))),
        )
        atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))


def grid_values(quantizer: Callable[..., Tensor], w: Tensor, n_bits: int) -> Tensor:
    """Return every value that the quantizer gives to numbers in the range of w, in order."""
    m = w.abs().max().item()
    n = 2 ** max(17, n_bits + 5)  # closer than the grid
    return quantizer(torch.linspace(-m, m, n + 1), n_bits, range_of=w).unique()


def histogram_plot(
    weights: dict[str, Tensor],
    quantizers: dict[str, Callable[..., Tensor]],
    n_bits: int,
    title: str,
    path: Path,
) -> None:
    """Draw a histogram of each layer's weights above the values each scheme can give them."""
    columns = min(5, len(weights))
    rows = -(-len(weights) // columns)
    with rc_context({**STYLE, "axes.grid": False, "axes.spines.left": False}):
        figure = Figure(figsize=(2.3 * columns, 2.2 * rows + 0.8))
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(weights) :]:
            axes.set_visible(False)
        most = dict.fromkeys(quantizers, 0)  # values of a layer
        for axes, (name, w) in zip(grid.flat, weights.items(), strict=False):
            heights, edges = torch.histogram(w.flatten().float().cpu(), bins=80)
            axes.stairs(heights / heights.max(), edges, fill=True, color="#9a9a9a")
            for i, (scheme, quantizer) in enumerate(quantizers.items()):
                values, low = grid_values(quantizer, w, n_bits), -0.12 * (i + 1) - 0.02
                most[scheme] = max(most[scheme], len(values))
                if len(values) < 200:
                    axes.vlines(values, low, low + 0.09, COLOURS[i], linewidth=0.8)
                else:  # closer than a pixel
                    axes.fill_between(values[[0, -1]], low, low + 0.09, color=COLOURS[i])
            axes.set(title=f"{name}: {w.numel():,} weights", yticks=[])
            axes.locator_params(axis="x", nbins=4)
            axes.tick_params(labelsize=8)
        lines = [Line2D([], [], color=COLOURS[i], linewidth=2) for i in range(len(quantizers))]
        labels = [f"{scheme}, {n_bits} bits: {n} values" for scheme, n in most.items()]
        figure.legend(lines, labels, loc="outside lower center", ncols=len(lines))
        figure.suptitle(title)
        atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))
