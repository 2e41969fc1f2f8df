"""Print the answer of PLAN.md: each hypothesis at each network's primary outcome.

From the root of the repository, with the folder that study.py wrote:
python results/claim/answer.py runs/claim
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import study  # noqa: E402
from analysis.study.hypotheses import Hypothesis, examine_all  # noqa: E402
from analysis.study.report import read_study  # noqa: E402
from analysis.study.tables import label, markdown  # noqa: E402

PRIMARY = {"ResNet20@0.5": ("uniform", 4, 4)}  # chosen by the held-out control, see PLAN.md
HYPOTHESES = [
    Hypothesis("l2grad", "l1grad", margin=0.01),
    Hypothesis("l1grad", "control"),
    Hypothesis("l2grad", "control"),
    Hypothesis("stepnoise", "l2grad"),
    Hypothesis("rangenorm", "l2grad"),
    Hypothesis("kurtosisnorm", "l2grad"),
]
LEVEL = 0.05
HEADER = ["hypothesis", "seeds", "points: mean, 95 % interval", "p", "p after Holm", "holds"]


def main(folder: str) -> None:
    """Print a table for each network."""
    parser = study.make_parser()
    plans, _ = study.make_plans(parser, parser.parse_args(["--out", folder, "--tables"]))
    for plan in plans:
        setting = PRIMARY[plan.network]
        statistics, _, _ = read_study(plan)
        print(f"{plan.network}, {label(setting)}:\n")
        if statistics is None:
            print("no results yet\n")
            continue
        lines = []
        for each, p in examine_all(HYPOTHESES, statistics.accuracies, setting).items():
            holds = p < LEVEL and (each.hypothesis.margin is not None or each.mean > 0)
            interval = f"{100 * each.mean:+.2f} ± {100 * each.half:.2f}"
            numbers = [str(each.n), interval, f"{each.p:.3f}", f"{p:.3f}"]
            lines.append([each.hypothesis.words, *numbers, "yes" if holds else "not shown"])
        print(markdown(HEADER, lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
