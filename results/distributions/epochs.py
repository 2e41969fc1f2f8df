"""Draw epochs.png: how the weights of a layer move over the epochs, from --watch histograms.

After weights/run.sh, its first part with --watch --watch_freq 391, and this folder's run.sh,
from the root of the repository:

    python results/distributions/epochs.py layer4.0.weight wandb/offline-run-TRUNK \
        VarianceNorm=wandb/offline-run-A KurtosisNorm=wandb/offline-run-B
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from analysis.figures import HISTOGRAM_STYLE, save_png  # noqa: E402


class Histogram(NamedTuple):
    """A histogram that --watch logged: n counts between n + 1 edges, after so many epochs."""

    epoch: float
    edges: np.ndarray
    counts: np.ndarray

    @property
    def density(self) -> np.ndarray:
        """Shares of the weights, divided by the width of their bin."""
        return self.counts / self.counts.sum() / np.diff(self.edges)


def logged_histograms(log: str, parameter: str) -> list[Histogram]:
    """Return the histograms of a parameter in a run's log: a .wandb file, or its folder.

    `parameter` is a name such as "layer4.0.weight". Ends the program where there is no log.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", log]
    completed = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if completed.returncode or not completed.stdout:
        reason = (completed.stderr.strip() or "nothing in it").splitlines()[-1]
        sys.exit(f"{log} is not a log of Weights & Biases: {reason}")
    records = map(json.loads, completed.stdout.splitlines())
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    edges = f"parameters/{parameter}.bins"
    counts = f"parameters/{parameter}.values"
    return [
        Histogram(row["epoch"], np.array(row[edges]), np.array(row[counts]))
        for row in rows
        if edges in row
    ]


def epochs_plot(runs: Mapping[str, Sequence[Histogram]], parameter: str, path: Path) -> None:
    """Draw how a parameter's distribution moves: a panel for each run, a curve for each epoch.

    The first epoch is at the bottom. All curves have the same area.
    """
    with rc_context(HISTOGRAM_STYLE):
        figure = Figure(figsize=(1 + 3.2 * len(runs), 3.8))
        panels = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)[0]
        highest = max(histogram.density.max() for run in runs.values() for histogram in run)
        for axes, (name, run) in zip(panels, runs.items(), strict=True):
            for i, histogram in enumerate(run):
                heights = i + 2 * histogram.density / highest
                look = {"fill": True, "color": "#0072B2", "alpha": 0.55, "zorder": len(run) - i}
                axes.stairs(heights, histogram.edges, baseline=i, **look)
            axes.set(title=name, xlabel=parameter)
            axes.set_yticks(range(len(run)), [f"{h.epoch:.0f}" for h in run])
        panels[0].set_ylabel("epochs")
        save_png(figure, path)


if __name__ == "__main__":
    parameter, trunk, *branches = sys.argv[1:]
    shared = logged_histograms(trunk, parameter)
    runs = {}
    for branch in branches:
        name, _, log = branch.rpartition("=")
        runs[name] = shared + logged_histograms(log, parameter)
    epochs_plot(runs, parameter, Path(__file__).with_name("epochs.png"))
