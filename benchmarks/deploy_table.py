"""Tables of what `quant_inference.py --verify` wrote: `python benchmarks/deploy_table.py FOLDER`.

Prints markdown, or writes table.md and records.jsonl.gz into --output. See results/deploy/run.sh.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _root  # noqa: F401

from analysis.study.records import pack_records
from engine.deploy.verify import RUNTIME

HEADER = (
    "network | W | A | scheme | float32 | simulated | ONNX Runtime | differ | "
    "differ, float simulation | ms, batch 1 | float32 | ms, batch 128 | float32 | "
    "file | packed | float32"
)


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the content of every record below the folder, by its path there."""
    paths = sorted(folder.rglob("*.verified.json"))
    return {
        path.relative_to(folder).as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in paths
    }


def scheme_name(source: Mapping[str, str]) -> str:
    """Return the quantizer in words."""
    return (
        source["scheme"]
        + " per channel" * (source["per_channel"] == "true")
        + ", equalized" * (source.get("equalize") == "true")
        + ", AdaRound" * source.get("rounding", "").startswith("adaround")
        + ", QDrop" * source.get("rounding", "").startswith("qdrop")
    )


def milliseconds(record: Mapping[str, Any], batch: str) -> tuple[float, float]:
    """Return the time of a batch in ONNX Runtime, and in the faster of the float32 programs."""
    speeds = record["images_per_second"][batch]
    fastest = max(speed for name, speed in speeds.items() if name.startswith("float32"))
    return 1000 * int(batch) / speeds[RUNTIME], 1000 * int(batch) / fastest


def row(record: Mapping[str, Any]) -> str:
    """Return a line of the table."""
    source, accuracy, size = record["source"], record["accuracy"], record["bytes"]
    differing = record["differing_predictions"]
    cells = [
        source["checkpoint"].removesuffix(".pt"),
        source["bits"],
        source["act_bits"],
        scheme_name(source),
        *(f"{100 * accuracy[name]:.2f}" for name in ("unquantized", "integer", RUNTIME)),
        f"{differing['integer']}{_by_default(record)}",
        f"{differing['float32']}",
    ]
    for batch in ("1", "128"):
        cells += [f"{ms:.2f}" for ms in milliseconds(record, batch)]
    cells += [f"{size[name] / 1e6:.2f} MB" for name in ("file", "packed", "float32")]
    return " | ".join(cells)


def _by_default(record: Mapping[str, Any]) -> str:
    """Return how many predictions differ without the session option, where one was needed."""
    n = record.get("differing_by_default")
    return f" ({n} by default)" if record.get("session_options") else ""


def second_sums(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines about what the second sums of PWLQ cost, for every network."""
    lines = []
    for record in records:
        if record["source"]["scheme"] != "pwlq":
            continue
        for batch, speeds in record["images_per_second"].items():
            speed = speeds[RUNTIME]
            ratios = ", ".join(
                f"{speeds[name] / speed:.2f} times {name}"
                for name in ("without the second sums", "one fused convolution a layer")
            )
            lines.append(f"- {record['source']['checkpoint']}, batch {batch}: the time is {ratios}")
    return lines


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return everything as markdown."""

    def key(record: Mapping[str, Any]) -> tuple:
        source = record["source"]
        bits = -float(source["bits"]), -int(source["act_bits"])
        is_pwlq = source["scheme"] == "pwlq"  # the slowest last
        return source["checkpoint"], is_pwlq, scheme_name(source), *bits

    ordered = sorted(records.values(), key=key)
    lines = [HEADER, " | ".join(["---"] * 4 + ["---:"] * 12), *map(row, ordered)]
    machine = ordered[0]["environment"]["machine"]
    about = f"{machine['processor']}, {machine['threads']} threads"
    intro = (
        f"Accuracies in % on {ordered[0]['n_images']:,} test images; “differ”: predictions of ONNX "
        "Runtime that are not those of the integer simulation, and of the float32 simulation "
        f"with the same biases. Times against the faster float32 program, on {about}."
    )
    body = "\n".join(f"| {line} |" for line in lines)
    costs = second_sums(ordered)
    about_costs = ["What the second sums of PWLQ cost:", "\n".join(costs)] if costs else []
    return "\n\n".join([intro, body, *about_costs])


def main() -> None:
    """Read the folder and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with records, in any depth")
    parser.add_argument("--output", type=Path, help="folder for table.md and records.jsonl.gz")
    args = parser.parse_args()
    records = read_records(args.folder)
    if not records:
        parser.error(f"{args.folder}: no *.verified.json below it")
    text = table(records)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "table.md").write_text(text + "\n", encoding="utf-8")
        (args.output / "records.jsonl.gz").write_bytes(pack_records(records))


if __name__ == "__main__":
    main()
