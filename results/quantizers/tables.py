"""Write table.md and records.jsonl.gz of what train.sh and run.sh made in runs/quantizers, and
collapse_table.md and collapse.jsonl.gz of what collapse.sh made in runs/collapse.

From the root of the repository: python results/quantizers/tables.py
"""

import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from analysis.study.records import pack_records  # noqa: E402
from analysis.study.tables import markdown  # noqa: E402

RUNS, OUT = ROOT / "runs", Path(__file__).parent
QUANTIZERS = ["uniform", "pwlq", "clip", "equalize", "adaround"]
SETTINGS = {"4 bits": (4, ""), "3 bits": (3, ""), "2 bits": (2, ""), "(4,4)": (4, "_a4")}
LSQ = "lsq_a4"  # the folder of the network with the steps that it has learned
CASES = {"": "", "first_last": ", `--keep_first_last`", "equalize": ", `--equalize`",
         "per_channel": ", `--per_channel`"}  # fmt: skip
CALIBRATIONS = ["minmax", "topk_median", "percentile", "mse"]

Records = Mapping[str, Any]  # by path


def read(folder: Path) -> dict[str, Any]:
    """Return what quantizations and trainings have written below the folder."""
    paths = [*folder.glob("*.json"), *folder.glob("*/*/*.json")]
    texts = {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in paths}
    return {path: json.loads(text) for path, text in sorted(texts.items())}


def networks(records: Records) -> list[str]:
    """Return the names of the networks that were quantized."""
    return list(dict.fromkeys(path.split("/")[0] for path in records if "/" in path))


def rows(records: Records, network: str, case: str) -> list[dict[str, Any]]:
    """Return the rows of a quantization, none where it was not made."""
    return records.get(f"{network}/{case}/results.json", {"rows": []})["rows"]


def percent(rows: Iterable[Mapping[str, Any]], bits: int, scheme: str | None = None) -> str:
    """Return the accuracy at so many bits, in %, as text."""
    found = [r["accuracy"] for r in rows if r["bits"] == bits and scheme in (None, r["scheme"])]
    return f"{100 * found[0]:.1f}" if found else "–"


def quantizer_table(records: Records, setting: str) -> str:
    """Return accuracies at a setting: networks in lines, quantizers in columns."""
    bits, suffix = SETTINGS[setting]
    lines = []
    for network in networks(records):
        by_quantizer = [rows(records, network, f"{q}{suffix}") for q in QUANTIZERS]
        learned = [percent(rows(records, network, LSQ), bits, "lsq")] if suffix else []
        full = percent(by_quantizer[0], 32)
        lines.append([network, full, *(percent(r, bits) for r in by_quantizer), *learned])
    header = ["network", "full precision", *QUANTIZERS, *(["learned steps"] if suffix else [])]
    return markdown(header, lines)


def seconds_table(records: Records) -> str:
    """Return the median over networks of a command's seconds."""
    lines = []
    for suffix, what in (("", "4, 3 and 2 bits, weights alone"), ("_a4", "(4,4)")):
        seconds = {
            q: [records[p] for p in records if p.endswith(f"/{q}{suffix}/seconds.json")]
            for q in QUANTIZERS
        }
        medians = [f"{statistics.median(s):.0f}" if s else "–" for s in seconds.values()]
        lines.append([what, *medians])
    return markdown(["seconds", *QUANTIZERS], lines)


def collapse_table(records: Records, network: str) -> str:
    """Return one network's accuracies by calibration and what is done beside it."""
    lines = []
    for case, flag in CASES.items():
        for calibration in CALIBRATIONS:
            found = rows(records, network, "_".join(filter(None, (calibration, case))))
            if found:
                accuracies = [percent(found, bits) for bits in (8, 6, 4)]
                lines.append([f"`{calibration}`{flag}", *accuracies])
    full = percent(rows(records, network, "minmax"), 32)
    return f"{network}, {full} % in full precision:\n\n" + markdown(
        ["calibration", "(8,8)", "(6,6)", "(4,4)"], lines
    )


def main() -> None:
    """Write the files."""
    records, collapsed = read(RUNS / "quantizers"), read(RUNS / "collapse")
    tables = [f"Test accuracy in %, {s}:\n\n{quantizer_table(records, s)}" for s in SETTINGS]
    texts = {
        "table.md": [*tables, seconds_table(records)],
        "collapse_table.md": [collapse_table(collapsed, name) for name in networks(collapsed)],
    }
    for name, sections in texts.items():
        (OUT / name).write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    (OUT / "records.jsonl.gz").write_bytes(pack_records(records))
    (OUT / "collapse.jsonl.gz").write_bytes(pack_records(collapsed))


if __name__ == "__main__":
    main()
