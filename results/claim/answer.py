"""Test the hypotheses of PLAN.md at each network's primary outcome: hypotheses.md, answer.png.

From the root of the repository: python results/claim/answer.py [the folder that study.py wrote]
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).parents[2]))

import study  # noqa: E402
from analysis.figures import STYLE, save_png  # noqa: E402
from analysis.study.figures import draw_seeds, panels  # noqa: E402
from analysis.study.hypotheses import Hypothesis, Outcome, examine, examine_all, holm  # noqa: E402
from analysis.study.report import read_study  # noqa: E402
from analysis.study.results import Setting, Statistics  # noqa: E402
from analysis.study.tables import label, markdown  # noqa: E402

PRIMARY: dict[str, Setting] = {  # chosen by the held-out control, see PLAN.md
    "ResNet20@0.5": ("uniform", 4, 4),
    "MobileNetV2@0.25": ("uniform", 4, 32),
    "ResNet20@0.25": ("uniform", 4, 4),
    "VGGSmall@0.125": ("uniform", 4, 4),
}
HYPOTHESES = [
    Hypothesis("l2grad", "l1grad", margin=0.01),
    Hypothesis("l1grad", "control"),
    Hypothesis("l2grad", "control"),
    Hypothesis("stepnoise", "l2grad"),
    Hypothesis("rangenorm", "l2grad"),
    Hypothesis("kurtosisnorm", "l2grad"),
]
# Tested once more on seeds that were trained after these had been suggested by others, see PLAN.md.
REPLICATION = ("VGGSmall@0.125", (7, 8, 9, 11))
REPLICATED: list[tuple[Hypothesis, Setting]] = [
    (Hypothesis("kurtosisnorm", "control"), ("uniform", 3, 32)),
    (Hypothesis("kurtosisnorm", "l2grad"), ("uniform", 4, 4)),
]
LEVEL = 0.05
NOTHING = "nothing to compare yet"
HEADER = ["hypothesis", "seeds", "points: mean, 95 % interval", "p", "p after Holm", "holds"]


def main(folder: Path) -> None:
    """Print a table for each network and write it to hypotheses.md; draw answer.png beside it."""
    parser = study.make_parser()
    plans, _ = study.make_plans(parser, parser.parse_args(["--out", str(folder), "--tables"]))
    read = {plan.network: read_study(plan)[0] for plan in plans}
    compared = {network: each for network, each in read.items() if each and has_variants(each)}
    accuracies = {network: each.accuracies[PRIMARY[network]] for network, each in compared.items()}
    tables = {
        f"{network}, {label(PRIMARY[network])}": (
            hypotheses_table(accuracies[network]) if network in accuracies else NOTHING
        )
        for network in read
    }
    if len(accuracies) > 1:
        together = pd.concat(accuracies, names=["network"]).reorder_levels([1, 2, 0])
        tables["all networks together, each at its own"] = hypotheses_table(together)
    if REPLICATION[0] in compared:
        title = f"{REPLICATION[0]}, seeds {', '.join(map(str, REPLICATION[1]))} alone"
        tables[title] = replication_table(compared[REPLICATION[0]])
    page = "\n\n".join(f"{title}:\n\n{table}" for title, table in tables.items())
    print(page)
    (folder / "hypotheses.md").write_text(page + "\n", encoding="utf-8")
    draw(compared, folder / "answer.png")


def has_variants(statistics: Statistics) -> bool:
    """Tell whether there is more than the control."""
    return len(statistics.accuracies.index.unique("variant")) > 1


def hypotheses_table(accuracies: pd.Series) -> str:
    """Return the outcomes of all hypotheses that two seeds or more can test, as markdown.

    `accuracies` are by variant and seed; of several networks also by network.
    """
    return outcomes_table(examine_all(HYPOTHESES, accuracies))


def replication_table(statistics: Statistics) -> str:
    """Return the outcomes of REPLICATED on the seeds of REPLICATION alone, as markdown."""
    outcomes = []
    for hypothesis, setting in REPLICATED:
        accuracies = statistics.accuracies[setting]
        new = accuracies[accuracies.index.isin(REPLICATION[1], level="seed")]
        if each := examine(hypothesis, new):
            outcomes.append(each)
    return outcomes_table(dict(zip(outcomes, holm([each.p for each in outcomes]), strict=True)))


def outcomes_table(outcomes: Mapping[Outcome, float]) -> str:
    """Return outcomes, whose p values after Holm's correction are given, as markdown."""
    lines = []
    for each, p in outcomes.items():
        holds = p < LEVEL and (each.hypothesis.margin is not None or each.mean > 0)
        interval = f"{100 * each.mean:+.2f} ± {100 * each.half:.2f}"
        numbers = [str(each.n), interval, f"{each.p:.3f}", f"{p:.3f}"]
        lines.append([each.hypothesis.words, *numbers, "yes" if holds else "not shown"])
    return markdown(HEADER, lines)


def draw(read: Mapping[str, Statistics], path: Path) -> None:
    """Draw the points that every variant loses at the primary outcome, a panel for each network."""
    with rc_context(STYLE):
        figure, grid = panels(len(read), 3, 4.2, 2.2)
        for axes, (network, statistics) in zip(grid, read.items(), strict=True):
            draw_points_lost(axes, statistics, PRIMARY[network])
            axes.set_title(f"{network}, {label(PRIMARY[network])}: points lost")
        save_png(figure, path)


def draw_points_lost(axes: Axes, statistics: Statistics, setting: Setting) -> None:
    """Draw what each variant loses: full precision − quantized, of each seed."""
    lost = 100 * statistics.drops[setting].unstack("variant")
    lost = lost[statistics.drops.index.unique("variant")]  # in the order of the grid
    draw_seeds(axes, lost)
    axes.set_yticks(range(lost.shape[1]), lost.columns)
    axes.set(ylim=(lost.shape[1] - 0.5, -0.5), xlim=(0, None), xlabel="full precision − quantized")
    axes.grid(False, axis="y")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent))
