"""How regularizers shape the weights: networks beside each other, layer by layer."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import pstdev

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from analysis.figures import COLOURS, HISTOGRAM_STYLE, save_png, wrap
from analysis.report import Row

COLUMNS = ("checkpoint", "layer", "n_weights", "mean", "std", "kurtosis", "max_over_std")
N_LAYERS = 5  # in the figure, where none are named
N_BINS = 81

Weights = Mapping[str, Mapping[str, Tensor]]  # of each network, by name: of each layer, by name


def flat_weights(networks: Mapping[str, Mapping[str, Tensor]]) -> Weights:
    """Return the weights of every layer of every network, by their names, flat and in float64."""
    return {
        name: {key: w.detach().double().flatten() for key, w in of_layers.items()}
        for name, of_layers in networks.items()
    }


def statistics(weights: Weights) -> list[Row]:
    """Return a row of COLUMNS for each network and layer.

    The kurtosis is the mean of ((w − mean)/std)⁴: 3 for normal weights, 1.8 for uniform ones.
    `max_over_std` is max|w| / std: with it grows the step size in units of a typical weight. Where
    all weights are equal, both are None.
    """
    return [
        {"checkpoint": name, "layer": layer, "n_weights": w.numel(), **_moments(w)}
        for name, layers in weights.items()
        for layer, w in layers.items()
    ]


def _moments(w: Tensor) -> Row:
    mean = w.mean()
    std = w.std(correction=0)
    row = {"mean": mean.item(), "std": std.item(), "kurtosis": None, "max_over_std": None}
    if std > 0:
        row["kurtosis"] = ((w - mean) / std).pow(4).mean().item()
        row["max_over_std"] = (w.abs().max() / std).item()
    return row


def shared_layers(networks: Iterable[Iterable[str]], wanted: Sequence[str] | None) -> list[str]:
    """Return the layers that all networks have; ValueError if a wanted one is not among them."""
    first, *others = map(list, networks)
    shared = [layer for layer in first if all(layer in names for names in others)]
    if missing := [layer for layer in wanted or () if layer not in shared]:
        raise ValueError(f"--layers {missing[0]}: choose among {', '.join(shared) or 'none'}")
    return shared


def choose_layers(rows: Sequence[Row], wanted: Sequence[str] | None) -> list[str]:
    """Return the layers to show, in order: those wanted, or the N_LAYERS whose max/σ differs most.

    Raises ValueError where a wanted layer is missing, or the networks have no layer in common.
    """
    ratios: dict[str, dict[str, float]] = {}  # by network and layer
    for row in rows:
        ratios.setdefault(row["checkpoint"], {})[row["layer"]] = row["max_over_std"] or 0.0
    shared = shared_layers(ratios.values(), wanted)
    if not shared:
        raise ValueError("the networks have no layer of the same name")
    spread = {layer: pstdev(network[layer] for network in ratios.values()) for layer in shared}
    chosen = wanted or sorted(shared, key=spread.__getitem__, reverse=True)[:N_LAYERS]
    return [layer for layer in shared if layer in chosen]


def distributions_plot(weights: Weights, layers: Sequence[str], absolute: bool, path: Path) -> None:
    """Draw histograms of the layers: a row of panels for each network, a column for each layer.

    The panels of a column share their axis, in units of the layer's standard deviation in each
    network or, if `absolute`, of the weights themselves.
    """
    with rc_context(HISTOGRAM_STYLE):
        figure = Figure(figsize=(1 + 2.1 * len(layers), 0.6 + 1.25 * len(weights)))
        panels = figure.subplots(len(weights), len(layers), sharex="col", squeeze=False)
        for i, (name, tensors) in enumerate(weights.items()):
            for axes, layer in zip(panels[i], layers, strict=True):
                histogram_panel(axes, tensors[layer], absolute, COLOURS[i % len(COLOURS)])
            panels[i][0].set_ylabel(wrap(name, 22), rotation=0, ha="right", va="center")
        unit = "weight" if absolute else "weight / σ"
        for axes, layer in zip(panels[0], layers, strict=True):
            axes.set_title(layer)
        for axes in panels[-1]:
            axes.set_xlabel(unit)
        save_png(figure, path)


def histogram_panel(axes: Axes, w: Tensor, absolute: bool, colour: str) -> None:
    """Draw the histogram of w, whose ends are marked, with σ, kurtosis and max/σ as text."""
    moments = _moments(w)
    shown = w if absolute or not moments["std"] else w / moments["std"]
    heights, edges = torch.histogram(shown.float().cpu(), bins=N_BINS)
    axes.stairs(heights / heights.max(), edges, fill=True, color=colour, alpha=0.75)
    axes.vlines(shown.aminmax(), 0, 0.35, color="#333333", linewidth=1)
    axes.set_yticks([])
    lines = [f"σ {moments['std']:.3g}"]
    if moments["kurtosis"] is not None:
        lines += [f"kurt. {moments['kurtosis']:.1f}", f"max/σ {moments['max_over_std']:.1f}"]
    axes.text(
        0.99, 0.97, "\n".join(lines), transform=axes.transAxes, ha="right", va="top", fontsize=7
    )
