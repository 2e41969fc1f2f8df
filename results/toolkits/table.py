"""Write table.md and records.jsonl.gz of what run.sh made in runs/toolkits.

From the root of the repository: python results/toolkits/table.py
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from analysis.study.records import pack_records  # noqa: E402
from analysis.study.tables import markdown  # noqa: E402

RUNS, OUT = ROOT / "runs" / "toolkits", Path(__file__).parent
CASES = {
    "4 bits": ("weights", 4),
    "4 bits, `--equalize`": ("weights-equalize", 4),
    "4 bits, `--per_channel`": ("weights-per_channel", 4),
    "3 bits": ("weights", 3),
    "3 bits, `--equalize`": ("weights-equalize", 3),
    "3 bits, `--per_channel`": ("weights-per_channel", 3),
    "2 bits, `--per_channel`": ("weights-per_channel", 2),
    "(4,4)": ("both", 4),
    "(4,4), `--equalize`": ("both--equalize", 4),
    "(4,4), `--per_channel`": ("both--per_channel", 4),
}
GRIDS = [("uniform", "half"), ("uniform", "full"), ("uniform", "auto"), ("clip", "half")]
HEADER = ["uniform, half", "uniform, full", "uniform, auto", "clip"]
TITLES = {
    ("accuracy", ""): "Test accuracy in %:",
    ("accuracy", "--output_bias_correction"): "The same with `--output_bias_correction`:",
    ("squared_error", ""): "Squared error of the weights, mean over layers:",
}


def main() -> None:
    """Write both files."""
    paths = sorted(RUNS.glob("*/results.json"))
    records = {
        path.relative_to(ROOT / "runs").as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in paths
    }

    def cell(key: str, name: str, n_bits: int, scheme: str, step: str, correction: str) -> str:
        found = records.get(f"toolkits/{name}-{step}{correction}/results.json", {"rows": []})
        values = [r[key] for r in found["rows"] if (r["scheme"], r["bits"]) == (scheme, n_bits)]
        return f"{values[0]:.2%}"[:-1] if values and key == "accuracy" else f"{values[0]:.4g}"

    sections = []
    for (key, correction), title in TITLES.items():
        lines = [
            [case, *(cell(key, *of_case, *grid, correction) for grid in GRIDS)]
            for case, of_case in CASES.items()
        ]
        sections.append(f"{title}\n\n{markdown(['`weights/control.pt`', *HEADER], lines)}\n")
    (OUT / "table.md").write_text("\n".join(sections), encoding="utf-8")
    (OUT / "records.jsonl.gz").write_bytes(pack_records(records))


if __name__ == "__main__":
    main()
