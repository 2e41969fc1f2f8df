"""Write table.md and records.jsonl.gz of what run.sh, in this folder, made in runs/penalties.

From the root of the repository: python results/penalties/table.py
"""

import json
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from analysis.study.records import pack_records  # noqa: E402
from analysis.study.results import mean_intervals  # noqa: E402
from analysis.study.tables import markdown  # noqa: E402

RUNS, OUT = ROOT / "runs" / "penalties", Path(__file__).parent
VARIANTS = ["control", "exact", "difference", "every_4th", "difference_every_4th"]
SETTINGS = {  # of the quantized network: the folder of its results, bits of weights and activations
    "4 bits": ("weights", 4, 32),
    "3 bits": ("weights", 3, 32),
    "(4,4)": ("activations", 4, 4),
}


def read(path: Path) -> dict:
    """Return the record."""
    return json.loads(path.read_text(encoding="utf-8"))


def accuracy(name: str, folder: str, bits: int, act_bits: int) -> float:
    """Return the accuracy, in %, of the network quantized that way."""
    rows = read(RUNS / f"{name}.{folder}" / "results.json")["rows"]
    key = ("uniform", bits, act_bits)
    [row] = [row for row in rows if (row["scheme"], row["bits"], row["act_bits"]) == key]
    return 100 * row["accuracy"]


def measured(name: str) -> dict[str, float]:
    """Return what was measured of one network."""
    record = read(RUNS / f"{name}.json")
    last = record["history"][-1]
    values = {"L2Grad": last["track_L2Grad"], "L1Grad": last["track_L1Grad"]}
    values |= {"loss": last["train_loss"], "full": 100 * record["final_accuracy"]}
    return values | {key: accuracy(name, *setting) for key, setting in SETTINGS.items()}


def difference(a: pd.DataFrame, b: pd.DataFrame) -> list[str]:
    """Return the mean of a − b, paired by seed, with half its 95 % interval, of each column."""
    return [
        f"{row['mean']:+.2f} ± {row['high'] - row['mean']:.2f}"
        for _, row in mean_intervals(a - b).iterrows()
    ]


paths = [*RUNS.glob("*.json"), *RUNS.glob("*/results.json")]
records = {path.relative_to(RUNS).as_posix(): read(path) for path in paths}
(OUT / "records.jsonl.gz").write_bytes(pack_records(records))
seeds = sorted(int(path.stem.split("_")[-1]) for path in RUNS.glob("trunk_*.json"))
values = {
    variant: pd.DataFrame({seed: measured(f"{variant}_{seed}") for seed in seeds}).T
    for variant in VARIANTS
}
header = list(values["control"])
means = [[v, *(f"{mean:.2f}" for mean in values[v].mean())] for v in VARIANTS]
sections = [
    f"Means over seeds {', '.join(map(str, seeds))}. L2Grad and L1Grad: Σ over layers and "
    "activations of the norms of the loss's gradients, on one batch in evaluation mode. Loss: the "
    "cross entropy in the last epoch, on training images. The rest is accuracy in %.",
    markdown(["variant", *header], means),
]
for other in ("exact", "control"):
    lines = [[v, *difference(values[v], values[other])] for v in VARIANTS if v != other]
    sections += [
        f"Minus {other}, paired by seed, with 95 % intervals (Student's t):",
        markdown(["variant", *header], lines),
    ]
(OUT / "table.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
